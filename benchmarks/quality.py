"""Which optimizer and which 4-bit format train a Llama best: a queue of pretrainings, and the tables of their record.

    python benchmarks/quality.py --list                       # the studies, and how many runs of each are still to do
    python benchmarks/quality.py --studies pairs formats      # run what is missing of two of them
    python benchmarks/quality.py --table                      # run nothing, print what is on record
    python benchmarks/quality.py --studies at_scale --model_size 60m --data allenai/c4 --steps 10000 --bf16

Each finished run is appended to results/quality.csv at once, and runs that are there are not repeated: stop it when
you like and go on later. Start it as often as there are cores (with OMP_NUM_THREADS=1): the processes share the queue.
A run of 500 steps of the demo's model (1.3 million parameters, 16 × 128 tokens a step) takes
about three minutes on one core, one of `longer` half an hour; all others are about 260 runs. Whoever wins, wins:
diverged runs are rows as well.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import _queue, _record
from benchmarks.quality_runs import STANDARD_LIBRARY, Run
from benchmarks.quality_studies import AT_SCALE_RATE, ON_CPU, STUDIES, Record
from benchmarks.quality_tables import tables

NAME = "quality"
TRIAL_STEPS = 10


def read_record() -> Record:
    """Every run on record, with its row; of runs made twice the last."""
    return _queue.read_record(NAME, Run.from_row)


def missing(studies: list[str], base: Run, record: Record) -> Iterator[Run]:
    """Runs that the studies ask for now and that are not on record, in their order, each once."""
    seen = set(record)
    for name in studies:
        for run in STUDIES[name](base, record):
            if run not in seen:
                seen.add(run)
                yield run


def work(studies: list[str], base: Run, at_most: int | None) -> int:
    """Run what is missing; the number of runs made."""
    return _queue.work(lambda: missing(studies, base, read_record()), train, at_most)


def train(run: Run) -> None:
    """Make a run and put it on record."""
    row = run.train()
    _record.append_rows(NAME, [row])
    print(f"{run.method} {run.precision} lr={run.learning_rate:g} seed={run.seed}: {row['eval_loss']}", flush=True)


def steps_within(minutes: float, base: Run) -> int:
    """Steps that the slowest setting of `at_scale` makes in so many minutes, by a trial of a few."""
    trial = replace(base, steps=TRIAL_STEPS, learning_rate=AT_SCALE_RATE).train()
    steps = int(60 * minutes / trial["seconds_per_step"])
    print(f"{trial['seconds_per_step']} s a step: {steps} steps in {minutes:g} minutes", flush=True)
    return max(steps, 1)


def parse(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=ON_CPU, help="default: not longer, at_scale")
    parser.add_argument("--steps", type=int, default=500, help="update steps of each run")
    parser.add_argument("--model_size", default="tiny", help="as in examples/pretrain.py")
    parser.add_argument("--data", default=STANDARD_LIBRARY, help="standard_library, torch_headers, or a data set")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences a step")
    parser.add_argument("--block_size", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--at_most", type=int, default=None, help="stop after so many runs")
    parser.add_argument(
        "--minutes", type=float, help="as many steps as a run of so many minutes has, instead of --steps"
    )
    parser.add_argument("--results", type=Path, help="folder of the CSV file; default: the committed one")
    parser.add_argument("--list", action="store_true", help="run nothing, say what is to do")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is on record")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> None:
    options = parse(command_line)
    _record.RESULTS = options.results or _record.RESULTS
    names = ("steps", "data", "model_size", "batch_size", "block_size", "bf16")
    base = Run("stable_spam", "int4", 3e-3, **{name: getattr(options, name) for name in names})
    if options.minutes is not None:
        base = replace(base, steps=steps_within(options.minutes, base))
    if options.list:
        record = read_record()
        for name in options.studies:
            runs = list(dict.fromkeys(STUDIES[name](base, record)))
            left = sum(run not in record for run in runs)
            print(f"{name:12s} {len(runs) - left:3d} done {left:3d} to do  {STUDIES[name].__doc__}")
        return
    if not options.table:
        work(options.studies, base, options.at_most)
    print(tables(options.studies, base, read_record()))


if __name__ == "__main__":
    main()
