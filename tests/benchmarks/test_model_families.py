"""The table of model families: a few of its rows again, and that the page says what the file says."""

import csv

import pytest

pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
from benchmarks import model_families as families


@pytest.mark.parametrize(
    ("name", "task", "outcome"),
    [
        ("Qwen3ForCausalLM", "causal", families.PLAIN),
        ("BertForMaskedLM", "masked", families.PLAIN),
        ("MixtralForCausalLM", "causal", families.PLAIN),
        ("AriaTextForCausalLM", "causal", families.PLAIN),  # experts in a file layout of its own
        ("MambaForCausalLM", "causal", families.PLAIN),  # some layers are not called
        ("Llama4ForCausalLM", "causal", families.PLAIN),  # experts that transformers takes apart
        ("OlmoHybridForCausalLM", "causal", families.PLAIN),  # a convolution in three pieces
        ("NeoMMEForMaskedLM", "masked", families.DEQUANTIZED),  # tied projections
        ("RwkvForCausalLM", "causal", families.DEQUANTIZED),
        ("GPT2LMHeadModel", "causal", families.NO_LAYER),
    ],
)
def test_rows_are_repeated(name: str, task: str, outcome: str) -> None:
    if int(families.transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the table is that of transformers 5")
    assert families.try_family(name, task).outcome == outcome
    row = next(row for row in rows() if row["model"] == name)
    assert row["outcome"] == outcome


def test_the_page_says_what_the_file_says() -> None:
    assert families.PAGE.read_text().split(families.BEGIN)[1].strip() == families.page(rows()).strip()


def rows() -> list[dict[str, str]]:
    with families.CSV.open(newline="") as file:
        return list(csv.DictReader(file))
