"""What the quality benchmark asks, each question as the list of runs that answers it.

A study sees the record of what has been run, because some of its runs depend on others: the seeds of a method are
run at the learning rate at which it did best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.quality_methods import APART, FACTORS, METHODS, WITHOUT_RESETS, apart
from benchmarks.quality_runs import TIED, TORCH_HEADERS, Run

Record = Mapping[Run, dict[str, Any]]
SEEDS = (42, 43, 44)
HELD_OUT_SEEDS = (45, 46, 47)
DEFAULT_RATE = 3e-3
AT_SCALE_RATE = 1e-3  # the paper's for 60M and 130M
SWEPT = ("adamw_clipped", "stable_spam", "adamw", "spam", "adafactor", "lion")
# what exports and reloads plainly
EXPORTABLE = ("int4", "int4_no_outliers", "int4_asym", "mxfp4", "nvfp4", "nvfp4_4or6")


def loss_of(record: Record, run: Run) -> float:
    """Validation loss on record; infinite after a divergence or where there is none."""
    loss = float(record[run]["eval_loss"]) if run in record else math.inf
    return loss if math.isfinite(loss) else math.inf


def best_rate(record: Record, base: Run, rates: Iterable[float] | None = None) -> float | None:
    """The learning rate at which the method's first seed ended lowest; None while one of the rates is to be run."""
    runs = [replace(base, learning_rate=rate, seed=SEEDS[0]) for rate in rates or METHODS[base.method].rates]
    if any(run not in record for run in runs):
        return None
    return min(runs, key=lambda run: loss_of(record, run)).learning_rate


def over_seeds(base: Run, seeds: Iterable[int] = SEEDS) -> list[Run]:
    """The run once for each seed."""
    return [replace(base, seed=seed) for seed in seeds]


def sweep(base: Run, record: Record) -> Iterator[Run]:
    """Final loss over the learning rate, per optimizer, in full precision and in INT4 (the paper's figure 6)."""
    for method in SWEPT:
        for rate in METHODS[method].rates:
            for precision in ("int4", "full"):
                yield replace(base, method=method, precision=precision, learning_rate=rate)


def formats(base: Run, record: Record) -> Iterator[Run]:
    """Which of the 4-bit formats that export plainly trains best, all else equal; the best again on held-out seeds."""
    own = replace(base, method="stable_spam", learning_rate=DEFAULT_RATE)
    tried = {name: over_seeds(replace(own, precision=name)) for name in EXPORTABLE}
    yield from itertools.chain.from_iterable(zip(*tried.values(), strict=True))
    if all(run in record for runs in tried.values() for run in runs):
        best = min(EXPORTABLE, key=lambda name: sum(loss_of(record, run) for run in tried[name]))
        for name in dict.fromkeys(("int4", best)):
            yield from over_seeds(replace(own, precision=name), HELD_OUT_SEEDS)


def precision(base: Run, record: Record) -> Iterator[Run]:
    """Stable-SPAM in 4 bits against AdamW with clipping in full precision, each at its best learning rate."""
    for method in ("adamw_clipped", "stable_spam"):
        for name in ("full", "int4", "fp4_e1m2", "mxfp4", "nvfp4", "nvfp4_gradient"):
            swept = replace(base, method=method, precision="full" if name == "full" else "int4")
            rate = best_rate(record, swept)
            if rate is not None:
                yield from over_seeds(replace(swept, precision=name, learning_rate=rate))


def pairs(base: Run, record: Record) -> Iterator[Run]:
    """The comparison of the demo over three seeds, at its one learning rate."""
    for seed in SEEDS:
        for method, name in (("stable_spam", "int4"), ("adamw_clipped", "full"), ("adamw_clipped", "int4")):
            yield replace(base, method=method, precision=name, learning_rate=DEFAULT_RATE, seed=seed)


def relatives(base: Run, record: Record) -> Iterator[Run]:
    """The family in INT4: each at its learning rates, then three seeds at its best."""
    names = ("stable_spam", "adamw", "spam", "galore", "galore_stable_spam", "lion", "lion_stabilized")
    for method in names:
        rates = METHODS[method].rates if len(METHODS[method].rates) == 3 else METHODS[method].rates[1:4]
        own = replace(base, method=method, precision="int4")
        yield from (replace(own, learning_rate=rate) for rate in rates)
        rate = best_rate(record, own, rates)
        if rate is not None:
            yield from over_seeds(replace(own, learning_rate=rate))


def states(base: Run, record: Record) -> Iterator[Run]:
    """8- and 4-bit states against 32-bit ones."""
    for seed in SEEDS:
        for method in ("stable_spam", "stable_spam_8bit", "stable_spam_4bit"):
            yield replace(base, method=method, precision="int4", learning_rate=DEFAULT_RATE, seed=seed)


def ablation(base: Run, record: Record) -> Iterator[Run]:
    """Clip, normalise, reset, decay: each left out, each alone (the paper's table 4)."""
    without = ("stable_spam_reset", "without_clip", "without_norm", "stable_spam", "without_decay")
    alone = ("only_clip", "only_norm", "only_reset", "only_decay", "adamw")
    for seed in SEEDS:
        for method in (*without, *alone):
            yield replace(base, method=method, precision="int4", learning_rate=DEFAULT_RATE, seed=seed)


def resets(base: Run, record: Record) -> Iterator[Run]:
    """Our resets against the official code's, every 200 steps."""
    yield from _both_resets(base, "stable_spam_reset", "official_reset200")


def frequent_resets(base: Run, record: Record) -> Iterator[Run]:
    """The same every 100 steps."""
    yield from _both_resets(base, "stable_spam_reset100", "official_reset100")


def _both_resets(base: Run, *methods: str) -> Iterator[Run]:
    for seed in SEEDS:
        for method in methods:
            yield replace(base, method=method, precision="int4", learning_rate=DEFAULT_RATE, seed=seed)


CANDIDATES = (
    "stable_spam_beta95",
    "stable_spam_slow_norm",
    "stable_spam_bfloat16_norm",
    "stable_spam_beta95_slow_norm",
    "stable_spam_floor25",
    "stable_spam_floor75",
    "stable_spam_clip99",
)
STEPS_RATES = (1e-3, 3e-3, 1e-2)
BASELINES = ("adamw_clipped", "adamw_clipped_beta95", "adamw", "adamw_beta95")


def candidates(base: Run, record: Record) -> Iterator[Run]:
    """Options that could be better defaults, one seed; the best on held-out seeds and on a second text."""
    own = replace(base, precision="int4", learning_rate=DEFAULT_RATE)
    tried = [replace(own, method=method) for method in ("stable_spam", *CANDIDATES)]
    yield from tried
    if any(run not in record for run in tried):
        return
    for run in (tried[0], min(tried[1:], key=lambda run: loss_of(record, run))):
        yield from over_seeds(run, HELD_OUT_SEEDS)
        yield from over_seeds(replace(run, data=TORCH_HEADERS))


def steps(base: Run, record: Record) -> Iterator[Run]:
    """How many steps Stable-SPAM needs to AdamW's final loss in 4 bits, everyone at its best."""
    own = replace(base, precision="int4")
    for method in ("stable_spam", *BASELINES):
        yield from (replace(own, method=method, learning_rate=rate) for rate in STEPS_RATES)
        rate = best_rate(record, replace(own, method=method), STEPS_RATES)
        if rate is not None:
            yield from over_seeds(replace(own, method=method, learning_rate=rate))


def rates_apart(base: Run, record: Record) -> Iterator[Run]:
    """Embedding, head or norms with 10 times the learning rate; the embedding with 3 and 30 times; three seeds."""
    own = replace(base, precision="int4", learning_rate=DEFAULT_RATE)
    for method in ("stable_spam", "adamw_clipped"):
        yield from over_seeds(replace(own, method=method))  # one rate for all: what is compared with
    yield from (replace(own, method=apart(method, "embedding", 10)) for method in ("stable_spam", "adamw_clipped"))
    yield from (replace(own, method=apart("stable_spam", kind, 10)) for kind in ("head", "norm"))
    yield from (replace(own, method=apart("stable_spam", "embedding", factor)) for factor in (3, 30))
    yield from (replace(own, method=apart("adamw_clipped", "embedding", factor)) for factor in (3, 30))
    for seed in SEEDS[1:]:
        for method in ("stable_spam", "adamw_clipped"):
            factor = best_factor(record, replace(own, method=method))
            if factor is not None:
                yield replace(own, method=apart(method, "embedding", factor), seed=seed)
    tied = replace(own, model_size=base.model_size + TIED)
    yield from (replace(tied, method=method) for method in ("stable_spam", apart("stable_spam", "embedding", 10)))


APART_RATES = (7.5e-4, 1.5e-3, DEFAULT_RATE, 6e-3, 1.2e-2)  # of the matrices
FULL_RATES = (6e-3, 1.5e-3, 1.2e-2, 7.5e-4)  # in full precision, beside the default


def honest_baselines(base: Run, record: Record) -> Iterator[Run]:
    """Embedding apart, rates of the matrices, in INT4 and full precision; both β2, weight decay; three seeds."""
    own = replace(base, precision="int4", learning_rate=DEFAULT_RATE)
    names = [apart(method, "embedding", 10) for method in APART]
    yield from (replace(own, method=method) for method in names)
    yield from (replace(own, method=method, precision="full") for method in names)
    for rate in APART_RATES[-2:] + APART_RATES[1:2]:
        yield from (replace(own, method=method, learning_rate=rate) for method in names)
    yield from (replace(own, method=f"{method}_decay") for method in names)
    for method in names:
        best = best_apart(base, record, method)
        if best is not None:
            yield from over_seeds(best)
    yield from (replace(own, method=method, learning_rate=APART_RATES[0]) for method in names)
    for rate in FULL_RATES:
        yield from (replace(own, method=method, precision="full", learning_rate=rate) for method in names)
    for method in names:
        full = replace(own, method=method, precision="full")
        rate = best_rate(record, full, APART_RATES)
        if rate is not None:
            yield from over_seeds(replace(full, learning_rate=rate))


def best_apart(base: Run, record: Record, method: str) -> Run | None:
    """The run of the first seed that ended lowest, over rates and weight decays; None before its neighbours ran."""
    own = replace(base, method=method, precision="int4", seed=SEEDS[0])
    rates = [replace(own, learning_rate=rate) for rate in APART_RATES]
    best = min(rates, key=lambda run: loss_of(record, run))
    place, decay = rates.index(best), replace(own, method=f"{method}_decay", learning_rate=DEFAULT_RATE)
    if any(run not in record for run in (*rates[max(0, place - 1) : place + 2], decay)):
        return None
    return min(best, decay, key=lambda run: loss_of(record, run))


SHORT, LONGER = 0.4, 0.75  # of the steps of the Trainer's default, and of the best AdamW: the goals
LONGER_RATES = (DEFAULT_RATE, 6e-3)
SHORTER = ("stable_spam_embedding10", "shorter_wsd", "shorter_beta95", "shorter_muon", "shorter_muon_stabilized")


def fewer_steps(base: Run, record: Record) -> Iterator[Run]:
    """Whole runs of 0.4 and 0.75 of the steps, and what the field has to make them end lower; three seeds."""
    own = replace(base, precision="int4", learning_rate=DEFAULT_RATE)
    short, longer = (max(1, round(share * base.steps)) for share in (SHORT, LONGER))
    tried = [replace(own, method=method, steps=short) for method in SHORTER]
    later = [
        replace(own, method=method, steps=longer, learning_rate=rate) for rate in LONGER_RATES for method in SHORTER[:2]
    ]
    for runs in (tried, later):
        yield from runs
        if all(run in record for run in runs):
            yield from over_seeds(min(runs, key=lambda run: loss_of(record, run)))
    yield from over_seeds(tried[0])


LARGER, SEQUENCES, TIMES_LONGER = "9m", 8, 4


def longer(base: Run, record: Record) -> Iterator[Run]:
    """9M parameters, four times the steps, two rates; then full precision, a second seed and no resets for the best."""
    own = replace(base, model_size=LARGER, batch_size=SEQUENCES, steps=TIMES_LONGER * base.steps, precision="int4")
    ours, *theirs = (
        [replace(own, method=apart(method, "embedding", 10), learning_rate=rate) for rate in APART_RATES[2:0:-1]]
        for method in APART
    )
    rivals = list(itertools.chain(*theirs))
    yield from (*ours, *rivals)
    if any(run not in record for run in (*ours, *rivals)):
        return
    bests = [min(runs, key=lambda run: loss_of(record, run)) for runs in (ours, rivals)]
    for seed, precision in ((SEEDS[0], "full"), (SEEDS[1], "int4"), (SEEDS[1], "full")):
        yield from (replace(run, precision=precision, seed=seed) for run in bests)
    yield from (replace(bests[0], method=WITHOUT_RESETS, seed=seed) for seed in SEEDS[:2])


def best_factor(record: Record, base: Run) -> int | None:
    """The factor on the embedding's rate with which the method ended lowest; None while one of them is to be run."""
    runs = {factor: replace(base, method=apart(base.method, "embedding", factor)) for factor in FACTORS}
    if any(run not in record for run in runs.values()):
        return None
    return min(runs, key=lambda factor: loss_of(record, runs[factor]))


def at_scale(base: Run, record: Record) -> Iterator[Run]:
    """What a larger model costs and gains: AdamW with clipping and Stable-SPAM, in full precision and INT4."""
    for method, name in itertools.product(("adamw_clipped", "stable_spam"), ("full", "int4")):
        yield replace(base, method=method, precision=name, learning_rate=AT_SCALE_RATE)


STUDIES: dict[str, Callable[[Run, Record], Iterator[Run]]] = {
    study.__name__: study
    for study in (
        pairs,
        formats,
        relatives,
        states,
        sweep,
        precision,
        steps,
        ablation,
        resets,
        frequent_resets,
        candidates,
        rates_apart,
        honest_baselines,
        fewer_steps,
        longer,
        at_scale,
    )
}
ON_CPU = tuple(name for name in STUDIES if name not in ("longer", "at_scale"))  # in some hours
