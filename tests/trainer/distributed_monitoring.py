"""What each of two gloo processes runs for `test_gradient_norm_distributed.py`; it writes JSON for the test to read."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from hf_stablespam import FourBitCallback, FourBitConfig, GradientNormCallback, SpikeRecorder
from tests.trainer.helpers import RandomTokens, arguments, tiny_llama


class SpikeOnOneProcess(TrainerCallback):
    """Multiply one gradient before processes average it, on the last process only."""

    def __init__(self, weight, at):
        self.at, self.now = at, False
        weight.register_hook(self.spike)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1 == self.at

    def spike(self, grad):
        return grad * 1e4 if self.now and dist.get_rank() == dist.get_world_size() - 1 else grad


class KeepWholeGradient(TrainerCallback):
    """Norms of the gathered gradients, the slow way."""

    def __init__(self):
        self.norms, self.largest = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = [p.grad for p in model.parameters()]
        whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
        self.norms.append(torch.cat([grad.flatten() for grad in whole]).norm().item())
        self.largest.append(max(grad.abs().max().item() for grad in whole))


def as_fsdp2(args):
    """accelerate takes FSDP on the CPU for DDP unless it is told otherwise."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    _ = args._setup_devices
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train(folder, optim, fsdp=False):
    options = {}
    if fsdp:
        options = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    args = arguments(
        folder, optim=optim, max_steps=8, per_device_train_batch_size=2, report_to=["tensorboard"], **options
    )
    if fsdp:
        as_fsdp2(args)
    model = tiny_llama()
    keep = KeepWholeGradient()
    callbacks = [FourBitCallback(FourBitConfig(group_size=8)), GradientNormCallback(by="block"), SpikeRecorder(), keep]
    if not fsdp:
        callbacks.append(SpikeOnOneProcess(model.lm_head.weight, at=7))
    trainer = Trainer(model=model, args=args, train_dataset=RandomTokens(), callbacks=callbacks)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    sharded = any(hasattr(p, "device_mesh") for p in trainer.model.parameters())
    return {"rows": rows, "norms": keep.norms, "largest": keep.largest, "sharded": sharded}


def main(folder):
    torch.set_num_threads(1)
    found = {
        "ddp_stable_spam": train(folder / "ddp_stable_spam", "stable_spam"),
        "ddp_adamw": train(folder / "ddp_adamw", "adamw_torch"),
        "fsdp2_adamw": train(folder / "fsdp2_adamw", "adamw_torch", fsdp=True),
        "fsdp2_stable_spam": train(folder / "fsdp2_stable_spam", "stable_spam", fsdp=True),
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
