"""What a backend does: four passes over the tensors of one device and dtype."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hf_stablespam.optim.formulas import scale_of
from hf_stablespam.optim.plan import CHANGING, Batch, Clipped, Clipping, Measured, Options, Plan, Trackers

KEPT = "rescaled"  # beside the trackers


class Backend(ABC):
    """Parameters, gradients and states of one step, and the passes over them."""

    label = ""  # what it is, in the announcement of the choice

    def __init__(self, batch: Batch, options: Options) -> None:
        self.batch, self.options = batch, options
        self.precise = batch.states[0]["clip_max"].dtype  # of the statistics: float32, or float64 for float64

    def read_trackers(self) -> Trackers:
        """The trackers of all tensors as vectors."""
        states = self.batch.states
        columns = ([state.get(name, state["adopted_at"]) for state in states] for name in Trackers._fields)
        return Trackers(*(torch.stack(column).to(self.precise) for column in columns))

    def write_trackers(self, trackers: Tensor) -> None:
        """Write back what a step changes of them."""
        targets = [state[name] for name in CHANGING for state in self.batch.states]
        torch._foreach_copy_(targets, list(trackers.view(-1).unbind()))

    def kept_memory(self, plan: Plan) -> list[Tensor]:
        """Memory like that of the gradients, kept from step to step: new pages cost more than what is written there.

        For the host; zeros where the tensor is passed over.
        """
        for grad, state, finite in zip(self.batch.grads, self.batch.states, plan.finite.tolist(), strict=True):
            kept = state.get(KEPT)
            if kept is None or kept.dtype != grad.dtype or kept.stride() != grad.stride() or kept.shape != grad.shape:
                state[KEPT] = torch.empty_like(grad)
            if not finite:
                state[KEPT].zero_()
        return [state[KEPT] for state in self.batch.states]

    @abstractmethod
    def measure(self) -> Measured:
        """Maximum and norm of each gradient."""

    @abstractmethod
    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        """The norm of each gradient after clipping, and how many entries were clipped."""

    @abstractmethod
    def update(self, plan: Plan) -> None:
        """Clip, normalise, reset and AdamW: new weights and moments, in place. Gradients are not changed."""

    @abstractmethod
    def rescale(self, plan: Plan) -> list[Tensor]:
        """Clipped and normalised copies of the gradients, in their dtype and layout; zeros where one is not finite."""


def of_tensors(chunks: Tensor, reduce: str, counts: Tensor) -> Tensor:
    """Numbers of consecutive chunks, reduced by "max" or "sum" to one number per tensor of so many chunks."""
    return torch.segment_reduce(chunks, reduce, lengths=counts, unsafe=True, initial=0)


def norms_of_tensors(chunk_norms: Tensor, owners: Tensor, grad_max: Tensor, counts: Tensor) -> Tensor:
    """The norms of tensors from those of their chunks, of which ``owners`` says the tensor."""
    scale = scale_of(grad_max)
    squares = (chunk_norms.double() / scale[owners]).square()
    return (scale * of_tensors(squares, "sum", counts).sqrt()).to(grad_max.dtype)


def share_layout(tensors: list[Tensor]) -> bool:
    """Whether the tensors fill memory without gaps or overlaps and in the same order, so that they can be flattened."""
    if all([tensor.is_contiguous() for tensor in tensors]):
        return True
    strides, expected = tensors[0].stride(), 1
    for stride, size in sorted(zip(strides, tensors[0].shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return all(tensor.stride() == strides for tensor in tensors)
