"""Say what happened to somebody who has not configured logging."""

import logging
import os
import sys


def announce(logger: logging.Logger, message: str, *args: object) -> None:
    """`logger.info`, which is also seen where nobody has configured logging: then as a line on stderr.

    Python shows no INFO record by default, and what was converted, packed or chosen is nothing to warn of. Whoever
    has configured logging gets an ordinary record; `logging.getLogger("hf_stablespam").setLevel("WARNING")` silences.
    In a distributed run the main process alone says it.

    Args:
        logger: the module's.
        message: as for `logger.info`.
        args: likewise.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if logger.isEnabledFor(logging.INFO):
        logger.info(message, *args)
    elif not logger.hasHandlers() and not logging.getLogger(__package__).level:
        sys.stderr.write(f"[{__package__}] {message % args if args else message}\n")
