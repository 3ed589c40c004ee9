"""The tables of the fault benchmark, made from its rows alone."""

from __future__ import annotations

from statistics import mean

from benchmarks.fault_methods import (
    CLEAN,
    FAULTS,
    INSTEAD,
    LEARNING_RATE,
    LONG,
    OPTIMIZERS,
    PARTS,
    RATES,
    SPIKES,
    STEPS,
)


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: final loss, mean of the seeds; where not all survived, how many did."""
    cells: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in at_rate(of_length(rows, STEPS)):
        cells.setdefault((row["fault"], row["rate"], row["optimizer"]), []).append(row)
    lines = [f"| fault | steps | {' | '.join(OPTIMIZERS)} |", f"|---|---|{'---|' * len(OPTIMIZERS)}"]
    for fault, rate in [(CLEAN, 0.0)] + [(fault, rate) for fault in FAULTS for rate in sorted(RATES)]:
        texts = [_cell(cells.get((fault, str(rate), optimizer), [])) for optimizer in OPTIMIZERS]
        lines.append(f"| {fault} | {rate:.0%} | {' | '.join(texts)} |")
    return "\n".join(lines)


def parts_table(rows: list[dict[str, str]]) -> str:
    """Markdown: each part left out and what one would take instead, in the rows of the runs that compare them."""
    names = ("Stable-SPAM", *PARTS, *INSTEAD, "AdamW + clipping")
    cases = [(CLEAN, 0.0, 1)] + [(fault, rate, 1) for fault in SPIKES for rate in (0.01, 0.05)]
    cases += [(CLEAN, 0.0, times) for times in (2, 4)]
    seeds = {row["seed"] for row in rows if row["optimizer"] in INSTEAD}
    lines = [f"| gradients | learning rate | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for fault, rate, times in cases:
        found = [
            [
                row
                for row in at_rate(of_length(rows, STEPS), times)
                if (row["optimizer"], row["fault"], row["rate"]) == (name, fault, str(rate)) and row["seed"] in seeds
            ]
            for name in names
        ]
        what = fault if fault == CLEAN else f"{fault}, {rate:.0%} of steps"
        lines.append(f"| {what} | {times * LEARNING_RATE:g} | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, str]]) -> str:
    """The bound: Stable-SPAM survives every run, and with 5 % spikes ends within 1 % of its own clean loss."""
    own = [row for row in rows if row["optimizer"] == "Stable-SPAM"]
    survived = sum(row["survived"] == "True" for row in own)
    above = [value for fault in SPIKES for value in excess(rows, fault).values()]
    worst = f"at most {max(above):+.2%} of its clean loss" if above else "not yet run"
    spiked = f"with 5% spikes over {LONG} steps, {len(above)} runs: {worst}"
    return f"Stable-SPAM survived {survived} of {len(own)} runs; {spiked}"


def excess(rows: list[dict[str, str]], fault: str) -> dict[str, float]:
    """By seed, how far above its own clean loss a long run of Stable-SPAM ended, as a share of it."""
    own = [row for row in of_length(rows, LONG) if row["optimizer"] == "Stable-SPAM"]
    clean = {row["seed"]: float(row["final_loss"]) for row in own if row["fault"] == CLEAN}
    return {
        row["seed"]: float(row["final_loss"]) / clean[row["seed"]] - 1
        for row in own
        if row["fault"] == fault and row["seed"] in clean
    }


def bound_table(rows: list[dict[str, str]]) -> str:
    """Markdown: the long runs of Stable-SPAM, each seed's excess over its own clean loss."""
    own = [row for row in of_length(rows, LONG) if row["optimizer"] == "Stable-SPAM"]
    clean = {row["seed"]: row["final_loss"] for row in own if row["fault"] == CLEAN}
    lines = [f"| 5 % of {LONG} steps | {' | '.join(f'seed {seed}' for seed in clean)} |", f"|---|{'---|' * len(clean)}"]
    lines.append(f"| {CLEAN}: the loss | {' | '.join(clean.values())} |")
    for fault in FAULTS:
        above = excess(rows, fault)
        lines.append(f"| {fault} | {' | '.join(f'{above[seed]:+.2%}' if seed in above else '–' for seed in clean)} |")
    return "\n".join(lines)


def of_length(rows: list[dict[str, str]], steps: int) -> list[dict[str, str]]:
    return [row for row in rows if row["steps"] == str(steps)]


def at_rate(rows: list[dict[str, str]], times: int = 1) -> list[dict[str, str]]:
    """Those at so many times the learning rate; the first ones on record do not say that it is once."""
    return [row for row in rows if row.get("times") in ((str(times), "", None) if times == 1 else (str(times),))]


def _cell(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "–"
    alive = [row for row in rows if row["survived"] == "True"]
    nan_steps = round(mean(int(row["nan_steps"]) for row in rows))
    if not alive:
        return f"lost ({nan_steps} nan steps)"
    loss = f"{mean(float(row['final_loss']) for row in alive):.3f}"
    return loss if len(alive) == len(rows) else f"{loss}, {len(alive)} of {len(rows)} ({nan_steps} nan steps)"
