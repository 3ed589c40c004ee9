import json
import sysconfig
from pathlib import Path

import corpus
import numpy as np
import pytest
import torch

TEXTS = [(f"module_{i}.py", f"def f_{i}(x):\n    return x * {i} + {i * i}\n" * 5) for i in range(60)]


def build(folder, documents=TEXTS, vocab_size=300):
    return corpus.load_documents(documents, vocab_size, folder)


def test_the_documents_are_the_library_without_tests_and_tables():
    names = [name for name, _ in corpus.standard_library_documents()]
    assert {"argparse.py", "json/decoder.py", "email/message.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "encodings", "__pycache__"}
    assert len(names) == len(set(names)) > 300
    assert not any(name.startswith("_sysconfigdata") for name in names)


def test_the_documents_hold_the_text_of_the_files():
    name, text = next(corpus.standard_library_documents())
    assert text == Path(sysconfig.get_paths()["stdlib"], name).read_text(encoding="utf-8")


def test_two_builds_are_equal(tmp_path):
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.validation, second.validation)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def test_the_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = build(tmp_path)
    monkeypatch.setattr(corpus, "_build", lambda *_: pytest.fail("built again"))
    second = build(tmp_path)
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.validation, second.validation)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "other",
    [
        {"vocab_size": 310},
        {"documents": [*TEXTS[:-1], (TEXTS[-1][0], TEXTS[-1][1] + "#")]},
        {"documents": [*TEXTS[:-1], ("renamed.py", TEXTS[-1][1])]},
    ],
    ids=["vocabulary", "text", "name"],
)
def test_what_differs_has_its_own_cache(tmp_path, other):
    build(tmp_path)
    build(tmp_path, **other)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("file", ["train.npy", "validation.npy", "tokenizer.json"])
def test_a_damaged_cache_is_built_again(tmp_path, file, caplog):
    first = build(tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / file).write_bytes((folder / file).read_bytes()[:20])
    second = build(tmp_path)
    assert "could not be read" in caplog.text
    assert np.array_equal(first.train, second.train)
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def test_a_cache_that_another_process_wrote_first_is_kept(tmp_path):
    first = build(tmp_path)
    (folder,) = tmp_path.iterdir()
    corpus._write(first, folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_tokens_are_the_text(tmp_path):
    built = build(tmp_path)
    train = [text for name, text in TEXTS if not corpus.is_validation(name)]
    assert built.tokenizer.decode(built.train) == "".join(text + corpus.END_OF_TEXT for text in train)


def test_the_vocabulary_knows_every_byte(tmp_path):
    text = "naïve ∑ 混ざった \x00\x7f 🙂"
    tokenizer = build(tmp_path).tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_split_is_by_name():
    assert corpus.is_validation("traceback.py")
    assert not corpus.is_validation("argparse.py")
    share = np.mean([corpus.is_validation(f"package/module_{i}.py") for i in range(10_000)])
    assert share == pytest.approx(corpus.VALIDATION_SHARE, abs=0.01)


def test_blocks_follow_each_other_and_are_their_own_labels():
    blocks = corpus.TokenBlocks(np.arange(11, dtype=np.uint16), 4)
    assert len(blocks) == 2
    assert torch.equal(blocks[1]["input_ids"], torch.tensor([4, 5, 6, 7]))
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])


def test_evenly_spaced_takes_from_everywhere():
    blocks = corpus.TokenBlocks(np.arange(22, dtype=np.uint16), 2)
    sample = corpus.evenly_spaced(blocks, 3)
    assert [item["input_ids"][0].item() for item in sample] == [0, 10, 20]
    assert corpus.evenly_spaced(blocks, 50) is blocks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corpus.load_documents(TEXTS, 256), "vocab_size must be at least 257"),
        (lambda: corpus.TokenBlocks(np.arange(9), 1), "block_size must be at least 2 tokens, got 1"),
        (lambda: corpus.TokenBlocks(np.arange(9), 10), "at most the number of tokens, 9, got 10"),
        (lambda: corpus.evenly_spaced(corpus.TokenBlocks(np.arange(9), 2), 0), "at least 1, got 0"),
    ],
    ids=["vocabulary", "block too short", "block too long", "no blocks"],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_python_without_sources_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(corpus, "standard_library_documents", lambda: iter([("a.py", "x = 1")]))
    with pytest.raises(FileNotFoundError, match=r"only 5 characters of source code; .* or give --dataset_name"):
        corpus.load_standard_library()
