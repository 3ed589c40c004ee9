"""Writes the tables of README.md, docs/evidence.md, faults.md and others anew from the committed results.

    python benchmarks/evidence_page.py            # rewrite
    python benchmarks/evidence_page.py --check    # only say whether the pages show what the results show

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the text around it is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import (
    continual,
    demo_record,
    faults,
    momentum_resets,
    outside_language,
    prune_and_recover,
    prune_smollm2,
    qat_record,
    qat_tables,
    step_tables,
)
from benchmarks._record import RESULTS
from benchmarks.cost_on_paper import cost_table
from benchmarks.quality import read_record
from benchmarks.quality_runs import Run
from benchmarks.quality_studies import STUDIES, Record
from benchmarks.quality_tables import apart_summary, apart_table, fewer_table, longer_summary, steps_table, table

DOCS = Path(__file__).parents[1] / "docs"
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BASE = Run("stable_spam", "int4", 3e-3)


def study_table(name: str, record: Record) -> str:
    """The table of a study, and how far it is where runs are missing."""
    asked = dict.fromkeys(STUDIES[name](BASE, record))
    done = sum(run in record for run in asked)
    if not asked:
        return "These runs follow when the learning rates are known."
    if not done:
        return f"None of the {len(asked)} runs is on record yet."
    missing = f"So far {done} of {len(asked)} runs are on record.\n\n" if done < len(asked) else ""
    return missing + table(name, BASE, record)


def makers() -> dict[str, Callable[[], str]]:
    """Name of a table → how it is made."""
    record = read_record()
    found: dict[str, Callable[[], str]] = {name: lambda name=name: study_table(name, record) for name in STUDIES}
    found["apart"] = lambda: apart_table(BASE, record)
    found["apart-best"] = lambda: apart_summary(BASE, record)
    found["longer-best"] = lambda: longer_summary(BASE, record)
    found["fewer_steps"] = lambda: fewer_table(BASE, record)
    found["demo"] = demo_record.table
    found |= {"step-cost": step_tables.table, "step-summary": step_tables.summary}
    found |= {"share-of-steps": lambda: steps_table(BASE, record), "cost": cost_table}
    damaged = faults.read(RESULTS / "faults.csv")
    found |= {"faults": lambda: faults.table(damaged), "faults-bound": lambda: faults.bound_table(damaged)}
    found["faults-parts"] = lambda: faults.parts_table(damaged)
    real = qat_record.read_record()
    found |= {"qat": lambda: qat_tables.table(real), "qat-rates": lambda: qat_tables.rates_table(real)}
    found["qat-summary"] = lambda: qat_tables.summary(real)
    found["qat-files"] = qat_tables.files_table
    found["momentum-resets"] = lambda: momentum_resets.table(momentum_resets.read())
    found["continual"] = lambda: continual.table(continual.recorded())
    found["continual-parts"] = lambda: continual.parts_table(continual.recorded())
    found["prune-bytes"] = lambda: prune_and_recover.table(prune_and_recover.on_record())
    found["prune-smollm2"] = lambda: prune_smollm2.table(prune_smollm2.read_rows())
    errors = outside_language.read_record()
    for task in outside_language.TASKS:
        found[task] = lambda task=task: outside_language.table(task, errors, steps=300)
    return found


def filled(text: str) -> str:
    """The page with every table made anew."""
    tables = makers()

    def one(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in tables:
            raise ValueError(f"table: must be one of {', '.join(tables)}, got {name!r}; mend the page's comment")
        return f"{match.group(1)}\n{tables[name]()}\n\n{match.group(3)}"

    return PLACE.sub(one, text)


def pages() -> list[Path]:
    """The pages that have such tables."""
    known = [*sorted(DOCS.rglob("*.md")), *DOCS.parent.glob("README.md")]
    return [page for page in known if PLACE.search(page.read_text(encoding="utf-8"))]


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not up to date")
    options = parser.parse_args(command_line)
    stale = [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    if options.check and stale:
        sys.exit(f"not what the results show: {', '.join(page.name for page in stale)}; run {Path(__file__).name}")
    for page in stale:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
