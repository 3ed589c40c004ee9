"""Every fenced block of every page does what it says, on tiny data."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from sybil import Example
from sybil.evaluators.python import PythonEvaluator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import hf_stablespam
from hf_stablespam import GradientNormCallback
from tests.docs.commands import Shell, accelerate_as_found, commands_of
from tests.docs.pages import PAGES, ROOT, UnknownLanguageError, parsed
from tests.quant.export.gguf.models import byte_level_tokenizer, tiny
from tests.recipes.llasa.released import write_codec_and_listeners
from tests.trainer.helpers import VOCABULARY, RandomTokens, arguments, tiny_llama

WITH_BLOCKS = [page for page in PAGES if "```" in page.read_text()]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<eos>"
    )


def small_llama() -> LlamaForCausalLM:
    """With 128 inputs everywhere, so that the default group fits and the model can be packed."""
    return tiny_llama(hidden_size=128, intermediate_size=128)


def names_that_a_reader_has() -> dict[str, object]:
    """What every page takes for granted: a model, data, arguments, and what a reader imports without being told."""
    model = small_llama()
    args = arguments("out", max_steps=10, save_strategy="steps", save_steps=5, max_grad_norm=0.0)
    data = RandomTokens(rows=16)
    return {
        **{"model": model, "dataset": data, "data": data, "args": args, "training_args": args, "torch": torch},
        **{"tokenizer": tiny_tokenizer(), "Trainer": Trainer, "TrainingArguments": TrainingArguments},
        **{name: getattr(hf_stablespam, name) for name in hf_stablespam.__all__},
        "trainer": Trainer(model, args, train_dataset=data),
    }


def train_a_run(output_dir: str, **options: object) -> None:
    args = arguments(output_dir, max_steps=4, save_strategy="steps", save_steps=2, **options)
    Trainer(small_llama(), args, train_dataset=RandomTokens(), callbacks=[GradientNormCallback()]).train()


def two_runs() -> None:
    train_a_run("runs/adamw", optim="adamw_torch")
    train_a_run("runs/stable_spam")


def a_run_of_adamw() -> None:
    train_a_run("out", optim="adamw_torch")


def a_four_bit_run() -> None:
    """A model and the state of its run, as the quick start leaves them."""
    args = arguments("out")
    trainer = Trainer(small_llama(), args, train_dataset=RandomTokens(), callbacks=[hf_stablespam.FourBitCallback()])
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def a_saved_model() -> None:
    small_llama().save_pretrained("path/to/model")
    tiny_tokenizer().save_pretrained("path/to/model")


def a_run_to_serve() -> None:
    """A model in 4 bits, with a tokenizer that llama.cpp knows."""
    config = hf_stablespam.FourBitConfig(weight="int4", activation=None, group_size=32)
    args = arguments("run", max_steps=2)
    callbacks = [hf_stablespam.FourBitCallback(config)]
    trainer = Trainer(
        tiny(), args, train_dataset=RandomTokens(), processing_class=byte_level_tokenizer(), callbacks=callbacks
    )
    trainer.train()
    trainer.save_model()


def a_script() -> None:
    shutil.copy(ROOT / "examples" / "plain_trainer.py", "train.py")


def listeners_and_a_codec() -> None:
    write_codec_and_listeners(Path("path/to"))


# What must lie in the folder before the first block of a page.
BEFORE = {
    "distributed.md": a_script,
    "README.md": a_script,
    "fine_tuning.md": a_saved_model,
    "model_card.md": a_four_bit_run,
    "report.md": two_runs,
    "serving.md": a_run_to_serve,
    "rescue.md": a_run_of_adamw,
    "llasa.md": listeners_and_a_codec,
}


def run_commands(example: Example) -> None:
    for command in commands_of(example.parsed):
        with pytest.MonkeyPatch.context() as patch:
            Shell(patch).run(command)


def check_configuration(example: Example) -> None:
    """A configuration is one of the files in examples/configs, which tests/examples/test_configs.py loads for real."""
    shipped = [yaml.safe_load(path.read_text()) for path in (ROOT / "examples" / "configs").iterdir()]
    assert yaml.safe_load(example.parsed) in shipped  # JSON is YAML


def check_model_card(example: Example) -> None:
    card = ModelCard(example.parsed, ignore_metadata_errors=False)
    assert card.data.library_name == "transformers"
    assert "stable-spam" in card.data.tags


def check_citation(example: Example) -> None:
    """An entry says what CITATION.cff says."""
    fields = dict(re.findall(r"^  (\w+) *= \{(.*)\},?$", example.parsed, re.MULTILINE))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    if "eprint" in fields:
        names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
        assert fields["author"].split(" and ") == names
        assert (fields["title"], int(fields["year"])) == (paper["title"], paper["year"])
        assert f"arXiv:{fields['eprint']}" == paper["identifiers"][0]["value"]
    else:
        assert fields["title"].startswith(citation["title"])
        assert fields["version"] == citation["version"] == hf_stablespam.__version__


EVALUATORS = {
    "python": PythonEvaluator(),
    "bash": run_commands,
    "json": check_configuration,
    "yaml": check_configuration,
    "markdown": check_model_card,
    "bibtex": check_citation,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in which the repository's paths lead to the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    for name in ("examples", "benchmarks"):
        Path(name).symlink_to(ROOT / name)
    with accelerate_as_found():
        yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, folder):
    BEFORE.get(page.name, lambda: None)()
    document = parsed(page, EVALUATORS)
    document.namespace.update(names_that_a_reader_has())
    examples = list(document.examples())
    assert len(examples) == len(re.findall(r"^ *```\w", page.read_text(), re.MULTILINE))
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```perl\nprint 1\n```", UnknownLanguageError),
        ("```\nplain\n```", UnknownLanguageError),
        ("```python\nFourBitConfig(wieght='int4')\n```", TypeError),
        ("```bash\npython examples/pretrain.py --output_dir x --optimm stable_spam\n```", ValueError),
        ("```bash\npython examples/nowhere.py\n```", AssertionError),
        ("```bash\npython -m hf_stablespam --four-bits int4 examples/plain_trainer.py\n```", SystemExit),
        ("```bash\ntorchrun --nproc_per_nodes 2 examples/pretrain.py ...\n```", SystemExit),
        ("```bash\naccelerate launch --config_file examples/configs/none.yaml examples/pretrain.py ...\n```", OSError),
        ("```bash\nmake coffee\n```", AssertionError),
        ("```bash\npip install 'hf_stablespam[everything]'\n```", AssertionError),
        ("```bash\nhf-stablespam report RUN [-o OUTPUT] [--jpg]\n```", AssertionError),
        ("```bash\nrm -rf out\n```", AttributeError),
        ('```json\n{"version": 3}\n```', AssertionError),
        ("```bibtex\n@misc{x,\n  title = {Another},\n  version = {1}\n}\n```", AssertionError),
    ],
    ids=lambda value: value.splitlines()[1] if isinstance(value, str) else "",
)
def test_a_wrong_block_is_noticed(block, error, folder, capsys):
    page = folder / "page.md"
    page.write_text(f"# Page\n\n{block}\n")
    (example,) = parsed(page, EVALUATORS).examples()
    example.namespace["FourBitConfig"] = hf_stablespam.FourBitConfig
    with pytest.raises(error):
        example.evaluate()
