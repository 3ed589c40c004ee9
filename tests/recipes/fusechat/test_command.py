"""`hf-stablespam fuse`: files in, data sets out, and errors that name the line."""

import gzip
import json
import sys

import pytest
from datasets import Dataset, load_from_disk

from hf_stablespam.__main__ import main
from hf_stablespam.recipes.fusechat import build_preference_dataset, fusion_report
from tests.recipes.fusechat.test_preferences import row

ROWS = [row(f"p{i}", 0.1 + i / 1000 + gap, source) for i in range(10) for source in "AB" for gap in (0.0, 0.05)]


@pytest.fixture
def fuse(monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder; gives status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-stablespam", "fuse", *arguments])
        return (main(), *capsys.readouterr())

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_files_become_what_python_would_make_of_their_rows(fuse, tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:20])
    Dataset.from_list(ROWS[20:]).to_parquet(tmp_path / "b.parquet")
    status, out, _ = fuse("a.jsonl", "b.parquet", "-o", "data", "--min-gap", "0.02", "--max-gap", "none", "--seed", "3")
    assert status == 0
    expected = build_preference_dataset(ROWS, min_gap=0.02, max_gap=None, seed=3)
    data = load_from_disk(tmp_path / "data")
    for part in ("sft", "dpo"):
        assert data[part].to_list() == expected[part].to_list()
    assert json.loads((tmp_path / "data" / "fusion_report.json").read_text()) == fusion_report(expected)
    assert "what each source gave" in out
    status, _, err = fuse("a.jsonl", "-o", "data")
    assert (status, err) == (1, "error: output must be a new or an empty folder, got 'data'; give another one\n")


def test_an_empty_part_can_be_loaded(fuse, tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    assert fuse("a.jsonl", "-o", "data", "--sft-fraction", "0")[0] == 0
    data = load_from_disk(tmp_path / "data")
    assert (len(data["sft"]), len(data["dpo"])) == (0, 10)


def test_messages_with_keys_of_their_own_stay_what_they_are(fuse, tmp_path):
    calls = [{"name": "add", "arguments": {"a": 1}}]
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b", "tool_calls": calls}]]
    write(tmp_path / "a.jsonl", [row(chat, reward, response=str(reward)) for chat in chats for reward in (0.1, 0.15)])
    assert fuse("a.jsonl", "-o", "data", "--sft-fraction", "0.5")[0] == 0
    data = load_from_disk(tmp_path / "data")
    assert sorted([data["sft"][0]["prompt"], data["dpo"][0]["prompt"]], key=str) == sorted(chats, key=str)
    assert data["dpo"][0]["chosen"] == [{"role": "assistant", "content": "0.15"}]


@pytest.mark.parametrize("chat", [False, True])
def test_texts_that_look_like_dates_stay_texts(fuse, tmp_path, chat):
    rows = [
        row(prompt, reward, response=day)
        for prompt in "xyz"
        for day, reward in (("2024-01-05", 0.1), ("1999-12-31", 0.15))
    ]
    if chat:
        rows = [{**each, "response": [{"role": "assistant", "content": each["response"]}]} for each in rows]
        rows = [{**each, "prompt": [{"role": "user", "content": "2020-02-02"}]} for each in rows]
    write(tmp_path / "a.jsonl", rows)
    fraction = 0 if chat else 0.4
    assert fuse("a.jsonl", "-o", "data", "--sft-fraction", str(fraction))[0] == 0
    data, expected = load_from_disk(tmp_path / "data"), build_preference_dataset(rows, sft_fraction=fraction)
    assert {part: data[part].to_list() for part in data} == {part: expected[part].to_list() for part in expected}
    assert "1999-12-31" in str(data["dpo"][0])


def test_lines_need_neither_the_same_keys_nor_the_same_kind_of_number(fuse, tmp_path):
    rows = [row("p", 1), row("p", 0.95), row("q", 1, note="x"), row("q", 0.95)]
    lines = [json.dumps(each) for each in rows]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n\n".join(lines).encode("utf-8-sig")))
    assert fuse("a.jsonl.gz", "-o", "data", "--sft-fraction", "0")[0] == 0
    assert load_from_disk(tmp_path / "data")["dpo"]["chosen_reward"][:] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p"}\n{"prompt": \n', "a.jsonl: line 2 must be a JSON object (Expecting value"),
        ("[1, 2]\n", "a.jsonl: line 1 must be a JSON object, got '[1, 2]'; write one for each answer"),
        ("", "a.jsonl: the file must have at least one line, it is empty"),
        ('{"prompt": "p", "answer": "x"}\n', "responses must have a column 'response', its columns are"),
        (
            json.dumps(row("p", 0.1)) + "\n" + json.dumps(row([{"role": "user", "content": "p"}], 0.2)) + "\n",
            "'prompt' must have values of one kind in all rows",
        ),
        (json.dumps(row("p", 0.1)) + "\n" + json.dumps(row("p", "good")) + "\n", "row 1 has 'good'"),
        (
            json.dumps(row("p", 0.1)) + "\n" + json.dumps(row("p", float("nan"))) + "\n",
            "'reward' must be a finite number in every row, row 1 has nan",
        ),
    ],
)
def test_what_cannot_be_read(fuse, tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    status, _, err = fuse("a.jsonl", "-o", "data")
    assert status == 1
    assert message in err
    assert not (tmp_path / "data").exists()


def test_a_file_in_another_encoding(fuse, tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert "a.jsonl: the file must be text in UTF-8" in fuse("a.jsonl", "-o", "data")[2]


def test_a_file_that_is_not_there(fuse):
    status, _, err = fuse("none.jsonl", "-o", "data")
    assert (status, err.startswith("error: RESPONSES must be files of JSON lines or Parquet, got none.jsonl")) == (
        1,
        True,
    )
