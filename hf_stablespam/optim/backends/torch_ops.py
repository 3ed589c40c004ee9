"""The passes in PyTorch's operations, for tensors of any dtype and layout, many at once.

Tensors are cut into pieces, and pieces gathered into buckets that fit a processor's cache, or are large enough to keep
a GPU busy. A bucket is a matrix of which no row belongs to two tensors, so that the numbers of a tensor stand beside
its rows as a column: one operation serves all tensors of the bucket, and nothing is read back to the host.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.optim.backends.base import Backend, share_layout
from hf_stablespam.optim.formulas import Coefficients, adam_, clip_spikes, scale_of
from hf_stablespam.optim.plan import Batch, Clipped, Clipping, Measured, Options, Plan
from hf_stablespam.optim.state.stochastic_rounding import store

BUCKET = {"cpu": 1 << 18}  # entries of a bucket, by device type
LARGE_BUCKET = 1 << 24  # on any other device
ALONE = 1 << 15  # entries of a piece that is a bucket by itself
TINY = 1e-15  # entries whose squares may leave the range of float32
_ENDLESS = torch.tensor(1e30, device="cpu")
ROW = 256  # entries of a row where a bucket holds several pieces


class Piece(NamedTuple):
    """Consecutive entries of a tensor, or all of a tensor whose layout allows no cutting."""

    owner: int  # which tensor
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Bucket:
    """Some pieces, as a matrix."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.sizes = [piece.grad.numel() for piece in pieces]
        self.rows = [1] if len(pieces) == 1 else [-(-size // ROW) for size in self.sizes]
        owners = [piece.owner for piece, rows in zip(pieces, self.rows, strict=True) for _ in range(rows)]
        self.owners = torch.tensor(owners, device=pieces[0].grad.device)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """One column of the pieces as a matrix of ``dtype``: a copy, but for a single piece that has it already."""
        tensors = [getattr(piece, name) for piece in self.pieces]
        if len(tensors) == 1:
            return tensors[0].reshape(1, -1).to(dtype)
        matrix = torch.zeros(sum(self.rows), ROW, dtype=dtype, device=tensors[0].device)
        torch._foreach_copy_(self._parts(matrix), tensors)
        return matrix

    def scatter(self, name: str, matrix: Tensor, stochastic: bool = False) -> None:
        """Write a matrix back into the pieces."""
        for piece, part in zip(self.pieces, self._parts(matrix), strict=True):
            target = getattr(piece, name)
            if target.data_ptr() != part.data_ptr():
                store(target, part, stochastic=stochastic)

    def is_one(self, dtype: torch.dtype) -> bool:
        """Whether this is a single piece, without gaps and of one dtype."""
        return len(self.pieces) == 1 and all(
            tensor.dtype == dtype and tensor.is_contiguous() for tensor in self.pieces[0][1:]
        )

    def column(self, vector: Tensor) -> Tensor:
        """One number per tensor as one number per row."""
        return vector[self.owners].unsqueeze(1)

    def columns(self, by: Tensor) -> Coefficients:
        """The same for all coefficients, (tensors, 10)."""
        return Coefficients(*by[self.owners].unsqueeze(2).unbind(1))

    def _parts(self, matrix: Tensor) -> list[Tensor]:
        if len(self.pieces) == 1:
            return [matrix.view(self.pieces[0].grad.shape)]
        lengths = [rows * ROW for rows in self.rows]
        flat = zip(matrix.view(-1).split(lengths), self.sizes, self.pieces, strict=True)
        return [part[:size].view(piece.grad.shape) for part, size, piece in flat]


class TorchOps(Backend):
    """PyTorch's operations on buckets."""

    def __init__(self, batch: Batch, options: Options) -> None:
        super().__init__(batch, options)
        limit = BUCKET.get(batch.params[0].device.type, LARGE_BUCKET)
        self.buckets = list(_buckets(batch, limit))
        rows = [0] * len(batch.params)
        for bucket in self.buckets:
            for piece, count in zip(bucket.pieces, bucket.rows, strict=True):
                rows[piece.owner] += count
        self.row_counts = torch.tensor(rows, device=batch.params[0].device)
        self.row_maxima: list[Tensor] = []
        self.row_norms: list[Tensor] = []

    def measure(self) -> Measured:
        for bucket in self.buckets:
            grad = bucket.gather("grad", self.precise)
            self.row_maxima.append(grad.abs().amax(1))
            self.row_norms.append(_norms(grad, self.row_maxima[-1]))
        grad_max = self._of_tensors(self.row_maxima, "max")
        return Measured(grad_max, self._norms_of_tensors(self.row_norms, grad_max))

    def measure_clipped(self, measured: Measured, clipping: Clipping) -> Clipped:
        if not self.clips:
            return self.unclipped(measured)
        norms, entries = list(self.row_norms), [torch.zeros_like(row) for row in self.row_norms]
        for index, bucket in enumerate(self.buckets):
            threshold, ratio = bucket.column(clipping.threshold), bucket.column(clipping.ratio)
            if self._may_clip(index, threshold):
                grad, spikes = clip_spikes(bucket.gather("grad", self.precise), threshold, ratio)
                norms[index] = _norms(grad, self.row_maxima[index])
                entries[index] = spikes.sum(1, dtype=self.precise)
        return Clipped(self._norms_of_tensors(norms, measured.grad_max), self._of_tensors(entries, "sum"))

    def update(self, plan: Plan) -> None:
        stochastic, coefficients = self.options["stochastic_rounding"], torch.stack(plan.by, dim=1)
        for index, bucket in enumerate(self.buckets):
            by = bucket.columns(coefficients)
            grad = self._stabilized(index, bucket, by, plan.finite)
            if grad.is_cpu and bucket.is_one(self.precise) and _fused(bucket.pieces[0], grad, by):
                continue
            names = ("param", "exp_avg", "exp_avg_sq")
            weight, exp_avg, exp_avg_sq = (bucket.gather(name, self.precise) for name in names)
            adam_(weight, grad, exp_avg, exp_avg_sq, by)
            bucket.scatter("param", weight, stochastic)
            bucket.scatter("exp_avg", exp_avg)
            bucket.scatter("exp_avg_sq", exp_avg_sq)

    def rescale(self, plan: Plan) -> list[Tensor]:
        new = [torch.empty_like(grad) for grad in self.batch.grads]
        targets = _buckets(self.batch._replace(grads=new), BUCKET.get(new[0].device.type, LARGE_BUCKET))
        coefficients = torch.stack(plan.by, dim=1)
        for index, (bucket, target) in enumerate(zip(self.buckets, targets, strict=True)):
            grad = self._stabilized(index, bucket, bucket.columns(coefficients), plan.finite)
            target.scatter("grad", grad)
        return new

    def _stabilized(self, index: int, bucket: Bucket, by: Coefficients, finite: Tensor) -> Tensor:
        grad = bucket.gather("grad", self.precise)
        if self.clips and self._may_clip(index, by.threshold):
            grad, _ = clip_spikes(grad, by.threshold, by.ratio)
        grad = grad * by.factor
        if grad.is_cpu and bool(finite.all()):
            return grad
        return grad.masked_fill_(
            ~bucket.column(finite), 0
        )  # else a gradient that is not finite would come through its factor of 0

    def _may_clip(self, index: int, threshold: Tensor) -> bool:
        """Whether a bucket may hold a spike; asked only where nobody waits for the answer."""
        return not threshold.is_cpu or bool((self.row_maxima[index].unsqueeze(1) > threshold).any())

    def _of_tensors(self, rows: list[Tensor], reduce: str) -> Tensor:
        """One number per row reduced to one number per tensor."""
        if not rows:  # this process holds no entry of any tensor
            return torch.zeros(len(self.batch.params), dtype=self.precise, device=self.row_counts.device)
        return torch.segment_reduce(torch.cat(rows), reduce, lengths=self.row_counts, unsafe=True, initial=0)

    def _norms_of_tensors(self, rows: list[Tensor], grad_max: Tensor) -> Tensor:
        scale = scale_of(grad_max)
        scales = [scale[bucket.owners] for bucket in self.buckets]
        squares = [(row / by).square() for row, by in zip(rows, scales, strict=True)]
        return scale * self._of_tensors(squares, "sum").sqrt()


def _fused(piece: Piece, grad: Tensor, by: Coefficients) -> bool:
    """`adam_` in one pass of PyTorch's fused AdamW, whose own bias corrections an endless step count switches off."""
    keep, enter, keep_sq, enter_sq, size, decay, eps = (float(number) for number in by[3:])
    if size == 0 or enter in (0, 1) or enter_sq in (0, 1):
        return False
    carry, carry_sq = keep / (1 - enter), keep_sq / (1 - enter_sq)
    for moment, factor in ((piece.exp_avg, carry), (piece.exp_avg_sq, carry_sq)):
        if abs(factor - 1) > 1e-5:  # after a reset, or moments adopted from AdamW
            moment.mul_(factor)
    torch._fused_adamw_(
        [piece.param],
        [grad.view(piece.param.shape)],
        [piece.exp_avg],
        [piece.exp_avg_sq],
        [],
        [_ENDLESS],
        lr=size,
        beta1=1 - enter,
        beta2=1 - enter_sq,
        weight_decay=(1 - decay) / size,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    torch.autograd.graph.increment_version(piece.param)  # which this operation does not
    return True


def _norms(matrix: Tensor, maxima: Tensor) -> Tensor:
    """The norm of each row; divided by its largest entry first, unless it is known that squares stay in range."""
    if matrix.is_cpu and bool(((maxima == 0) | ((maxima > TINY) & (maxima < 1 / TINY))).all()):
        return torch.linalg.vector_norm(matrix, dim=1)
    scale = scale_of(maxima)
    return scale * torch.linalg.vector_norm(matrix / scale.unsqueeze(1), dim=1)


def _buckets(batch: Batch, limit: int) -> Iterator[Bucket]:
    """Consecutive pieces whose sizes add up to ``limit`` at most; what is larger stands alone."""
    waiting: list[Piece] = []
    filled = 0
    for piece in _pieces(batch, limit):
        size = piece.grad.numel()
        if waiting and (filled + size > limit or size > ALONE or filled > ALONE):
            yield Bucket(waiting)
            waiting, filled = [], 0
        waiting.append(piece)
        filled += piece.grad.numel()
    if waiting:
        yield Bucket(waiting)


def _pieces(batch: Batch, limit: int) -> Iterator[Piece]:
    for owner, (param, grad, state) in enumerate(zip(*batch, strict=True)):
        columns = [param.detach(), grad.detach(), state.get("exp_avg", grad), state.get("exp_avg_sq", grad)]
        if param.numel() > limit and share_layout(columns):
            flat = [column.as_strided((column.numel(),), (1,)) for column in columns]
            for start in range(0, param.numel(), limit):
                yield Piece(owner, *(column[start : start + limit] for column in flat))
        elif param.numel() > 0:
            yield Piece(owner, *columns)
