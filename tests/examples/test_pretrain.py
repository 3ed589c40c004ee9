import json
import math

import pretrain
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPE = ["--model_size", "tiny", "--block_size", "16", "--max_eval_samples", "4"]
RUN = ["--max_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
QUIET = ["--report_to", "none", "--disable_tqdm", "True"]
STABLE_SPAM = ["--optim", "stable_spam", "--max_grad_norm", "0"]
EVERYTHING = [*STABLE_SPAM, "--four_bit", "int4", "--gradient_norms", "--record_spikes", "--reset_every", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "data.txt"
    path.write_text("".join(f"line {i}: {i} times {i + 1} is {i * (i + 1)}, and that is it\n" for i in range(400)))
    return ["--dataset_name", str(path), "--validation_documents", "20", "--vocab_size", "300"]


def train(output, *options):
    """Runs the script in this process; returns the log history."""
    pretrain.main(["--output_dir", str(output), *SHAPE, *RUN, *QUIET, *options])
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def values(history, key):
    return [row[key] for row in history if key in row]


@pytest.fixture(scope="module")
def four_bit_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "four_bit"
    return output, train(output, *EVERYTHING, "--eval_strategy", "steps", "--eval_steps", "1")


def test_the_embedded_data_trains_in_four_bits(four_bit_run):
    _, history = four_bit_run
    losses = values(history, "loss")
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert len(values(history, "eval_loss")) >= 3
    assert values(history, "eval_loss")[-1] < values(history, "eval_loss")[0]


def test_smoke_makes_a_few_steps_of_whatever_was_asked_for(tmp_path, text):
    mixture = ["--model_size", "moe-tiny", "--four_bit", "int4", *STABLE_SPAM]
    length = ["--block_size", "16", "--max_steps", "300"]
    pretrain.main(["--output_dir", str(tmp_path), *length, *mixture, *QUIET, *text, "--smoke"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["four_bit_training"]["weight"]) == ("qwen3_moe", "int4")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert len(values(state["log_history"], "loss")) == 2


def test_perplexity_is_logged_beside_every_validation_loss(four_bit_run):
    _, history = four_bit_run
    for row in history:
        if "eval_loss" in row:
            assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    assert values(history, "eval_perplexity")


def test_the_metrics_are_saved(four_bit_run):
    output, _ = four_bit_run
    metrics = json.loads((output / "all_results.json").read_text())
    assert {"eval_loss", "eval_perplexity", "train_loss", "train_tokens_per_second"} <= set(metrics)
    assert metrics["train_tokens_per_second"] > 0


def test_the_saved_model_is_an_ordinary_llama(four_bit_run):
    output, _ = four_bit_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


def test_gradient_norms_and_resets_are_logged(four_bit_run):
    _, history = four_bit_run
    norms, stable = values(history, "gradients/norm"), values(history, "gradients/stable_norm")
    assert len(norms) == len(stable) == 3
    assert all(norm > 0 for norm in norms + stable)
    assert values(history, "momentum/resets") == [0, 1, 0]


def test_resuming_is_exact(tmp_path, text):
    options = [*EVERYTHING, *text, "--max_steps", "20", "--save_steps", "10", "--lr_scheduler_type", "cosine"]
    train(tmp_path / "straight", *options)
    checkpoint = tmp_path / "straight" / "checkpoint-10"
    train(tmp_path / "resumed", *options, "--resume_from_checkpoint", str(checkpoint))
    straight, resumed = (tmp_path / name / "checkpoint-20" for name in ("straight", "resumed"))
    assert_equal(load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors"))
    assert_equal(*(torch.load(folder / "optimizer.pt", weights_only=True) for folder in (straight, resumed)))


def assert_equal(left, right):
    """Equal to the last bit, through dicts and lists."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_equal(*pair)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_last_names_the_newest_checkpoint(tmp_path, text):
    train(tmp_path, *text, "--save_steps", "1")
    history = train(tmp_path, *text, "--resume_from_checkpoint", "last", "--max_steps", "4")
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4]


def test_a_stream_trains(tmp_path, text):
    history = train(tmp_path, *text, *STABLE_SPAM, "--streaming")
    assert len(values(history, "loss")) == 3
    assert values(history, "eval_loss")


@pytest.mark.parametrize(
    ("size", "millions"),
    [("tiny", 1.3), ("9m", 9), ("20m", 20), ("60m", 58), ("130m", 134), ("350m", 368), ("1b", 1339)],
)
def test_the_sizes_are_those_of_their_names(size, millions):
    class Vocabulary:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return 2048 if size == "tiny" else 32_000

    with torch.device("meta"):
        model = pretrain.llama(size, Vocabulary(), 256)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_help_lists_the_optimizer(capsys):
    with pytest.raises(SystemExit) as end:
        pretrain.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "stable_spam" in shown
    assert "--four_bit" in shown


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--streaming"], ValueError, "streaming needs --dataset_name"),
        (["--streaming", "--dataset_name", "x", "--max_steps", "-1"], ValueError, "streaming needs --max_steps"),
        (["--tokenizer_name", "t5-base"], ValueError, "tokenizer_name needs --dataset_name"),
        (["--max_eval_samples", "0"], ValueError, "max_eval_samples must be at least 1, got 0"),
        (["--four_bit", "int5"], ValueError, "int4"),
        (["--four_bit", "int4", "--four_bit_group_size", "0"], ValueError, "group_size"),
        (["--reset_every", "0"], ValueError, "every"),
        (["--resume_from_checkpoint", "last"], FileNotFoundError, "which has none"),
        (["--vocab_size", "100"], ValueError, "vocab_size must be at least 257"),
        (["--optim", "stable_spam", "--optim_args", "gamma9=1"], ValueError, "unknown option 'gamma9'"),
        (["--optim", "stable_spam", "--optim_args", "clip_beta=1.5"], ValueError, "clip_beta"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_errors_before_any_training(tmp_path, options, error, message, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.training_step", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        train(tmp_path, *options)


def test_an_unknown_size_names_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, "--model_size", "7b")
    message = capsys.readouterr().err
    assert all(size in message for size in pretrain.SHAPES)


def test_the_perplexity_of_a_diverged_run_is_infinite():
    assert pretrain.perplexity(1e4) == math.inf
    assert pretrain.perplexity(0.0) == 1.0
