"""The report's HTML around the diagrams: one file, no network, light and dark, for a desk and for a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hf_stablespam.monitor.report.style import color
from hf_stablespam.monitor.report.tables import Table

# No source but the file itself: a report that is opened or sent on fetches nothing and tells nobody.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

NARROW_TABLE = 3  # runs of a table that takes half of a wide screen

STYLE = """
:root { color-scheme: light; --page: #f6f7f9; --card: #fff; --text: #1c2430; --soft: #5b6675; --line: #dfe3e8;
  --mark: #fff3d6; }
:root[data-theme=dark] { color-scheme: dark; --page: #12161c; --card: #1b212a; --text: #e6eaf0; --soft: #9aa6b5;
  --line: #303945; --mark: #3c3420; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 0 16px 48px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header { display: flex; justify-content: space-between; align-items: baseline; gap: 16px; padding: 20px 0 4px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 0 0 8px; }
p { margin: 6px 0 0; color: var(--soft); font-size: 13px; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 999px;
  padding: 4px 12px; cursor: pointer; max-width: 100%; overflow-wrap: anywhere; text-align: left; }
button:focus-visible { outline: 2px solid #2f7ed8; outline-offset: 1px; }
nav { position: sticky; top: 0; z-index: 20; display: flex; flex-wrap: wrap; gap: 8px; padding: 10px 0;
  background: var(--page); max-height: 40vh; overflow-y: auto; }
nav i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }
nav button[aria-pressed=false] { opacity: .45; text-decoration: line-through; }
main { display: grid; gap: 16px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  min-width: 0; }
section.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px; border-bottom: 1px solid var(--line); overflow-wrap: anywhere;
  min-width: 150px; max-width: 340px; vertical-align: top; }
th { font-weight: 600; } tbody th, th:first-child { text-align: left; padding-left: 0; font-weight: 500;
  position: sticky; left: 0; background: var(--card); }
tr.marked td { background: var(--mark); }
@media (max-width: 1000px) { main { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 600px) { body { padding: 0 8px 32px; font-size: 14px; } section { padding: 12px 10px; }
  th, td { padding: 4px 8px; min-width: 116px; } }
"""

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement;
  const models = () => Bokeh.documents.flatMap(d => d.roots()).flatMap(r => [...r.references()]);
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const set = (model, values) => { for (const key in values) if (key in model.properties) model[key] = values[key]; };

  function paint() {
    const style = getComputedStyle(root);
    const [soft, line] = ["--soft", "--line"].map(name => style.getPropertyValue(name).trim());
    const plain = { axis_label_text_color: soft, axis_label_text_font_style: "normal", major_label_text_color: soft,
      axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null };
    for (const model of models()) {
      set(model, plain);
      if (model.type.endsWith("Grid") && model.grid_line_color !== null) model.grid_line_color = line;
    }
  }
  function choose(theme) {
    root.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
    if (window.Bokeh) paint();
  }
  function toggle(button) {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    const run = Number(button.dataset.run);
    for (const model of models()) if (model.tags[0] === "run" && model.tags[1] === run) model.visible = shown;
    for (const card of document.querySelectorAll(`section[data-run="${run}"]`)) card.hidden = !shown;
  }
  function start() {
    if (!window.Bokeh) return;
    if (!Bokeh.documents.length) return requestAnimationFrame(start);
    // A finger that scrolls the page must not zoom a diagram; the toolbar switches zooming on.
    if (matchMedia("(pointer: coarse)").matches)
      for (const model of models()) if (model.type === "BoxZoomTool") model.active = false;
    paint();
  }

  choose(preferred.matches ? "dark" : "light");
  preferred.addEventListener("change", () => choose(preferred.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () =>
    choose(root.dataset.theme === "dark" ? "light" : "dark"));
  for (const button of document.querySelectorAll("nav button")) button.addEventListener("click", () => toggle(button));
  start();
})();
"""


def page(
    labels: Sequence[str],
    tables: Sequence[Table],
    cards: Sequence[str],
    closing_tables: Sequence[Table],
    scripts: Sequence[str],
) -> str:
    """The whole file.

    Args:
        labels: names of the runs, as they are; escaped here.
        tables: tables above the diagrams.
        cards: the diagrams, from `card`.
        closing_tables: tables below them.
        scripts: `<script>` elements: the plotting library and the figures.
    """
    body = [*map(table_html, tables), *cards, *map(table_html, closing_tables)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {escape(", ".join(labels))}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>Training report</h1><button id="theme" type="button">Dark</button></header>
<nav aria-label="Runs to show">{"".join(chip(i, label) for i, label in enumerate(labels))}</nav>
<main>
{chr(10).join(body)}
</main>
{chr(10).join(scripts)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def chip(run: int, label: str) -> str:
    """The button that shows and hides one run in all diagrams."""
    swatch = f'<i style="background:{color(run)}"></i>'
    return f'<button type="button" aria-pressed="true" data-run="{run}">{swatch}{escape(label)}</button>'


def card(title: str, element: str, note: str = "", run: int | None = None, wide: bool = False) -> str:
    """A diagram with its heading and a line below it; that of a single run goes when the run is hidden."""
    kind = ' class="wide"' if wide else ""
    owner = "" if run is None else f' data-run="{run}"'
    return f"<section{kind}{owner}><h2>{escape(title)}</h2>{element}{paragraph(note)}</section>"


def breakable(text: str) -> str:
    """Escaped text that may go on in the next line after an underscore or a slash."""
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def paragraph(text: str) -> str:
    """Small text, or nothing."""
    return f"<p>{escape(text)}</p>" if text else ""


def table_html(table: Table) -> str:
    """A table that scrolls on its own where it is wider than the screen."""
    head = "".join(f"<th>{breakable(name)}</th>" for name in ["", *table.columns])
    rows = []
    for name, cells in table.rows:
        kind = ' class="marked"' if name in table.marked else ""
        rows.append(
            f"<tr{kind}><th>{breakable(name)}</th>{''.join(f'<td>{breakable(cell)}</td>' for cell in cells)}</tr>"
        )
    kind = ' class="wide"' if table.wide or len(table.columns) > NARROW_TABLE else ""
    return (
        f'<section{kind}><h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{paragraph(table.note)}</section>"
    )
