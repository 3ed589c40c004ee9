"""Files and folders that appear whole or not at all: a full disk or a killed process leaves what was there before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pruning.json")
TOKENIZER = (
    *("tokenizer*", "chat_template*", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.*", "merges.txt", "spiece.model"),
)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end of the block.

    Raises:
        OSError: it could not be written; `path` is what it was.
    """
    target = Path(path)
    with _beside(target) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `path` to write to; its files move into `path` at the end of the block.

    Files of `path` with other names stay, except those that would be read with the new ones: shards and widths of an
    earlier model, and with a tokenizer what an earlier one wrote.

    Raises:
        OSError: something could not be written; `path` is what it was.
    """
    target = Path(path)
    with _beside(target) as folder:
        yield folder
        if not target.exists():
            os.rename(folder, target)
            return
        written = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
        for name in written:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, target / name)
        has_tokenizer = any(name.match(TOKENIZER[0]) for name in written)
        for pattern in (*WEIGHTS, *(TOKENIZER if has_tokenizer else ())):
            for old in target.glob(pattern):
                if old.relative_to(target) not in written and old.is_file():
                    old.unlink()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless something can be written beside `path`, before there is anything to write.

    Raises:
        OSError: it cannot; `path` is what it was.
    """
    with _beside(Path(path)):
        pass


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder in the folder of `target`, so that renaming does not copy."""
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        folder.chmod(0o777 & ~_umask())  # mkdtemp's are for the user alone
        yield folder
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            free = shutil.disk_usage(next(one for one in target.absolute().parents if one.exists())).free
            kind = type(error) if isinstance(error, OSError) else OSError
            raise kind(
                f"{target} could not be written, and is what it was: {error}; {free / 2**20:,.0f} MiB are free there"
            ) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
