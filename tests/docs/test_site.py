"""The site builds without a warning, needs nothing from elsewhere, and says what the code says."""

import csv
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import hf_stablespam
from hf_stablespam.optim import StableSPAM
from tests.docs.pages import PAGES, ROOT
from tests.processes import run_once

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
EXTERNAL_LINKS = 12  # at most: nobody checks what lies behind them


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run_once(tmp_path_factory, "site", build)


class Addresses(HTMLParser):
    """What a page loads (`assets`), and what it links to (`links`)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if named.get("src"):
            self.assets.append(named["src"])
        if named.get("href"):
            (self.links if tag == "a" else self.assets).append(named["href"])


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc) and not address.startswith("data:")


def html_pages(site: Path) -> list[Path]:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    return pages


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for page in html_pages(site):
        assert not [asset for asset in Addresses(page.read_text()).assets if is_elsewhere(asset)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", sheet.read_text()), sheet
    assert Addresses('<link href="//fonts.example.org/x">').assets == ["//fonts.example.org/x"]
    assert is_elsewhere("//fonts.example.org/x")


@pytest.mark.slow
def test_external_links_are_few_and_well_formed(site):
    links = {link for page in html_pages(site) for link in Addresses(page.read_text()).links if is_elsewhere(link)}
    links |= {link for page in PAGES for link in re.findall(r"\]\((https?:[^)]*)\)", page.read_text())}
    assert 0 < len(links) <= EXTERNAL_LINKS
    for link in links:
        parts = urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), link


@pytest.mark.slow
def test_equations_are_mathml(site):
    method = (site / "method" / "index.html").read_text()
    assert method.count("<math ") > 20
    for page in html_pages(site):
        assert not re.search(r"\$\$|\\frac|\\gamma|<merror", page.read_text()), page


@pytest.mark.slow
def test_the_reference_has_every_public_name_and_no_raw_markup(site):
    html = (site / "api" / "index.html").read_text()
    headings = set(re.findall(r'id="hf_stablespam\.[\w.]*?(\w+)"', html))
    assert set(hf_stablespam.__all__) <= headings
    text = re.sub(r"<[^>]*>", "", html)
    for markup in ("code-block::", ".. math", "doctest:", "Args:", "Example:", "``"):
        assert markup not in text, markup
    assert text.count("&gt;&gt;&gt;") > len(hf_stablespam.__all__)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    """Those of the pages in docs are checked by mkdocs."""
    for link in re.findall(r"\]\(([^):#]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (ROOT / link).exists(), link


def test_each_difference_from_the_official_code_names_its_test():
    rows = [line for line in (DOCS / "official_code.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| the official code")]
    assert len(rows) >= 15
    for row in rows:
        cited = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row)
        assert cited, row
        for file, name in cited:
            assert f"def {name}(" in (ROOT / file).read_text(), name


def test_the_table_of_options_has_the_defaults_of_the_code():
    defaults = {name: option.default for name, option in inspect.signature(StableSPAM).parameters.items()}
    defaults["norm_betas"] = ":".join(map(str, defaults["norm_betas"]))
    defaults["decay_steps"] = "auto"  # in the Trainer
    options = ("clip_beta", "norm_betas", "reset_interval", "decay_steps", "decay_floor")
    for page in (DOCS / "hyperparameters.md", ROOT / "README.md"):
        rows = dict(re.findall(r"^\| `(\w+)` \| `?([\w.:]+)`? \|", page.read_text(), re.MULTILINE))
        shown = {
            name: rows[name] for name in ("clip_beta", "norm_betas", "reset_interval", "decay_steps", "decay_floor")
        }
        assert shown == {name: str(defaults[name]) for name in shown}


def test_every_results_file_is_explained_with_the_script_that_writes_it():
    text = (DOCS / "evidence.md").read_text()
    for path in RESULTS.glob("*.csv"):
        assert f"`{path.name}`" in text, path.name
    scripts = re.findall(r"`python (benchmarks/\S+)`", text)
    assert scripts
    for script in scripts:
        assert Path(script).stem in (ROOT / script).read_text(), script  # the name of its results


def test_the_bytes_of_the_memory_page_are_those_of_the_results():
    with (RESULTS / "optimizer_memory.csv").open() as file:
        rows = {row["optimizer"]: row for row in csv.DictReader(file) if row["size"] == "1b"}
    shown = re.findall(
        r"^\| `([^`]+)`[^|]*\| ([\d.]+) \| −([\d.]+) % \|", (DOCS / "memory.md").read_text(), re.MULTILINE
    )
    assert len(shown) == 6
    for options, bytes_per_parameter, below in shown:
        row = rows["StableSPAM " + options.replace("rank=512", "rank=hidden/4").replace(",", " ")]
        assert f"{float(row['state_bytes_per_parameter']):.2f}" == bytes_per_parameter
        assert f"{100 * float(row['below_adamw']):.1f}" == below
