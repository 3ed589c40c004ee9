"""Find the newest checkpoint that was written to its end, after a crash that may have struck while one was."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_RANDOM_STATE = re.compile(r"rng_state_(\d+)\.pth")
_STATE = "trainer_state.json"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# One of each: single files, FSDP's folders, DeepSpeed's.
_SAFETENSORS = ("model*.safetensors", "adapter_model*.safetensors")
_WEIGHTS = (*_SAFETENSORS, "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp_0", "global_step*")
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
# What torch.save writes there. Whatever else lies in the folder is somebody's own, and no part of the checkpoint.
_ZIPPED = (
    *("pytorch_model*.bin", "adapter_model*.bin", "optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt"),
    *("rng_state*.pth", "training_args.bin"),
)
_FSDP_FOLDERS = ("pytorch_model_fsdp_0", "optimizer_0")


def last_complete_checkpoint(output_dir: str | os.PathLike[str], before: int | None = None) -> str | None:
    """The newest checkpoint of a Trainer run from which it can go on exactly, for `resume_from_checkpoint`.

    A process that is killed while it writes leaves a newest checkpoint with files missing or cut short. Such a one is
    named in a warning and passed over; nothing is deleted or changed.

    Args:
        output_dir: the run's `TrainingArguments.output_dir`; it need not exist.
        before: only checkpoints of steps below this one, for example the step at which the loss went wrong; default
            `None`, all of them.

    Returns:
        The folder of the checkpoint, or `None` where there is no complete one.

    Raises:
        ValueError: `before` is not an integer of at least 1.

    Example:
        >>> last_complete_checkpoint("no/such/run") is None
        True
        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))  # doctest: +SKIP
    """
    if before is not None and (isinstance(before, bool) or not isinstance(before, int) or before < 1):
        raise ValueError(f"before must be an integer of at least 1, got {before!r}; None means all checkpoints")
    return _newest(Path(output_dir), before)


def last_checkpoint_with_weights(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint whose weights were written to their end, also one without what a run needs to go on."""
    return _newest(Path(output_dir), resumable=False)


def _newest(folder: Path, before: int | None = None, resumable: bool = True) -> str | None:
    found = [(int(match[1]), path) for path in _folders(folder) if (match := _NAME.fullmatch(path.name))]
    for step, path in sorted(found, reverse=True):
        if before is not None and step >= before:
            continue
        problem = what_is_missing(path, step, resumable)
        if problem is None:
            return str(path)
        logger.warning("checkpoint %s is not complete and is passed over: %s", path, problem)
    return None


def what_is_missing(checkpoint: Path, step: int, resumable: bool = True) -> str | None:
    """Why a run cannot go on from a checkpoint, in words; `None` if it can.

    Args:
        checkpoint: its folder.
        step: the number in the folder's name.
        resumable: False if the weights alone are wanted.
    """
    problem = _problem_of_state(checkpoint / _STATE, step)
    if problem is None:
        problem = _problem_of_presence(checkpoint, resumable)
    if problem is None:
        problems = (_problem_of_file(path) for path in sorted(checkpoint.iterdir()) if path.is_file())
        problem = next((text for text in problems if text), None)
    return problem


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _problem_of_state(path: Path, step: int) -> str | None:
    """The Trainer writes its state after everything else: without it the rest cannot be trusted."""
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return f"{_STATE}, which is written last, is missing"
    except ValueError:
        return f"{_STATE} is cut short"
    if not isinstance(state, dict):
        return f"{_STATE} holds no state"
    if state.get("global_step") != step:
        return f"{_STATE} says step {state.get('global_step')}"
    return None


def _problem_of_presence(checkpoint: Path, resumable: bool) -> str | None:
    def has(patterns: tuple[str, ...]) -> bool:
        return any(next(checkpoint.glob(pattern), None) for pattern in patterns)

    if not has(_WEIGHTS):
        return "it has no weights"
    if resumable and not has(_OPTIMIZER):
        return "it has no optimizer state (as with save_only_model=True)"
    for name in _INDICES:
        if (checkpoint / name).exists() and (problem := _problem_of_shards(checkpoint / name)):
            return problem
    for name in _FSDP_FOLDERS:
        if (checkpoint / name).is_dir() and not (checkpoint / name / ".metadata").is_file():
            return f"{name}/.metadata, which is written last, is missing"
    return _problem_of_random_states(checkpoint) if resumable else None


def _problem_of_random_states(checkpoint: Path) -> str | None:
    """Each process writes its own; the main one does not wait for the others before it writes the Trainer's state."""
    found = _processes(checkpoint)
    if not found:
        return None  # a single process writes rng_state.pth
    # Where nodes have disks of their own, theirs are the numbers of one node.
    count = max(2, _known_processes())
    if count > len(found) and min(found) == 0 and len(found) > 1:
        # As many as in another checkpoint: fewer processes have written this run than are to go on with it.
        others = (path for path in _folders(checkpoint.parent) if _NAME.fullmatch(path.name) and path != checkpoint)
        if any(_processes(path) == found for path in others):
            count = len(found)
    wanted = range(min(found), max(max(found) + 1, min(found) + count))
    missing = next((number for number in wanted if number not in found), None)
    return None if missing is None else f"rng_state_{missing}.pth is missing"


def _processes(checkpoint: Path) -> set[int]:
    """Numbers of the processes whose random state is in a checkpoint."""
    matches = (_RANDOM_STATE.fullmatch(path.name) for path in checkpoint.glob("rng_state_*.pth"))
    return {int(match[1]) for match in matches if match}


def _known_processes() -> int:
    """How many processes of this node go on with the run, as far as the launcher has said; 0 where it has not."""
    given = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or ""
    return int(given) if given.isdecimal() else 0


def _problem_of_shards(index: Path) -> str | None:
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError):
        return f"{index.name} is cut short"
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    return f"{missing[0]} is missing" if missing else None


def _problem_of_file(path: Path) -> str | None:
    if any(map(path.match, _SAFETENSORS)):
        return None if _is_whole_safetensors(path) else f"{path.name} is cut short"
    # torch.save writes a zip archive, whose table of contents comes last
    if any(map(path.match, _ZIPPED)) and not zipfile.is_zipfile(path):
        return f"{path.name} is cut short"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return size == 8 + length + max(ends, default=0)
        except (ValueError, AttributeError, TypeError, LookupError):  # no JSON, or not of a header's form
            return False
