"""Self-attention with a gated relative position bias, without a tensor of frames by frames.

    s_ij = q_i . k_j / sqrt(d) + table[h, j - i] gate_i,   p = softmax_j(s),   y = (keep p) v

over the keys that a row has. Kept for the backward pass are the output and the logarithm of each
softmax's sum; scores are computed once more. keep is dropout: 0, or 1 / (1 - dropout_p).

Plain torch works on blocks of (heads, queries, keys) that stay in the cache. A block of n queries
is laid out with one column a diagonal, so row i of it starts one value before row i - 1:

    block[i, c] = score of query i0 + i and key j,   c = j - i + n - 1

The bias of a block is then an outer product, gates times a piece of the table, the gradients of
gates and table are two products of that matrix with a vector, and the scores are a strided view
of it that matrix products read and write in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_probability, kind_of
from gmm_jepa.ops.dropout import drawn_seed
from gmm_jepa.ops.operator import Operator

# Scores of a block. It must not depend on the number of threads, or dropout's mask would.
BLOCK_VALUES = 1 << 17
# Queries of a block at least, however many keys there are.
LEAST_QUERIES = 16
_LOG2_E = math.log2(math.e)


def gated_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(q k' / sqrt(d) + table[h, j - i] gate[b, h, i]) v; differentiable in all five.

    Args:
        q, k, v: (B, H, T, d), one dtype; scores and softmax are float32 for bf16 and float16.
        table: (H, 2 T - 1), one value a head and relative position j - i, at column j - i + T - 1.
        gate: (B, H, T), one value a query.
        key_lengths: (B,) integers, keys that exist in each row, each 0 to T; None: all. A row of
            none gives zeros and has no gradient.
        dropout_p: dropout on the probabilities, at least 0 and below 1.
        seed: (1,) int64, what dropout is drawn from; None: drawn from torch's own generator.

    Returns:
        (B, H, T, d) of q's dtype, with the memory of (B, T, H, d).

    Raises:
        InputError: shapes, devices or dropout_p make no sense.
        TypeError: a tensor is of the wrong type.
    """
    _check(q, k, v, table, gate, key_lengths)
    check_probability("dropout_p", dropout_p)
    if dropout_p == 0.0 or seed is None:
        seed = drawn_seed(dropout_p, q.device)
    return _attention(q, k, v, table, gate, key_lengths, seed, float(dropout_p))[0]


def _check(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, gate: Tensor, key_lengths: Tensor | None
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("table", table), ("gate", gate)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(tensor)}")
        if tensor.device != q.device:
            raise InputError(f"{name}: on {tensor.device}, but q on {q.device}")
    if q.ndim != 4 or q.shape[2] < 1 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise InputError(f"q, k, v: expected (B, H, T, d) each, T at least 1, got {shapes}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    B, H, T, _ = q.shape
    if table.shape != (H, 2 * T - 1):
        raise InputError(f"table: expected {(H, 2 * T - 1)}, got {tuple(table.shape)}")
    if gate.shape != (B, H, T):
        raise InputError(f"gate: expected {(B, H, T)}, got {tuple(gate.shape)}")
    if key_lengths is not None and key_lengths.shape != (B,):
        raise InputError(f"key_lengths: expected ({B},), got {tuple(key_lengths.shape)}")


class _Block(NamedTuple):
    """Some queries of some (batch, head) pairs, with the keys these have."""

    heads: slice
    queries: slice
    n_keys: int
    hidden: Tensor | None
    """(heads, 1, keys) bool: keys that a row lacks; None: it has them all"""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (
            self.heads.stop - self.heads.start,
            self.queries.stop - self.queries.start,
            self.n_keys,
        )


def _blocks(q: Tensor, key_lengths: Tensor | None) -> Iterator[_Block]:
    """All of (B H) pairs by T queries, `BLOCK_VALUES` scores at a time.

    On a CPU keys behind the longest row of a block are left out; elsewhere lengths stay unread.
    """
    B, H, T, _ = q.shape
    n_heads = max(1, BLOCK_VALUES // (T * T))
    n_queries = max(LEAST_QUERIES, BLOCK_VALUES // T)
    n_queries = -(-T // -(-T // n_queries))  # blocks of one size, or nearly
    lengths = None
    if key_lengths is not None and key_lengths.device.type == "cpu":
        lengths = key_lengths.tolist()
    for first in range(0, B * H, n_heads):
        heads = slice(first, min(first + n_heads, B * H))
        n_keys, hidden = T, None
        if lengths is not None:
            own = lengths[first // H : (heads.stop - 1) // H + 1]
            n_keys = max(own)
        if key_lengths is not None and (lengths is None or min(own) < n_keys):
            of_heads = key_lengths.repeat_interleave(H)[heads, None, None]
            hidden = torch.arange(n_keys, device=q.device) >= of_heads
        for start in range(0, T, n_queries):
            yield _Block(heads, slice(start, min(start + n_queries, T)), n_keys, hidden)


class _Scores:
    """Memory of one block, used again and again.

    Args:
        like: what dtype and device are taken from.
        blank: keep the corners of the layout, where no score is, at zero.
    """

    def __init__(self, like: Tensor, *, blank: bool = False) -> None:
        self._like, self._blank, self._shape = like, blank, None

    def of(self, block: _Block) -> tuple[Tensor, Tensor]:
        """The layout by diagonals (heads, n, keys + n - 1), and the scores in it (heads, n, keys).

        Values are what the block before left there.
        """
        if block.shape != self._shape:
            (H, n, n_keys), self._shape = block.shape, block.shape
            W = n_keys + n - 1
            make = self._like.new_zeros if self._blank else self._like.new_empty
            self._layout = make((H, n, W))
            self._view = self._layout.as_strided((H, n, n_keys), (n * W, W - 1, 1), n - 1)
        return self._layout, self._view


class _Dropout:
    """Draws the same ones and zeros again for the same seed and the same sequence of blocks.

    Sixteen random bits a score: the probability is a multiple of 2^-16, and `scale` is its own.
    """

    def __init__(self, seed: Tensor | None, dropout_p: float, like: Tensor) -> None:
        dropped = min(round(dropout_p * 65536), 65535)
        self.active = seed is not None and dropped > 0
        self.scale = 65536 / (65536 - dropped) if self.active else 1.0
        if self.active:
            self._threshold = dropped - 32768
            self._like = like
            self._generator = torch.Generator(like.device).manual_seed(int(seed))

    def keep(self, block: _Block) -> Tensor:
        """(heads, n, keys) of ones, and zeros where a probability is dropped."""
        n_values = math.prod(block.shape)
        words = torch.empty((n_values + 3) // 4, dtype=torch.int64, device=self._like.device)
        words.random_(-(1 << 63), None, generator=self._generator)
        bits = words.view(torch.int16)[:n_values].view(block.shape)
        return torch.ge(bits, self._threshold, out=self._like.new_empty(block.shape))


class _Inputs(NamedTuple):
    """The op's inputs with batch and head as one axis, in the precision of the scores."""

    q: Tensor  # (B H, T, d)
    k: Tensor
    v: Tensor
    table: Tensor  # (H, 2 T - 1)
    gate: Tensor  # (B H, T)

    @classmethod
    def of(cls, *tensors: Tensor) -> _Inputs:
        *qkv, table, gate = tensors
        dtype = torch.promote_types(qkv[0].dtype, torch.float32)
        qkv = (t.to(dtype).reshape(-1, *t.shape[2:]) for t in qkv)
        return cls(*qkv, table.to(dtype), gate.to(dtype).reshape(-1, gate.shape[2]))

    def piece(self, block: _Block) -> tuple[Tensor, slice, Tensor]:
        """What of the table a block needs: heads (n_heads,), columns, their values."""
        heads = torch.arange(block.heads.start, block.heads.stop, device=self.q.device)
        heads = heads % len(self.table)
        first = self.q.shape[1] - block.queries.stop
        columns = slice(first, first + block.n_keys + block.shape[1] - 1)
        return heads, columns, self.table[:, columns].index_select(0, heads)

    def scores(self, block: _Block, piece: Tensor, memory: _Scores) -> Tensor:
        """s (heads, n, keys) in units of log 2: exp2 takes a quarter of the time of exp."""
        layout, scores = memory.of(block)
        gate = self.gate[block.heads, block.queries, None] * _LOG2_E
        torch.mul(gate, piece[:, None], out=layout)
        k = self.k[block.heads, : block.n_keys]
        scale = _LOG2_E / math.sqrt(k.shape[2])
        scores.baddbmm_(self.q[block.heads, block.queries], k.transpose(1, 2), alpha=scale)
        if block.hidden is not None:
            scores.masked_fill_(block.hidden, -torch.inf)
        return scores


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, d) and log of each softmax's sum (B, H, T), in plain torch.

    That of a row of no keys is plus infinity.
    """
    with torch.autocast(q.device.type, enabled=False):
        inputs = _Inputs.of(q, k, v, table, gate)
        out, log_sum = (t.new_empty(t.shape) for t in (inputs.q, inputs.gate))
        memory, dropout = _Scores(out), _Dropout(seed, dropout_p, out)
        for block in _blocks(q, key_lengths):
            here = block.heads, block.queries
            if block.n_keys == 0:
                out[here], log_sum[here] = 0.0, math.inf
                continue
            scores = inputs.scores(block, inputs.piece(block)[2], memory)
            largest = scores.amax(2, keepdim=True)
            scores.sub_(largest).exp2_()
            total = scores.sum(2, keepdim=True)
            log_sum[here] = (largest + total.log2()).squeeze(2).div_(_LOG2_E)
            if dropout.active:
                scores.mul_(dropout.keep(block))
            y = torch.bmm(scores, inputs.v[block.heads, : block.n_keys], out=out[here])
            y.mul_(dropout.scale / total)
            if block.hidden is not None:
                none = block.hidden.all(2)  # no key: zeros, and exp(s - log_sum) is 0
                y.masked_fill_(none[..., None], 0.0)
                log_sum[here] = log_sum[here].masked_fill(none, math.inf)
        return _frame_major(out, q), log_sum.view(gate.shape)


def _frame_major(rows: Tensor, like: Tensor) -> Tensor:
    """(B H, T, d) -> (B, H, T, d) of `like`'s dtype, with the memory of (B, T, H, d)."""
    return _empty(like).copy_(rows.view(like.shape))


def _empty(like: Tensor) -> Tensor:
    B, H, T, d = like.shape
    return like.new_empty((B, T, H, d)).transpose(1, 2)


def attention_backward_reference(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, table and gate, in plain torch.

    With dp_ij = keep_ij g_i . v_j and delta_i = g_i . y_i = sum_j p_ij dp_ij the gradient of s is
    p (dp - delta).
    """
    with torch.autocast(q.device.type, enabled=False):
        inputs = _Inputs.of(q, k, v, table, gate)
        rows, dtype = inputs.q.shape, inputs.q.dtype
        g = grad.to(dtype).reshape(rows)
        delta = torch.linalg.vecdot(g, out.to(dtype).reshape(rows))[..., None]
        log_sum = log_sum.to(dtype).view(inputs.gate.shape)[..., None] * _LOG2_E
        dq, dk, dv = (g.new_zeros(rows) for _ in range(3))
        d_table, d_gate = (t.new_zeros(t.shape) for t in (inputs.table, inputs.gate))
        memory, d_memory = _Scores(g), _Scores(g, blank=True)
        dropout, scale = _Dropout(seed, dropout_p, g), rows[2] ** -0.5
        for block in _blocks(q, key_lengths):
            if block.n_keys == 0:
                continue
            here, there = (block.heads, block.queries), (block.heads, slice(block.n_keys))
            heads, columns, piece = inputs.piece(block)
            p = inputs.scores(block, piece, memory).sub_(log_sum[here]).exp2_()
            layout, ds = d_memory.of(block)
            vt = inputs.v[there].transpose(1, 2)
            torch.baddbmm(ds, g[here], vt, beta=0, alpha=dropout.scale, out=ds)
            if dropout.active:
                keep = dropout.keep(block)
                ds.mul_(keep)
            ds.sub_(delta[here]).mul_(p)
            if dropout.active:
                p.mul_(keep)
            dv[there].baddbmm_(p.transpose(1, 2), g[here], alpha=dropout.scale)
            dk[there].baddbmm_(ds.transpose(1, 2), inputs.q[here], alpha=scale)
            torch.bmm(ds, inputs.k[there], out=dq[here])
            d_piece = torch.empty_like(piece)
            # as products of a batch these two would take as long as those with q, k and v
            for by_diagonal, of, *into in zip(
                layout, piece, inputs.gate[here], d_gate[here], d_piece
            ):
                torch.mv(by_diagonal, of, out=into[1])
                torch.mv(by_diagonal.T, into[0], out=into[2])
            d_table[:, columns].index_add_(0, heads, d_piece)
        gradients = (_frame_major(rows_of, q) for rows_of in (dq.mul_(scale), dk, dv))
        return *gradients, d_table.to(table.dtype), d_gate.to(gate.dtype).view(gate.shape)


_attention = Operator("gmm_jepa::gated_bias_attention", attention_reference)
_attention_backward = Operator(
    "gmm_jepa::gated_bias_attention_backward", attention_backward_reference
)


def _log_sum_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@_attention.register_fake
def _(q, k, v, table, gate, key_lengths, seed, dropout_p):
    return _empty(q), q.new_empty(gate.shape, dtype=_log_sum_dtype(q))


@_attention_backward.register_fake
def _(grad, out, log_sum, q, k, v, table, gate, key_lengths, seed, dropout_p):
    d_gate = gate.new_empty(gate.shape)
    return _empty(q), _empty(q), _empty(q), table.new_empty(table.shape), d_gate


def _setup(ctx, inputs, output):
    *tensors, dropout_p = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.dropout_p = dropout_p


def _vjp(ctx, grad, _):
    gradients = _attention_backward(grad, *ctx.saved_tensors, ctx.dropout_p)
    return *gradients, None, None, None


_attention.register_autograd(_vjp, setup_context=_setup)
