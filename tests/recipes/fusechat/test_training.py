"""Both stages on a tiny target: the first loss, adapters, 4 bits, the export, going on after a kill."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_stablespam import FourBitConfig, FourBitLinear, StableSPAM
from hf_stablespam.recipes.fusechat import paper_settings, train_target
from hf_stablespam.recipes.fusechat.reference import check_reference
from tests.recipes.fusechat.helpers import preferences, target, tokenizer

trl = pytest.importorskip("trl", minversion="1.14", reason="TRL 1.14 or newer is not installed; extra 'fusechat'")

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "fusechat_selection.json").read_text())
FOUR_BIT = FourBitConfig(group_size=16)
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
QUIET = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 32, "logging_steps": 1}
QUIET |= {"use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False, "warmup_steps": 0}


def settings(folder, sft=None, dpo=None):
    first = {**QUIET, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", **(sft or {})}
    second = {**QUIET, "max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no", **(dpo or {})}
    return paper_settings(folder, "Llama-3.2-1B", sft=first, dpo=second)


class Seen(TrainerCallback):
    """What the Trainers were: kept on the class, because each stage gets a copy of its own."""

    optimizers: list = []  # noqa: RUF012
    converted: list = []  # noqa: RUF012

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others):
        self.optimizers.append(getattr(optimizer, "optimizer", optimizer))
        self.converted.append(any(isinstance(module, FourBitLinear) for module in model.modules()))


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("four_bit", [None, FOUR_BIT], ids=["float32", "int4"])
def test_both_stages_from_the_answers_to_the_packed_model(tmp_path, four_bit, adapter):
    Seen.optimizers.clear()
    Seen.converted.clear()
    model = target(hidden_size=32, intermediate_size=32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sft_args, dpo_args = settings(tmp_path)
    options = {"four_bit": four_bit, "peft_config": adapter, "export": four_bit is not None, "callbacks": [Seen()]}
    trained = train_target(model, tokenizer(), preferences(), sft_args, dpo_args, **options)
    assert [type(optimizer) for optimizer in Seen.optimizers] == [StableSPAM, StableSPAM]
    assert Seen.converted == [four_bit is not None] * 2
    # DPO begins where policy and reference are the same function.
    losses = [row["loss"] for row in history(tmp_path / "dpo") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] != losses[0]
    after_sft = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    after_dpo = trained.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert set(after_dpo) == set(before)
    assert not torch.equal(before[name], after_sft[name])
    assert not torch.equal(after_sft[name], after_dpo[name])
    assert (tmp_path / "dpo" / "report_tables.json").exists()
    if four_bit is not None:
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo" / "4bit", dtype=torch.float32)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.allclose(packed(ids).logits, trained.bfloat16().float()(ids).logits, atol=0.1)


def test_a_reference_of_another_precision_is_refused(tmp_path):
    from hf_stablespam import convert_to_4bit

    _, dpo_args = settings(tmp_path)
    policy = convert_to_4bit(target(hidden_size=32, intermediate_size=32), FOUR_BIT)
    # Of another 4-bit format: one in high precision may be converted while it is looked at, as FourBitCallback asks.
    other = FourBitConfig(weight="mxfp4", activation="mxfp4")
    reference = convert_to_4bit(target(hidden_size=32, intermediate_size=32), other)
    rows = {"train_dataset": preferences()["dpo"], "processing_class": tokenizer()}
    trainer = trl.DPOTrainer(policy, reference, dpo_args, **rows)
    with pytest.raises(ValueError, match=r"must be ln 2 = 0.6931, got .*convert both to 4 bits"):
        check_reference(trainer)
    reference = convert_to_4bit(target(hidden_size=32, intermediate_size=32), FOUR_BIT)
    check_reference(trl.DPOTrainer(policy, reference, dpo_args, **rows))


def test_chat_messages_and_log_probabilities_of_the_reference_made_beforehand(tmp_path):
    sft_args, dpo_args = settings(tmp_path, dpo={"precompute_ref_log_probs": True})
    train_target(target(), tokenizer(chat=True), preferences(chat=True), sft_args, dpo_args, four_bit=FOUR_BIT)
    losses = [row["loss"] for row in history(tmp_path / "dpo") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    class Kill(TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_step_end(self, args, state, control, **others):
            if "dpo" in args.output_dir and state.global_step == self.at:
                raise InterruptedError

    def run(folder, **options):
        sft_args, dpo_args = settings(folder, dpo={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
        return train_target(target(), tokenizer(), preferences(), sft_args, dpo_args, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "killed", callbacks=[Kill(3)])
    sft_weights = (tmp_path / "killed" / "sft" / "model.safetensors").stat().st_mtime_ns
    resumed = run(tmp_path / "killed", resume=True)
    assert (tmp_path / "killed" / "sft" / "model.safetensors").stat().st_mtime_ns == sft_weights
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    again = run(tmp_path / "killed", resume=True, callbacks=[Kill(1)])  # nothing is left to do
    assert torch.equal(again.lm_head.weight, whole.lm_head.weight)
    sft_args, dpo_args = settings(tmp_path / "killed")
    with pytest.raises(ValueError, match="was trained on another data set"):
        train_target(target(), tokenizer(), preferences(sft_fraction=0.6), sft_args, dpo_args, resume=True)


class KillIn(TrainerCallback):
    """Stops a run at the end of a step of one stage; says which stages begin, and at which step."""

    def __init__(self, stage=None, at=1):
        self.stage, self.at = stage, at

    def __deepcopy__(self, memo):
        return self

    def on_train_begin(self, args, state, control, **others):
        self.begun = [*getattr(self, "begun", []), (Path(args.output_dir).name, state.global_step)]

    def on_step_end(self, args, state, control, **others):
        if Path(args.output_dir).name == self.stage and state.global_step == self.at:
            raise InterruptedError


def run_in(folder, rate, seen, **options):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": rate}
    sft_args, dpo_args = settings(folder, sft=saving, dpo=saving)
    return train_target(
        target(), tokenizer(), preferences(), sft_args, dpo_args, callbacks=[seen], **options
    ).lm_head.weight


@pytest.mark.parametrize(("stage", "at"), [("sft", 1), ("sft", 3), ("dpo", 1), ("dpo", 3)])
def test_resume_goes_on_with_the_last_run_and_with_no_earlier_one(tmp_path, stage, at):
    """Neither with the stages that an earlier run has ended in the same folders, nor with its checkpoints."""
    first, expected = run_in(tmp_path / "twice", 1e-3, KillIn()), run_in(tmp_path / "once", 1e-1, KillIn())
    with pytest.raises(InterruptedError):
        run_in(tmp_path / "twice", 1e-1, KillIn(stage, at))
    seen = KillIn()
    resumed = run_in(tmp_path / "twice", 1e-1, seen, resume=True)
    assert torch.equal(resumed, expected)
    assert not torch.equal(resumed, first)
    from_checkpoint = 2 if at == 3 else 0
    assert seen.begun == ([("sft", from_checkpoint), ("dpo", 0)] if stage == "sft" else [("dpo", from_checkpoint)])


def test_other_settings_are_nothing_to_go_on_with(tmp_path):
    with pytest.raises(InterruptedError):
        run_in(tmp_path, 1e-3, KillIn("dpo", 3))
    with pytest.raises(ValueError, match=r"settings of the run in .*sft.* learning_rate was 0.001 and is 0.1; give"):
        run_in(tmp_path, 1e-1, KillIn(), resume=True)
    seen, more = KillIn(), {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    sft_args, dpo_args = settings(tmp_path, sft=more, dpo={**more, "beta": 3.0})
    with pytest.raises(ValueError, match=r"run in .*dpo, of which .*beta was 10.0 and is 3.0; give those, or another"):
        train_target(target(), tokenizer(), preferences(), sft_args, dpo_args, callbacks=[seen], resume=True)
    assert not hasattr(seen, "begun")


def test_an_adapter_and_4_bits_are_settings(tmp_path):
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(InterruptedError):
        run_in(tmp_path, 1e-3, KillIn("dpo", 3), peft_config=adapter, four_bit=FOUR_BIT)
    with pytest.raises(ValueError, match=r"four_bit was .* and is None"):
        run_in(tmp_path, 1e-3, KillIn(), peft_config=adapter, resume=True)
    seen = KillIn()
    run_in(tmp_path, 1e-3, seen, peft_config=adapter, four_bit=FOUR_BIT, resume=True)
    assert seen.begun == [("dpo", 2)]


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its folders and checkpoints do not say whose they are."""
    with pytest.raises(InterruptedError):
        run_in(tmp_path, 1e-3, KillIn("dpo", 3))
    for file in tmp_path.rglob("fusechat_run.json"):
        file.unlink()
    for file in tmp_path.rglob("trainer_state.json"):
        state = json.loads(file.read_text())
        state["stateful_callbacks"].pop("StageRun")
        file.write_text(json.dumps(state))
    seen = KillIn()
    run_in(tmp_path, 1e-3, seen, resume=True)
    assert seen.begun == [("dpo", 2)]


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_one_stage_alone(tmp_path, fraction):
    sft_args, dpo_args = settings(tmp_path)
    model = target(hidden_size=32, intermediate_size=32)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    data, options = preferences(sft_fraction=fraction), {"four_bit": FOUR_BIT, "export": True}
    trained = train_target(model, tokenizer(), data, sft_args, dpo_args, **options)
    stages = ("sft", "dpo") if fraction else ("dpo", "sft")
    assert [folder.parent.name for folder in tmp_path.rglob("4bit")] == [stages[0]]
    assert (tmp_path / stages[0] / "trainer_state.json").exists()
    assert not (tmp_path / stages[1] / "trainer_state.json").exists()
    assert not torch.equal(trained.lm_head.weight, start["lm_head.weight"])


def dpo_loss(sums, beta, normalised):
    """−log σ(β·(log π/π_ref of the chosen) − β·(… of the rejected)), each over its length if `normalised`."""
    margins = [
        (sums[f"{name}_logp"] - sums[f"ref_{name}_logp"]) / (sums[f"{name}_tokens"] if normalised else 1)
        for name in ("chosen", "rejected")
    ]
    return math.log1p(math.exp(-beta * (margins[0] - margins[1])))


@pytest.mark.parametrize("case", GOLDEN["dpo_losses"], ids=lambda case: str(case["chosen_tokens"]))
def test_the_formulas_of_the_losses(case):
    assert dpo_loss(case, 10.0, True) == pytest.approx(case["length_normalised_beta_10"], rel=1e-9)
    assert dpo_loss(case, 0.01, False) == pytest.approx(case["plain_beta_0_01"], rel=1e-9)


@pytest.mark.parametrize("target_name", ["Llama-3.2-1B", "Gemma-2-9B"])
def test_the_losses_of_the_settings_are_the_formulas(tmp_path, target_name):
    """Row by row, from log-probabilities of the answers' tokens, the end token among them."""
    _, dpo_args = paper_settings(tmp_path, target_name, dpo={**QUIET, "save_strategy": "no"})
    words, rows = tokenizer(), [("ab", "cdef", "gh"), ("c", "d", "efghijk")]
    policy, reference = target(), target()
    for seed, model in enumerate((policy, reference)):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    sums = []
    for prompt, *answers in rows:
        row = {}
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            ids = torch.tensor([words(prompt + answer)["input_ids"] + [words.eos_token_id]])
            for prefix, model in (("", policy), ("ref_", reference)):
                with torch.no_grad():
                    logp = model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                row[f"{prefix}{name}_logp"] = logp[len(prompt) - 1 :].sum().item()
            row[f"{name}_tokens"] = len(answer) + 1
        sums.append(row)
    columns = {name: [row[index] for row in rows] for index, name in enumerate(("prompt", "chosen", "rejected"))}
    data = Dataset.from_dict(columns)
    trainer = trl.DPOTrainer(policy, reference, dpo_args, train_dataset=data, processing_class=words)
    for index, row in enumerate(sums):
        loss = trainer.evaluate(trainer.train_dataset.select([index]), metric_key_prefix="one")["one_loss"]
        assert loss == pytest.approx(dpo_loss(row, dpo_args.beta, "norm" in dpo_args.loss_type[0]), rel=1e-4)


def test_the_settings_are_the_source_s(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sft_args, dpo_args = paper_settings(tmp_path, "Qwen-2.5-7B", dpo={"per_device_train_batch_size": 4, "bf16": False})
    assert (sft_args.learning_rate, sft_args.num_train_epochs, dpo_args.num_train_epochs) == (2e-6, 3, 1)
    assert (dpo_args.learning_rate, dpo_args.beta, dpo_args.loss_type) == (3e-7, 0.01, ["sigmoid"])
    for args in (sft_args, dpo_args):
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 2 == 128
        assert (args.max_length, args.lr_scheduler_type, args.max_grad_norm) == (2048, "cosine", 0.0)
        assert args.get_warmup_steps(1000) == 100
        assert args.optim == "stable_spam"
    assert (dpo_args.save_steps, dpo_args.save_total_limit) == (100, 2)
    with pytest.raises(ValueError, match=r"target must be one of Llama-3.1-8B, .*got 'Llama-2-7B'"):
        paper_settings(tmp_path, "Llama-2-7B")
    with pytest.raises(TypeError, match="learning_rat"):
        paper_settings(tmp_path, sft={"learning_rat": 1e-3})


def test_a_batch_that_is_not_the_source_s_is_mentioned(tmp_path, monkeypatch):
    from hf_stablespam.recipes.fusechat import settings as module

    said = []
    monkeypatch.setattr(module.logger, "warning", lambda *parts: said.append(parts[0] % parts[1:]))
    sft = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 24}
    sft_args, _ = paper_settings(tmp_path, sft=sft, dpo={"use_cpu": True, "bf16": False})
    assert sft_args.per_device_train_batch_size * sft_args.gradient_accumulation_steps == 120
    assert len(said) == 1
    assert "24 sequences on each of 1 processes do not make up the batch of 128: it is 120" in said[0]
    paper_settings(tmp_path, sft={**sft, "gradient_accumulation_steps": 2}, dpo={"use_cpu": True, "bf16": False})
    assert len(said) == 1


def test_wrong_uses_are_refused_before_training(tmp_path):
    sft_args, dpo_args = settings(tmp_path)

    def train(model=None, data=None, args=(sft_args, dpo_args), **options):
        return train_target(model or target(), tokenizer(), preferences() if data is None else data, *args, **options)

    with pytest.raises(ValueError, match="export needs four_bit"):
        train(export=True)
    with pytest.raises(ValueError, match="groups of 128 do not divide"):
        train(export=True, four_bit=FourBitConfig())
    with pytest.raises(ValueError, match="folders of their own"):
        train(args=(sft_args, settings(tmp_path, dpo={"output_dir": sft_args.output_dir})[1]))
    for stage in (sft_args, dpo_args):
        with pytest.raises(ValueError, match="export must be another folder than those of the stages"):
            train(export=f"{stage.output_dir}/", four_bit=FourBitConfig(group_size=16))
        loaded = target()
        loaded.name_or_path = f"{stage.output_dir}/"
        for model in (str(stage.output_dir), Path(stage.output_dir), loaded):
            with pytest.raises(ValueError, match="model must lie in another folder than those of the stages"):
                train(model=model)
    with pytest.raises(ValueError, match=r"the parts 'sft' and 'dpo' and a row in one of them, it has {'dpo': 8}"):
        train(data={"dpo": preferences()["dpo"]})
    from peft import get_peft_model

    with pytest.raises(ValueError, match="model must have no adapter"):
        train(model=get_peft_model(target(), LORA))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_that_small_steps_cannot_move_are_mentioned(tmp_path, monkeypatch):
    from hf_stablespam.recipes.fusechat import training

    said = []
    monkeypatch.setattr(training.logger, "warning", lambda *parts: said.append(parts[0] % parts[1:]))
    half = target().bfloat16()
    for more, count in (({}, 1), ({"optim_args": "stochastic_rounding=True"}, 1), ({"learning_rate": 1e-3}, 1)):
        args, _ = settings(tmp_path, sft={"learning_rate": 5e-6, **more})
        training._warn_about_bfloat16(half, args, None)
        assert len(said) == count
    assert "the weights are bfloat16 and the learning rate is 5e-06: most updates are rounded away" in said[0]
    training._warn_about_bfloat16(half, settings(tmp_path, sft={"learning_rate": 5e-6})[0], LORA)
    training._warn_about_bfloat16(target(), settings(tmp_path, sft={"learning_rate": 5e-6})[0], None)
    assert len(said) == 1
