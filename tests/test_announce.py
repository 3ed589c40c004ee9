"""What happened is seen by those who have not configured logging, and obeys those who have."""

import subprocess
import sys

import pytest

CODE = """
import logging, os
{setup}
from hf_stablespam._announce import announce
announce(logging.getLogger("hf_stablespam.quant.convert"), "converted %d layers", 3)
"""
LINE = "converted 3 layers"


@pytest.mark.parametrize(
    ("setup", "seen"),
    [
        ("", "[hf_stablespam] " + LINE),
        ("logging.basicConfig(level='INFO')", "INFO:hf_stablespam.quant.convert:" + LINE),
        ("logging.basicConfig()", ""),
        ("logging.getLogger('hf_stablespam').setLevel('WARNING')", ""),
        ("os.environ['RANK'] = '1'", ""),
    ],
)
def test_who_sees_what_was_converted(setup, seen):
    done = subprocess.run([sys.executable, "-c", CODE.format(setup=setup)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.startswith(seen)
    assert done.stderr.count(LINE) == bool(seen)
