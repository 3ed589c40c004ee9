"""Colours and dashes of runs, the same in the interactive and in the static report."""

# Told apart on white and on black.
COLORS = ("#2f7ed8", "#e07b16", "#1a9f77", "#d1457b", "#8a63d2", "#b59a00", "#5a93a8", "#c0504d")
DASHES = ("solid", "dashed", "dotted", "dotdash")
MATPLOTLIB_DASHES = {"solid": "-", "dashed": "--", "dotted": ":", "dotdash": "-."}


def color(run: int) -> str:
    """The colour of a run; after eight runs they come again."""
    return COLORS[run % len(COLORS)]


def dash(run: int) -> str:
    """The dash pattern that tells runs of one colour apart."""
    return DASHES[run // len(COLORS) % len(DASHES)]
