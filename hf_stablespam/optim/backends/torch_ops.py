"""The passes in PyTorch's operations, for tensors of any dtype and layout, many at once.

Tensors are cut into pieces. On an accelerator pieces are gathered into buckets, large enough to keep it busy. A bucket
is a matrix of which no row belongs to two tensors, so that the numbers of a tensor stand beside its rows as a column:
one operation serves all tensors of the bucket, and nothing is read back to the host. On the CPU a piece fits the cache
and is a bucket by itself; there the numbers are read, and say which passes can be left out.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.backends.base import Backend, norms_of_tensors, of_tensors, share_layout
from hf_stablespam.optim.formulas import Coefficients, adam_, clip_spikes, scale_of
from hf_stablespam.optim.plan import MOMENTS, Batch, Clipped, Clipping, Measured, Options, Plan
from hf_stablespam.optim.state.stochastic_rounding import store

HOSTS = ("cpu",)  # types of devices whose numbers are read without waiting
HOST_BUCKET = 1 << 18  # entries of a bucket there
LARGE_BUCKET = 1 << 24  # on any other device
ROW = 256  # entries of a row where a bucket holds several pieces
TINY = 1e-15  # entries whose squares may leave the range of float32
_ENDLESS = torch.tensor(1e30, device="cpu")


class Bucket(NamedTuple):
    """Pieces (consecutive entries of a tensor, or all of one whose layout allows no cutting), as a matrix."""

    owners: tuple[int, ...]  # the tensor of each piece
    param: tuple[Tensor, ...]
    grad: tuple[Tensor, ...]
    exp_avg: tuple[Tensor, ...]
    exp_avg_sq: tuple[Tensor, ...]

    def rows(self) -> list[int]:
        """How many rows each piece takes."""
        return [1] if len(self.grad) == 1 else [-(-piece.numel() // ROW) for piece in self.grad]

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """One column of the pieces as a matrix of ``dtype``: a copy, but for a single piece that has it already."""
        pieces = getattr(self, name)
        if len(pieces) == 1:
            return pieces[0].reshape(1, -1).to(dtype)
        matrix = torch.zeros(sum(self.rows()), ROW, dtype=dtype, device=pieces[0].device)
        torch._foreach_copy_(self._parts(matrix), pieces)
        return matrix

    def scatter(self, name: str, matrix: Tensor, stochastic: bool = False) -> None:
        """Write a matrix back into the pieces."""
        for target, part in zip(getattr(self, name), self._parts(matrix), strict=True):
            if target.data_ptr() != part.data_ptr():
                store(target, part, stochastic=stochastic)

    def _parts(self, matrix: Tensor) -> list[Tensor]:
        parts = matrix.view(-1).split([matrix.shape[1] * rows for rows in self.rows()])
        return [part[: piece.numel()].view(piece.shape) for part, piece in zip(parts, self.grad, strict=True)]


class TorchOps(Backend):
    """PyTorch's operations on buckets."""

    label = "PyTorch's operations"

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        device = batch.params[0].device
        self.on_host, self.buckets = device.type in HOSTS, _buckets(batch)
        self.rows = [sum(bucket.rows()) for bucket in self.buckets]
        owners = torch.tensor([owner for bucket in self.buckets for owner in bucket.owners], dtype=torch.int64)
        rows = torch.tensor([rows for bucket in self.buckets for rows in bucket.rows()], dtype=torch.int64)
        self.owners = owners.repeat_interleave(rows).to(device)
        self.counts = self.owners.bincount(minlength=len(batch.params))
        self.maxima = self.norms = torch.zeros(0, dtype=self.precise, device=device)

    def measure(self) -> Measured:
        matrices = (bucket.gather("grad", self.precise) for bucket in self.buckets)
        if self.on_host:
            rows = torch.tensor([_measured_here(row) for row in matrices], dtype=self.precise)
            self.maxima, self.norms = rows.view(-1, 2).t().contiguous()
        elif self.buckets:  # else this process holds no entry of any tensor
            self.maxima, self.norms = map(torch.cat, zip(*map(_measured, matrices), strict=True))
        grad_max = of_tensors(self.maxima, "max", self.counts)
        return Measured(grad_max, norms_of_tensors(self.norms, self.owners, grad_max, self.counts))

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        norms, entries = self.norms.clone(), torch.zeros_like(self.norms)
        columns = zip(*(self._columns(vector) for vector in clipping[1:]), strict=True)
        places = zip(*(vector.split(self.rows) for vector in (self.maxima, norms, entries)), strict=True)
        for bucket, (threshold, ratio), (maxima, norm, count) in zip(self.buckets, columns, places, strict=True):
            if not self.on_host or maxima > threshold:
                grad, spikes = _clipped(bucket.gather("grad", self.precise), threshold, ratio)
                if self.on_host:
                    norm[0], count[0] = _measured_here(grad)[1], spikes.count_nonzero()
                else:
                    norm.copy_(_measured(grad)[1])
                    torch.sum(spikes, 1, dtype=self.precise, out=count)
        norm = norms_of_tensors(norms, self.owners, measured.grad_max, self.counts)
        return Clipped(norm, of_tensors(entries, "sum", self.counts))

    def update(self, plan: Plan) -> None:
        for bucket, (grad, by) in self._stabilized(plan):
            if self.on_host and _updated_by_adamw(bucket, grad, by):
                continue
            weight, exp_avg, exp_avg_sq = (bucket.gather(name, self.precise) for name in ("param", *MOMENTS))
            adam_(weight, grad, exp_avg, exp_avg_sq, by)
            bucket.scatter("param", weight, self.options["stochastic_rounding"])
            bucket.scatter("exp_avg", exp_avg)
            bucket.scatter("exp_avg_sq", exp_avg_sq)

    def rescale(self, plan: Plan) -> list[Tensor]:
        new = self.kept_memory(plan) if self.on_host else [torch.empty_like(grad) for grad in self.batch.grads]
        targets = _buckets(self.batch._replace(states=[{"exp_avg": value} for value in new]))  # cut like the gradients
        for bucket, (grad, _) in self._stabilized(plan, targets):
            bucket.scatter("exp_avg", grad)
        return new

    def _stabilized(self, plan: Plan, targets: Any = None) -> Iterator[tuple[Bucket, tuple[Tensor, Coefficients]]]:
        """Buckets (or others cut alike), and clipped and normalised gradients, on the CPU without what is passed over.

        Each comes with its coefficients.
        """
        by = plan.by if self.on_host else _untouched_unless(plan.finite, plan.by)
        columns = map(Coefficients._make, zip(*map(self._columns, by), strict=True))
        rows = zip(self.buckets, columns, self._columns(plan.finite), self.maxima.split(self.rows), strict=True)
        for target, (bucket, numbers, finite, maxima) in zip(targets or self.buckets, rows, strict=True):
            if self.on_host and not finite:
                continue
            grad = bucket.gather("grad", self.precise)
            if not self.on_host or maxima > numbers.threshold:
                grad = _clipped(grad, numbers.threshold, numbers.ratio)[0].mul_(numbers.factor)
            else:
                grad = grad * numbers.factor
            yield target, (grad if self.on_host else grad.masked_fill_(~finite, 0), numbers)

    def _columns(self, vector: Tensor) -> list[Any]:
        """One number per tensor as a column for each bucket, or as a number where a bucket is a single row."""
        if not self.on_host:
            return list(vector[self.owners].unsqueeze(1).split(self.rows))
        numbers = vector.tolist()
        return [numbers[bucket.owners[0]] for bucket in self.buckets]


def _untouched_unless(finite: Tensor, by: Coefficients) -> Coefficients:
    """Coefficients that leave what is passed over as it is."""
    neutral = Coefficients(torch.inf, 1, 0, 1, 0, 1, 0, 0, 1, 1)  # type: ignore[arg-type]
    return Coefficients(*(torch.where(finite, *pair) for pair in zip(by, neutral, strict=True)))


def _measured(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest |entry| and the norm of each row, by way of scaled entries, whose squares stay in range."""
    maxima = torch.maximum(matrix.amax(1), matrix.amin(1).neg())
    scale = scale_of(maxima)
    return maxima, scale * torch.linalg.vector_norm(matrix / scale.unsqueeze(1), dim=1)


def _measured_here(row: Tensor) -> tuple[float, float]:
    """The same of the only row, as numbers, which says whether squares stay in range unscaled."""
    lowest, largest = (bound.item() for bound in row.aminmax())
    if TINY < (largest := max(-lowest, largest)) < 1 / TINY:
        return largest, torch.linalg.vector_norm(row).item()
    return tuple(found.item() for found in _measured(row))  # type: ignore[return-value]


def _clipped(grad: Tensor, threshold: Any, ratio: Any) -> tuple[Tensor, Tensor]:
    """`clip_spikes`; by a number four times as fast, and with the spikes themselves instead of where they are."""
    if isinstance(threshold, Tensor):
        return clip_spikes(grad, threshold, ratio)
    spikes = torch.nn.functional.hardshrink(grad, threshold)
    return (grad - spikes).add_(spikes, alpha=ratio), spikes


def _updated_by_adamw(bucket: Bucket, grad: Tensor, by: Any) -> bool:
    """`adam_` in one pass of PyTorch's fused AdamW, whose own bias corrections an endless step count switches off.

    Only for a piece without gaps and of one dtype, and numbers that it can be told.
    """
    weight, exp_avg, exp_avg_sq = moments = bucket.param[0], bucket.exp_avg[0], bucket.exp_avg_sq[0]
    if any(tensor.dtype != grad.dtype or not tensor.is_contiguous() for tensor in moments):
        return False
    if by.size == 0 or by.enter in (0, 1) or by.enter_sq in (0, 1):
        return False
    for moment, keep, enter in ((exp_avg, by.keep, by.enter), (exp_avg_sq, by.keep_sq, by.enter_sq)):
        if abs((carry := keep / (1 - enter)) - 1) > 1e-5:  # after a reset, or moments adopted from AdamW
            moment.mul_(carry)
    options: dict[str, Any] = {"lr": by.size, "beta1": 1 - by.enter, "beta2": 1 - by.enter_sq, "eps": by.eps}
    options |= {"weight_decay": (1 - by.decay) / by.size, "amsgrad": False, "maximize": False}
    torch._fused_adamw_([weight], [grad.view(weight.shape)], [exp_avg], [exp_avg_sq], [], [_ENDLESS], **options)
    torch.autograd.graph.increment_version(weight)  # which this operation does not
    return True


def _buckets(batch: Batch) -> list[Bucket]:
    """Consecutive pieces whose sizes add up to a limit at most; on the CPU each by itself."""
    on_host = batch.params[0].device.type in HOSTS
    limit = HOST_BUCKET if on_host else LARGE_BUCKET
    buckets: list[list[Any]] = []
    filled = limit
    for owner, (param, grad, state) in enumerate(zip(*batch, strict=True)):
        columns = [param.detach(), grad.detach(), state.get("exp_avg", grad), state.get("exp_avg_sq", grad)]
        size, pieces = param.numel(), [columns] if param.numel() > 0 else []
        if size > limit and share_layout(columns):
            flat = [column.as_strided((size,), (1,)).split(limit) for column in columns]
            pieces = [list(piece) for piece in zip(*flat, strict=True)]
        for piece in pieces:
            if on_host or filled + piece[0].numel() > limit:
                buckets.append([])
                filled = 0
            buckets[-1].append((owner, *piece))
            filled += piece[0].numel()
    return [Bucket(*zip(*bucket, strict=True)) for bucket in buckets]
