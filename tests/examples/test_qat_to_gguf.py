"""From the Trainer to real llama.cpp, on a tiny random Llama with a real tokenizer."""

from __future__ import annotations

import pytest

pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: it is in the extra gguf-test")
import qat_to_gguf

from tests.examples.test_callback_examples import QUIET


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    pages = tmp_path_factory.mktemp("pages")
    for page in range(9):
        lines = "".join(f"<p>Line {i}: {i} times {page} is {i * page}.</p>\n" for i in range(page, page + 60))
        (pages / f"{page}.html").write_text(f"<html><head><title>no</title></head><body>{lines}</body></html>")
    return str(pages)


@pytest.mark.parametrize("how", [[], ["--lora"]], ids=["all weights", "adapter"])
def test_what_was_trained_runs_in_llama_cpp(how: list[str], folder: str, tmp_path, capsys) -> None:
    found = qat_to_gguf.main(["--output_dir", str(tmp_path), "--text", folder, *QUIET, *how, "--prompt", "Line 7"])
    assert found["trained"] != found["rounded"]
    if how:
        assert found["merged"] == found["trained"]
    assert found["llama.cpp"] == pytest.approx(found["trained"], rel=0.01)
    assert "\nLine 7" in "\n" + capsys.readouterr().out


def test_missing_texts_are_named() -> None:
    with pytest.raises(SystemExit, match="no text at nowhere; apt install debian-handbook, or give --text"):
        qat_to_gguf.read_pages("nowhere")
