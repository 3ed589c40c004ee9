"""One tensor after the other, written as the paper writes it: slow, readable, and right for every kind of tensor.

Chosen for what nothing else takes: moments in 8 or 4 bits, subclasses of tensor, and `torch.compile`. It synchronises
nothing. The other backends do the same faster.
"""

import torch
from torch import Tensor

from hf_stablespam.optim.backends.base import Backend
from hf_stablespam.optim.formulas import Coefficients, adam_, clip_spikes, safe_norm
from hf_stablespam.optim.plan import MOMENTS, Clipped, Clipping, Measured, Plan
from hf_stablespam.optim.state import low_bit
from hf_stablespam.optim.state.stochastic_rounding import store


class Loop(Backend):
    """The reference."""

    label = "a loop over the tensors"

    def measure(self) -> Measured:
        grads = [grad.to(self.precise) for grad in self.batch.grads]
        maxima = [grad.abs().amax() if grad.numel() > 0 else grad.sum() for grad in grads]
        norms = [safe_norm(*pair) for pair in zip(grads, maxima, strict=True)]
        return Measured(torch.stack(maxima), torch.stack(norms))

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        norms, entries = [], []
        for index, grad in enumerate(self.batch.grads):
            clipped, spikes = clip_spikes(grad.to(self.precise), clipping.threshold[index], clipping.ratio[index])
            norms.append(safe_norm(clipped, measured.grad_max[index]))
            entries.append(spikes.sum())
        return Clipped(torch.stack(norms), torch.stack(entries))

    def update(self, plan: Plan) -> None:
        for index, (param, grad, state) in enumerate(zip(*self.batch, strict=True)):
            by, finite = Coefficients(*(column[index] for column in plan.by)), plan.finite[index]
            exp_avg, exp_avg_sq = (low_bit.read(state[name], self.precise).clone() for name in MOMENTS)
            weight = param.to(self.precise, copy=True)
            adam_(weight, self._stabilized(grad, by), exp_avg, exp_avg_sq, by)
            low_bit.write(state["exp_avg"], exp_avg, finite)
            low_bit.write(state["exp_avg_sq"], exp_avg_sq, finite)
            store(param, torch.where(finite, weight, param), stochastic=self.options["stochastic_rounding"])

    def rescale(self, plan: Plan) -> list[Tensor]:
        rows = zip(self.batch.grads, torch.stack(plan.by, dim=1), plan.finite, strict=True)
        new = ((grad, self._stabilized(grad, Coefficients(*by)), finite) for grad, by, finite in rows)
        return [torch.where(finite, value.to(grad.dtype), torch.zeros_like(grad)) for grad, value, finite in new]

    def _stabilized(self, grad: Tensor, by: Coefficients) -> Tensor:
        return clip_spikes(grad.to(self.precise), by.threshold, by.ratio)[0] * by.factor
