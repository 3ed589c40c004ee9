"""What a backend does: four passes over the tensors of one device and dtype."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hf_stablespam.optim.plan import CHANGING, Batch, Clipped, Clipping, Measured, Options, Plan, Trackers


class Backend(ABC):
    """Parameters, gradients and states of one step, and the passes over them."""

    def __init__(self, batch: Batch, options: Options) -> None:
        self.batch = batch
        self.options = options
        self.precise = batch.states[0]["clip_max"].dtype  # of the statistics: float32, or float64 for float64
        self.clips = options["clip_beta"] is not None

    def read_trackers(self) -> Trackers:
        """The trackers of all tensors as vectors."""
        states = self.batch.states
        columns = ([state.get(name, state["adopted_at"]) for state in states] for name in Trackers._fields)
        return Trackers(*(torch.stack(column) for column in columns))

    def write_trackers(self, trackers: Trackers) -> None:
        """Write back what a step changes of them."""
        targets = [state[name] for name in CHANGING for state in self.batch.states]
        values = [value for name in CHANGING for value in getattr(trackers, name).unbind()]
        torch._foreach_copy_(targets, values)

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

    def unclipped(self, measured: Measured) -> Clipped:
        """What clipping leaves where it is switched off."""
        return Clipped(measured.norm, torch.zeros_like(measured.norm))


def is_plain_tensor(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors with memory of their own, not `DTensor` or another subclass."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def share_layout(tensors: list[Tensor]) -> bool:
    """Whether the tensors fill memory without gaps or overlaps and in the same order, so that they can be flattened."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = tensors[0].stride()
    return _is_gapless(tensors[0]) and all(tensor.stride() == strides for tensor in tensors)


def _is_gapless(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
