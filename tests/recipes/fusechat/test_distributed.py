"""Both stages on two processes: DDP and FSDP2, going on after a kill, and what only the main process meets."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_stablespam.recipes.fusechat import train_target
from tests.processes import run_processes
from tests.recipes.fusechat.helpers import preferences, target, tokenizer
from tests.recipes.fusechat.test_training import FOUR_BIT, KillIn, settings
from tests.trainer.distributed import fsdp_options, let_fsdp_run_on_the_cpu

pytest.importorskip("trl", minversion="1.14", reason="TRL 1.14 or newer is not installed; extra 'fusechat'")

SAVING = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def fused(folder: Path, fsdp: bool, **options: object) -> torch.nn.Module:
    more = SAVING | (fsdp_options() if fsdp else {})
    both = settings(folder, more, more)
    for args in both if fsdp else ():
        let_fsdp_run_on_the_cpu(args)
    model = target(hidden_size=32, intermediate_size=32)
    return train_target(model, tokenizer(), preferences(), *both, **options)


def first_loss(folder: Path) -> float:
    rows = json.loads((folder / "dpo" / "trainer_state.json").read_text())["log_history"]
    return next(row["loss"] for row in rows if "loss" in row)


def killed_and_gone_on(folder: Path) -> None:
    whole = fused(folder / "whole", fsdp=False)
    with contextlib.suppress(InterruptedError):
        fused(folder / "killed", fsdp=False, callbacks=[KillIn("dpo", 3)])
    seen = KillIn()
    resumed = fused(folder / "killed", fsdp=False, callbacks=[seen], resume=True)
    assert seen.begun == [("dpo", 2)]
    assert all(torch.equal(weight, resumed.state_dict()[name]) for name, weight in whole.state_dict().items())


def sharded_in_4_bits(folder: Path) -> None:
    """FSDP2 wraps the policy when training begins: only then its loss can be measured."""
    trained = fused(folder / "fsdp", fsdp=True, four_bit=FOUR_BIT, export=True)
    assert first_loss(folder / "fsdp") == pytest.approx(math.log(2), abs=1e-4)
    packed = AutoModelForCausalLM.from_pretrained(folder / "fsdp" / "dpo" / "4bit", dtype=torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, trained.bfloat16().float()(ids).logits, atol=0.1)


def adapters_are_merged_and_saved_whole(folder: Path) -> None:
    """Shards are gathered: what is saved under FSDP2 is what DDP saves."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    sharded, whole = (
        fused(folder / f"lora-{fsdp}", fsdp=fsdp, peft_config=lora).state_dict() for fsdp in (True, False)
    )
    assert sharded.keys() == whole.keys()
    assert all(torch.allclose(sharded[name], weight, atol=1e-6) for name, weight in whole.items())


def a_folder_that_cannot_be_written(folder: Path) -> None:
    if dist.get_rank() == 0:
        (folder / "a file").write_text("no folder")
    dist.barrier()
    with pytest.raises(OSError, match=r"Not a directory.*a file"):
        fused(folder / "a file", fsdp=False)
    dist.barrier()


def work(folder: Path) -> None:
    a_folder_that_cannot_be_written(folder)
    sharded_in_4_bits(folder)
    adapters_are_merged_and_saved_whole(folder)
    killed_and_gone_on(folder)


@pytest.mark.slow
def test_both_stages_on_two_processes(tmp_path: Path) -> None:
    run_processes(2, work, tmp_path)
