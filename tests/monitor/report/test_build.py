import re
from html import unescape

import pytest

from hf_stablespam.monitor.report import build as report

from .report_data import write_run

ATTACK = "<script>alert(1)<script>"


def test_the_command_writes_one_file_and_says_which(tmp_path, capsys):
    write_run(tmp_path / "runs" / "adamw")
    output = tmp_path / "out" / "report.html"
    assert report.main([str(tmp_path / "runs"), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_the_file_needs_no_network(tmp_path):
    (path,) = report.write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    html = path.read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=", html)
    assert "default-src 'none'" in unescape(html)


def test_names_and_settings_are_escaped(tmp_path):
    folder = write_run(tmp_path / ATTACK)
    (folder / "config.json").write_text('{"model_type": "<img src=x onerror=alert(2)>"}')
    html = report.write_report([folder], tmp_path / "report.html")[0].read_text()
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in html
    assert "<img" not in html
    assert "&lt;img src=x onerror=alert(2)&gt;" in html


def test_png_writes_each_diagram(tmp_path, capsys):
    write_run(tmp_path / "a $x$", blocks=2)
    write_run(tmp_path / "b", ours=False)
    runs = [str(tmp_path / "a $x$"), str(tmp_path / "b")]
    assert report.main([*runs, "-o", str(tmp_path / "report.html"), "--png"]) == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        f"report-{key}.png" for key in ("loss", "perplexity", "gradient_norm", "clipped", "learning_rate", "blocks-1")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_a_run_that_logged_nothing(tmp_path, capsys):
    folder = write_run(tmp_path / "silent", rows=[])
    assert report.main([str(folder), "-o", str(tmp_path / "report.html")]) == 1
    assert "error: each run must have logged something, silent has not" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "which has none; the Trainer writes one"), ('{"log_hist', "broken or truncated")],
    ids=["no run", "truncated"],
)
def test_errors_are_one_line_and_no_traceback(tmp_path, capsys, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "trainer_state.json").write_text(content)
    assert report.main([str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


HUGE = "9" * 400  # an integer that no float holds


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("spikes.jsonl", '{"step": 2, "tensor": "w", "score": "high"}\n{"step": 2, "tensor": "v", "score": 12.5}\n'),
        ("spikes.jsonl", f'{{"step": 2, "tensor": "w", "score": {HUGE}}}\n{{"step": {HUGE}, "tensor": "v"}}\n'),
        ("spikes.jsonl", f'{{"step": {HUGE * 20}}}\n{"[" * 100_000}\n'),
        ("trainer_state.json", f'{{"log_history": [{{"step": 1, "loss": {HUGE}, "lr": 1}}, {{"step": {HUGE}}}]}}'),
        ("config.json", '"model_type"'),
        ("config.json", "[1]"),
    ],
    ids=["a score in words", "huge numbers", "unreadable lines", "huge logs", "a string", "a list"],
)
def test_what_is_damaged_beside_the_logs_is_done_without(tmp_path, name, content):
    folder = write_run(tmp_path / "run", steps=5)
    (folder / name).write_text(content)
    assert report.main([str(folder), "-o", str(tmp_path / "report.html")]) == 0


def test_an_integer_that_python_does_not_read_is_an_error_in_words(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(f'{{"log_history": [{{"step": {HUGE * 20}}}]}}')
    assert report.main([str(tmp_path)]) == 1
    assert "must be valid JSON, it is broken or truncated" in capsys.readouterr().err


def test_without_bokeh_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hf_stablespam.monitor.report.bokeh_figures", None)
    monkeypatch.delattr("hf_stablespam.monitor.report.bokeh_figures", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hf_stablespam\[report\]'"):
        report.write_report([write_run(tmp_path / "run")], tmp_path / "report.html")


def test_five_long_runs_stay_below_the_limit(tmp_path):
    for i in range(5):
        write_run(tmp_path / "runs" / f"run{i}", steps=20_000, seed=i, blocks=24 if i == 0 else 0)
    (path,) = report.write_report([tmp_path / "runs"], tmp_path / "report.html")
    assert path.stat().st_size <= report.LARGEST


def test_a_report_that_would_be_too_large_is_thinned(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=3000)
    full = report.write_report([folder], tmp_path / "full.html")[0].stat().st_size
    monkeypatch.setattr(report, "LARGEST", full - 20_000)
    assert report.write_report([folder], tmp_path / "thin.html")[0].stat().st_size <= full - 20_000


@pytest.mark.parametrize("png", [False, True])
def test_a_disk_that_is_full_leaves_the_report_of_before(tmp_path, monkeypatch, capsys, png):
    run, output = write_run(tmp_path / "run"), tmp_path / "out" / "report.html"
    report.write_report([run], output, png)
    before = {path: path.read_bytes() for path in output.parent.iterdir()}

    def write_half(self, data, *args, **kwargs):
        self.write_bytes(data.encode()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(output), "write_text", write_half)
    assert report.main([str(run), "-o", str(output), *(["--png"] if png else [])]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before
