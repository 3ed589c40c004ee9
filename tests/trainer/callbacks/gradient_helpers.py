"""What several tests of the monitoring callbacks share: the gradients as they came, and spikes put into them."""

import math

import torch
from transformers import TrainerCallback


class KeepNorms(TrainerCallback):
    """The norm of the gradient that reaches the optimizer, taken the slow way, whole and by parameter."""

    def __init__(self):
        self.norms = []
        self.by_name = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
        self.norms.append(torch.cat(list(grads.values())).norm().item())
        self.by_name.append({name: grad.norm().item() for name, grad in grads.items()})


class Spike(TrainerCallback):
    """Multiply one entry of one gradient at chosen steps."""

    def __init__(self, at, factor=math.inf):
        self.at, self.factor = at, factor

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 in self.at:
            model.lm_head.weight.grad[3, 5] *= self.factor
