import json
from itertools import chain

import datasets
import pytest
import text_data

DOCUMENTS = [f"document {i}: the value of x is {i * 17 % 29}\n" * 4 for i in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in DOCUMENTS))
    return path


def load(path, **options):
    return text_data.load_text_data(
        str(path), **{"vocab_size": 300, "block_size": 16, "validation_documents": 4} | options
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_blocks_are_the_documents_joined_and_cut(jsonl, streaming):
    train, validation, tokenizer = load(jsonl, streaming=streaming)
    rows = list(train)
    assert set(rows[0]) == {"input_ids", "labels"}
    assert all(len(row["input_ids"]) == 16 and row["labels"] == row["input_ids"] for row in rows)
    text = tokenizer.decode(list(chain.from_iterable(row["input_ids"] for row in rows)))
    pieces = text.split(tokenizer.eos_token)[:-1]
    assert len(pieces) >= 34
    assert set(pieces) <= set(DOCUMENTS)
    assert len(list(validation)) >= 4


def test_a_stream_gives_the_same_blocks_each_time(jsonl):
    first, second = (list(load(jsonl, streaming=True)[0]) for _ in range(2))
    assert first == second


def test_held_out_documents_are_not_trained_on(jsonl):
    for streaming in (False, True):
        train, validation, tokenizer = load(jsonl, streaming=streaming)
        texts = [
            tokenizer.decode(list(chain.from_iterable(row["input_ids"] for row in part)))
            for part in (train, validation)
        ]
        trained, held_out = (set(text.split(tokenizer.eos_token)[1:-1]) for text in texts)
        assert trained
        assert held_out
        assert not trained & held_out


def test_a_folder_with_its_own_splits(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text(f"this is a line of {name}\n" * 50)
    train, validation, tokenizer = load(tmp_path)
    assert "line of train" in tokenizer.decode(train[0]["input_ids"])
    assert "line of validation" in tokenizer.decode(validation[1]["input_ids"] + validation[2]["input_ids"])


def test_a_named_tokenizer_is_used(jsonl, tmp_path):
    _, _, trained = load(jsonl, vocab_size=270)
    trained.save_pretrained(tmp_path / "tokenizer")
    _, _, loaded = load(jsonl, tokenizer_name=str(tmp_path / "tokenizer"), vocab_size=999)
    assert loaded.get_vocab() == trained.get_vocab()


def test_an_unknown_column(jsonl):
    with pytest.raises(ValueError, match=r"text_column must be one of .*'text', 'url'.* got 'content'"):
        load(jsonl, text_column="content")


def test_an_unknown_kind_of_file(tmp_path):
    path = tmp_path / "data.xml"
    path.write_text("<a/>")
    with pytest.raises(ValueError, match=r"dataset_name must be a file ending in \.txt, .*got .*data\.xml"):
        load(path)


def test_a_data_set_without_a_training_split(tmp_path):
    (tmp_path / "test.txt").write_text("a line\n")
    with pytest.raises(ValueError, match=r"must have a split called train, this one has \['test'\]"):
        load(tmp_path)


def test_a_data_set_of_one_document(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a line\n")
    with pytest.raises(ValueError, match="at least 2 documents"):
        load(path)
