"""The report in real headless Chromium. The screenshots stay in `artifacts/`, for CI to keep."""

import os
import shutil
import time
from pathlib import Path

import pytest

from hf_stablespam.monitor.report import build as report

from .report_data import write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
ARTIFACTS = Path(__file__).parents[3] / "artifacts"
ATTACK = "<script>alert(1)<script>$$x^2$$<img src=x onerror=alert(2)>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no Chromium: apt-get install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for switch in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "hide-scrollbars",
        "window-size=1300,900",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A report on three runs, one of them with a hostile name and one of any Trainer."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder / "stable_spam", blocks=4),
        write_run(folder / "adamw", ours=False, seed=1),
        write_run(folder / ATTACK, seed=2),
    ]
    (runs[0] / "spikes.jsonl").write_text('{"step": 50, "name": "w"}\n{"step": 100, "name": "w"}\n')
    return report.write_report(runs, folder / "report.html")[0]


def emulate(browser, width=1300, dark=False, touch=False):
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": touch}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def open_report(browser, path, **screen):
    """Opens a report and waits until all diagrams are drawn; returns the seconds that took."""
    emulate(browser, **screen)
    start = time.perf_counter()
    browser.get(path.as_uri())
    while not browser.execute_script("return Bokeh.documents.some(d => d.is_idle)"):
        time.sleep(0.02)
        assert time.perf_counter() - start < 60, "the diagrams were never drawn"
    return time.perf_counter() - start


def complaints(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def renderers(browser, run=None):
    """Names and visibility of what is drawn, of one run or of all."""
    return browser.execute_script(
        """const [run] = arguments;
        return Bokeh.documents[0].roots().flatMap(root => root.renderers)
          .filter(r => r.tags[0] === "run" && (run === null || r.tags[1] === run))
          .map(r => [r.name, r.visible]);""",
        run,
    )


def keep_screenshot(browser, name):
    ARTIFACTS.mkdir(exist_ok=True)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    size = {"width": browser.execute_script("return innerWidth"), "height": height}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**size, "deviceScaleFactor": 1, "mobile": size["width"] < 600}
    )
    time.sleep(1)
    browser.save_screenshot(str(ARTIFACTS / name))


@pytest.mark.parametrize(
    ("name", "screen"),
    [
        ("light", {}),
        ("dark", {"dark": True}),
        ("phone", {"width": 390, "touch": True}),
    ],
)
def test_it_opens_and_shows_its_curves(browser, healthy, name, screen):
    open_report(browser, healthy, **screen)
    assert complaints(browser) == []
    drawn = [curve for curve, visible in renderers(browser) if visible]
    assert "stable_spam, validation" in drawn
    assert "adamw, training" in drawn
    assert "stable_spam, spike" in drawn
    painted = browser.execute_script(
        """return Bokeh.documents[0].roots().map(root => {
          const canvas = Bokeh.index.find_one(root).canvas_view.primary.canvas;
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return data.some((value, i) => i % 4 == 3 && value > 0); });"""
    )
    assert painted
    assert all(painted)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    keep_screenshot(browser, f"report-{name}.png")


def test_a_hostile_name_is_shown_and_not_executed(browser, healthy):
    open_report(browser, healthy)
    names = browser.execute_script("return [...document.querySelectorAll('nav button')].map(b => b.textContent)")
    assert names[2] == ATTACK
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    tooltip = hover_over_a_curve_of(browser, 2)
    assert ATTACK in tooltip
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert complaints(browser) == []


def hover_over_a_curve_of(browser, run):
    """Hides the other runs, moves the pointer to the middle of the loss curve, and returns what the tooltip says."""
    for other in range(3):
        if other != run:
            browser.find_element("css selector", f"nav button[data-run='{other}']").click()
    place = browser.execute_script(
        """const [run] = arguments, root = Bokeh.documents[0].roots()[0], view = Bokeh.index.find_one(root);
        const line = root.renderers.find(r => r.tags[1] === run), data = line.data_source.data;
        const i = Math.floor(data.x.length / 2), box = view.canvas_view.el.getBoundingClientRect();
        view.el.scrollIntoView({block: "center"});
        const now = view.canvas_view.el.getBoundingClientRect();
        return [now.x + view.frame.x_scale.compute(data.x[i]), now.y + view.frame.y_scale.compute(data.y[i])];""",
        run,
    )
    x, y = map(round, place)
    for offset in (-3, 0):
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x + offset, "y": y})
        time.sleep(0.3)
    return browser.execute_script(
        """const text = node => [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes]
            .map(child => child.nodeType === 3 ? child.textContent : text(child)).join(" ");
        return text(document.body);"""
    )


def test_a_run_can_be_hidden_and_shown_again(browser, healthy):
    open_report(browser, healthy)
    button = browser.find_element("css selector", "nav button[data-run='0']")
    for shown in (False, True):
        button.click()
        assert {visible for _, visible in renderers(browser, 0)} == {shown}
        assert {visible for _, visible in renderers(browser, 1)} == {True}
        heat_map = browser.find_element("css selector", "section[data-run='0']")
        assert heat_map.is_displayed() is shown
        assert button.get_attribute("aria-pressed") == str(shown).lower()


def test_the_theme_follows_the_system_and_the_button(browser, healthy):
    colors = """return [getComputedStyle(document.body).backgroundColor,
        Bokeh.documents[0].roots()[0].below[0].major_label_text_color]"""
    open_report(browser, healthy)
    light = browser.execute_script(colors)
    browser.find_element("id", "theme").click()
    dark = browser.execute_script(colors)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    open_report(browser, healthy, dark=True)
    assert browser.execute_script(colors) == dark


def test_zooming_along_the_steps_moves_all_diagrams(browser, healthy):
    open_report(browser, healthy)
    ranges = browser.execute_script(
        """const roots = Bokeh.documents[0].roots(); roots[0].x_range.start = 40; roots[0].x_range.end = 60;
        return roots.map(root => [root.x_range.start, root.x_range.end]);"""
    )
    assert len(ranges) > 5
    assert all(limits == [40, 60] for limits in ranges)


def test_a_finger_scrolls_the_page_instead_of_zooming(browser, healthy):
    active = """return Bokeh.documents[0].roots().flatMap(root => root.toolbar.tools)
        .filter(tool => tool.type === "BoxZoomTool" && tool.active).length"""
    open_report(browser, healthy, width=390, touch=True)
    assert browser.execute_script(active) == 0
    open_report(browser, healthy)
    assert browser.execute_script(active) > 0


def test_a_single_logged_step_is_seen(browser, tmp_path):
    folder = write_run(tmp_path / "run", rows=[{"step": 5, "loss": 2.0}])
    open_report(browser, report.write_report([folder], tmp_path / "report.html")[0])
    assert complaints(browser) == []
    assert len(renderers(browser)) == 4


def test_five_long_runs_open_in_three_seconds(browser, tmp_path):
    for i in range(5):
        write_run(tmp_path / "runs" / f"run{i}", steps=20_000, seed=i, blocks=4)
    (path,) = report.write_report([tmp_path / "runs"], tmp_path / "report.html")
    assert path.stat().st_size <= 6_000_000
    seconds = [open_report(browser, path)]
    while min(seconds) > 3 and len(seconds) < 4:
        seconds.append(open_report(browser, path))
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if min(seconds) > 3 and busy > 1.5:
        pytest.skip(f"took {min(seconds):.1f} s, but the machine is busy with {busy:.1f} processes per core")
    assert min(seconds) < 3
