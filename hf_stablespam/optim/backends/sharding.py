"""Sharded parameters (`DTensor`: FSDP2, HSDP, tensor parallel), by statistics of the whole tensors.

Letting each `DTensor` reduce itself costs two collectives per tensor and statistic. Here every process measures its own
shards, and what it found travels stacked: one maximum (AdaClip's threshold needs it first) and one sum (AdaGN needs the
norm of the clipped gradient) serve all tensors of the step.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_stablespam._sharded import all_reduce, is_sharded, layout, local, sharing
from hf_stablespam.optim.formulas import scale_of
from hf_stablespam.optim.plan import Batch, Clipped, Measured


class Meshes:
    """Who shares which tensors of a step, from the parameters of each of its parts.

    Costs one ``MAX`` and one ``SUM`` all-reduce for each process group over which any of the tensors is sharded: two
    for FSDP2 and HSDP, four for FSDP2 with tensor parallelism, none where nothing is sharded. Every process of a mesh
    must come with the same parameters.
    """

    def __init__(self, params: list[list[Any]]) -> None:
        everyone = [param for part in params for param in part]
        layouts = [layout(param) for param in everyone]
        for param, one in zip(everyone, layouts, strict=True):
            for placement in one.placements if one else ():
                if placement.is_partial():
                    raise ValueError(
                        f"parameters must be sharded or replicated, got {placement} on {param.device_mesh} for a "
                        f"parameter of shape {tuple(param.shape)}; redistribute it with Shard or Replicate"
                    )
        self.processes = sharing(layouts)

    def whole_maxima(self, measured: list[Measured]) -> list[Measured]:
        """The largest entries of whole tensors; norms are still those of the shards."""
        if not self.processes:
            return measured
        maxima = _together([seen.grad_max for seen in measured])
        is_nan = maxima.isnan()  # which a backend's MAX may lose
        both = torch.stack([maxima.masked_fill(is_nan, 0), is_nan.to(maxima)])
        all_reduce(both, self.processes, dist.ReduceOp.MAX)
        whole = both[0].masked_fill(both[1] > 0, torch.nan).split([len(seen.norm) for seen in measured])
        return [Measured(part.to(seen.norm), seen.norm) for part, seen in zip(whole, measured, strict=True)]

    def whole_norms(self, measured: list[Measured], clipped: list[Clipped]) -> tuple[list[Measured], list[Clipped]]:
        """Norms before and after clipping, and counts of clipped entries, of whole tensors."""
        if not self.processes:
            return measured, clipped
        scale = scale_of(_together([seen.grad_max for seen in measured]))
        squares = [(_together([seen.norm for seen in found]) / scale).square() for found in (measured, clipped)]
        sums = torch.stack([*squares, _together([rest.entries for rest in clipped]).to(scale)])
        all_reduce(sums, self.processes, dist.ReduceOp.SUM)
        sums[:2] = sums[:2].sqrt() * scale
        whole = sums.split([len(seen.norm) for seen in measured], dim=1)
        pairs = [(seen, part.to(seen.norm)) for seen, part in zip(measured, whole, strict=True)]
        return [seen._replace(norm=part[0]) for seen, part in pairs], [Clipped(*part[1:]) for _, part in pairs]


def local_batch(batch: Batch) -> Batch:
    """This process's part of each tensor."""
    if not any(is_sharded(param) for param in batch.params):
        return batch
    layouts = [layout(param) for param in batch.params]
    params, grads = ([local(*pair) for pair in zip(column, layouts, strict=True)] for column in batch[:2])
    states = [{name: local(value, layout(value)) for name, value in state.items()} for state in batch.states]
    return Batch(params, grads, states)


def _together(vectors: list[Tensor]) -> Tensor:
    return torch.cat([vector.to(vectors[0].device) for vector in vectors])
