"""Attention with a gated relative position bias, in tiles: no (T, T) tensor, forward or backward.

    s_ij = q_i . k_j / sqrt(d) + table[h, j - i + T - 1] gate_i
    p = softmax_j(s),   y = (keep p) v,   log_sum_i = log sum_j e^s_ij

q, k, v, y (B, H, T, d) float32, bf16 or float16, any strides, d up to 128 (padded on chip to a
power of two); table (H, 2 T - 1), gate (B, H, T). Keys from key_lengths[b] on are hidden; tiles
that hold none other are not visited. A row of no keys gives zeros, and plus infinity for log_sum.
Scores and softmax are float32, products take the inputs' dtype (float32: three tf32 products).
keep is 0 or 1 / (1 - dropout_p), drawn by Philox from the seed, the head and (i, j), so the
backward pass draws the same.

Backward, with dp = keep (g v'), delta_i = g_i . y_i and ds = p (dp - delta):

    dv = (keep p)' g,   dk = ds' q / sqrt(d),   dq = ds k / sqrt(d)
    dgate_i = sum_j ds_ij table[j - i],   dtable[r] = sum over b, i of ds_i,i+r gate_i

One kernel takes BLOCK queries and walks over the keys: dq, dgate, and the sums of ds gate along
the diagonals. A tile has 2 BLOCK - 1 of these; each row is turned by its own number, columns are
added, the later half waits for the next tile, and the earlier half, now whole, is written. That is
B H T / BLOCK rows of T + BLOCK partial sums, less memory than q in float32 up to T = BLOCK d, and
another kernel adds them in a fixed order: same input, same bits. Atomics into (H, 2 T - 1) would
need one addition a score, or the same sums along diagonals first, and would not keep the bits.
A third kernel takes BLOCK keys and walks over the queries: dk, dv.

Source: gmm_jepa.ops.attention; the walk is FlashAttention-2's (arXiv 2307.08691).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _row_and_block(T, BLOCK: tl.constexpr):
    """(batch, head) pair and first frame of this program; blocks of one pair are neighbours.

    On one axis of the grid: the others end at 65,535 pairs.
    """
    n_blocks = tl.cdiv(T, BLOCK)
    return tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks * BLOCK


@triton.jit
def _rows(ptr, row, first, stride_b, stride_h, stride_t, H):
    """Where frame `first` of a (B, H, T, ...) tensor's (batch, head) pair `row` begins, 64 bits."""
    row = row.to(tl.int64)
    return ptr + row // H * stride_b + row % H * stride_h + (first + 0 * row) * stride_t


@triton.jit
def _load_rows(ptr, offs_t, offs_d, mask_t, stride_t, stride_d, D: tl.constexpr):
    """(BLOCK, D_PAD) of the rows that begin at `ptr`, zero beyond."""
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    return tl.load(
        ptr + offs_t[:, None] * stride_t + offs_d[None, :] * stride_d, mask=mask, other=0.0
    )


@triton.jit
def _store_rows(ptr, values, offs_t, offs_d, mask_t, stride_t, stride_d, D: tl.constexpr):
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    ptrs = ptr + offs_t[:, None] * stride_t + offs_d[None, :] * stride_d
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep(seed, i, j, T, dropout_p):
    """1 / (1 - dropout_p), or 0 where the probability of query i and key j is dropped."""
    drawn = tl.rand(seed, i * T + j)
    return tl.where(drawn > dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit(do_not_specialize=["T"])
def _gated_bias_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, gate_ptr, lengths_ptr, seed_ptr, out_ptr, log_sum_ptr,
    T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, i0 = _row_and_block(T, BLOCK)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D_PAD)
    mask_i = i0 + offs < T
    n_keys = tl.load(lengths_ptr + row // H).to(tl.int32) if RAGGED else T
    if DROPOUT:
        seed = tl.load(seed_ptr) + row
    q = _load_rows(
        _rows(q_ptr, row, i0, stride_q_b, stride_q_h, stride_q_t, H),
        offs, offs_d, mask_i, stride_q_t, stride_q_d, D,
    )  # fmt: skip
    gate_ptr = _rows(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
    gate = tl.load(gate_ptr + offs * stride_gate_t, mask=mask_i, other=0.0).to(tl.float32) * LOG2_E
    table_ptr += (row % H).to(tl.int64) * (2 * T - 1) + T - 1
    largest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    y = tl.zeros((BLOCK, D_PAD), dtype=tl.float32)
    for j0 in range(0, n_keys, BLOCK):
        mask_j = j0 + offs < n_keys
        k = _load_rows(
            _rows(k_ptr, row, j0, stride_k_b, stride_k_h, stride_k_t, H),
            offs, offs_d, mask_j, stride_k_t, stride_k_d, D,
        )  # fmt: skip
        mask = mask_i[:, None] & mask_j[None, :]
        position = (j0 - i0) + offs[None, :] - offs[:, None]
        bias = tl.load(table_ptr + position, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        s = tl.where(mask_j[None, :], s + bias * gate[:, None], -float("inf"))
        new_largest = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p *= _keep(seed, (i0 + offs)[:, None], (j0 + offs)[None, :], T, dropout_p)
        v = _load_rows(
            _rows(v_ptr, row, j0, stride_v_b, stride_v_h, stride_v_t, H),
            offs, offs_d, mask_j, stride_v_t, stride_v_d, D,
        )  # fmt: skip
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    log_sum = (largest + tl.log2(total)) / LOG2_E
    if n_keys == 0:  # as in FlashAttention: exp(s - log_sum) is 0
        total += 1.0
        log_sum = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    _store_rows(
        _rows(out_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
        y / total[:, None], offs, offs_d, mask_i, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    log_sum_ptr += row.to(tl.int64) * T + i0
    tl.store(log_sum_ptr + offs, log_sum, mask=mask_i)


@triton.jit(do_not_specialize=["T", "width"])
def _gated_bias_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, gate_ptr, lengths_ptr, seed_ptr, g_ptr, out_ptr, log_sum_ptr,
    dq_ptr, d_gate_ptr, delta_ptr, partials_ptr,
    T, H, width,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, i0 = _row_and_block(T, BLOCK)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D_PAD)
    mask_i = i0 + offs < T
    n_keys = tl.load(lengths_ptr + row // H).to(tl.int32) if RAGGED else T
    if DROPOUT:
        seed = tl.load(seed_ptr) + row
    q = _load_rows(
        _rows(q_ptr, row, i0, stride_q_b, stride_q_h, stride_q_t, H),
        offs, offs_d, mask_i, stride_q_t, stride_q_d, D,
    )  # fmt: skip
    g = _load_rows(
        _rows(g_ptr, row, i0, stride_g_b, stride_g_h, stride_g_t, H),
        offs, offs_d, mask_i, stride_g_t, stride_g_d, D,
    )  # fmt: skip
    y = _load_rows(
        _rows(out_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
        offs, offs_d, mask_i, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
    of_row = row.to(tl.int64) * T + i0
    tl.store(delta_ptr + of_row + offs, delta, mask=mask_i)
    log_sum = tl.load(log_sum_ptr + of_row + offs, mask=mask_i, other=0.0) * LOG2_E
    gate_ptr = _rows(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
    gate = tl.load(gate_ptr + offs * stride_gate_t, mask=mask_i, other=0.0).to(tl.float32)
    table_ptr += (row % H).to(tl.int64) * (2 * T - 1) + T - 1
    partials_ptr += tl.program_id(0).to(tl.int64) * width
    dq = tl.zeros((BLOCK, D_PAD), dtype=tl.float32)
    d_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    waiting = tl.zeros((BLOCK,), dtype=tl.float32)  # the diagonals that the next tile begins with
    turned = offs[:, None] + offs[None, :] + 1  # column of row i that lies on diagonal c, + BLOCK
    for j0 in range(0, n_keys, BLOCK):
        mask_j = j0 + offs < n_keys
        k = _load_rows(
            _rows(k_ptr, row, j0, stride_k_b, stride_k_h, stride_k_t, H),
            offs, offs_d, mask_j, stride_k_t, stride_k_d, D,
        )  # fmt: skip
        v = _load_rows(
            _rows(v_ptr, row, j0, stride_v_b, stride_v_h, stride_v_t, H),
            offs, offs_d, mask_j, stride_v_t, stride_v_d, D,
        )  # fmt: skip
        mask = mask_i[:, None] & mask_j[None, :]
        position = (j0 - i0) + offs[None, :] - offs[:, None]
        bias = tl.load(table_ptr + position, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        s += bias * (gate * LOG2_E)[:, None]
        p = tl.where(mask, tl.exp2(s - log_sum[:, None]), 0.0)
        ds = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            ds *= _keep(seed, (i0 + offs)[:, None], (j0 + offs)[None, :], T, dropout_p)
        ds = p * (ds - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        d_gate += tl.sum(ds * bias, 1)
        along = tl.gather(ds * gate[:, None], turned % BLOCK, 1)
        before = tl.sum(tl.where(turned >= BLOCK, along, 0.0), 0)
        tl.store(partials_ptr + j0 + offs, waiting + before)
        waiting = tl.sum(tl.where(turned < BLOCK, along, 0.0), 0)
    tl.store(partials_ptr + tl.cdiv(n_keys, BLOCK) * BLOCK + offs, waiting)
    for j0 in range((tl.cdiv(n_keys, BLOCK) + 1) * BLOCK, width, BLOCK):  # keys that a row lacks
        tl.store(partials_ptr + j0 + offs, tl.zeros((BLOCK,), dtype=tl.float32))
    _store_rows(
        _rows(dq_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
        dq * scale, offs, offs_d, mask_i, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    tl.store(d_gate_ptr + of_row + offs, d_gate, mask=mask_i)


@triton.jit(do_not_specialize=["T"])
def _gated_bias_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, gate_ptr, lengths_ptr, seed_ptr, g_ptr, log_sum_ptr,
    delta_ptr, dk_ptr, dv_ptr,
    T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, j0 = _row_and_block(T, BLOCK)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D_PAD)
    n_keys = tl.load(lengths_ptr + row // H).to(tl.int32) if RAGGED else T
    mask_j = j0 + offs < n_keys
    if DROPOUT:
        seed = tl.load(seed_ptr) + row
    k = _load_rows(
        _rows(k_ptr, row, j0, stride_k_b, stride_k_h, stride_k_t, H),
        offs, offs_d, mask_j, stride_k_t, stride_k_d, D,
    )  # fmt: skip
    v = _load_rows(
        _rows(v_ptr, row, j0, stride_v_b, stride_v_h, stride_v_t, H),
        offs, offs_d, mask_j, stride_v_t, stride_v_d, D,
    )  # fmt: skip
    table_ptr += (row % H).to(tl.int64) * (2 * T - 1) + T - 1
    dk = tl.zeros((BLOCK, D_PAD), dtype=tl.float32)
    dv = tl.zeros((BLOCK, D_PAD), dtype=tl.float32)
    last = tl.where(j0 < n_keys, T, 0)  # keys that a row lacks have no gradient
    for i0 in range(0, last, BLOCK):
        mask_i = i0 + offs < T
        q = _load_rows(
            _rows(q_ptr, row, i0, stride_q_b, stride_q_h, stride_q_t, H),
            offs, offs_d, mask_i, stride_q_t, stride_q_d, D,
        )  # fmt: skip
        g = _load_rows(
            _rows(g_ptr, row, i0, stride_g_b, stride_g_h, stride_g_t, H),
            offs, offs_d, mask_i, stride_g_t, stride_g_d, D,
        )  # fmt: skip
        of_row = row.to(tl.int64) * T + i0
        log_sum = tl.load(log_sum_ptr + of_row + offs, mask=mask_i, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + of_row + offs, mask=mask_i, other=0.0)
        gate_ptrs = _rows(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
        gate = tl.load(gate_ptrs + offs * stride_gate_t, mask=mask_i, other=0.0).to(tl.float32)
        mask = mask_j[:, None] & mask_i[None, :]  # keys by queries
        position = (j0 - i0) + offs[:, None] - offs[None, :]
        bias = tl.load(table_ptr + position, mask=mask, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        s += bias * (gate * LOG2_E)[None, :]
        p = tl.where(mask, tl.exp2(s - log_sum[None, :]), 0.0)
        ds = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        kept = p
        if DROPOUT:
            keep = _keep(seed, (i0 + offs)[None, :], (j0 + offs)[:, None], T, dropout_p)
            ds *= keep
            kept *= keep
        ds = p * (ds - delta[None, :])
        dv = tl.dot(kept.to(g.dtype), g, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    mask_j = j0 + offs < T
    _store_rows(
        _rows(dk_ptr, row, j0, stride_o_b, stride_o_h, stride_o_t, H),
        dk * scale, offs, offs_d, mask_j, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    _store_rows(
        _rows(dv_ptr, row, j0, stride_o_b, stride_o_h, stride_o_t, H),
        dv, offs, offs_d, mask_j, stride_o_t, stride_o_d, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T", "n_blocks", "width"])
def _gated_bias_attention_bwd_table_kernel(
    partials_ptr, d_table_ptr, B, H, T, n_blocks, width,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # j - i + T - 1
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for b in range(B):
        ptr = partials_ptr + (b * H + head).to(tl.int64) * n_blocks * width
        for block in range(n_blocks):
            column = offs_r - (T - 1) + (block + 1) * BLOCK - 1
            mask = (column >= 0) & (column < width)
            total += tl.load(ptr + column, mask=mask, other=0.0)
            ptr += width
    d_table_ptr += head.to(tl.int64) * (2 * T - 1)
    tl.store(d_table_ptr + offs_r, total, mask=offs_r < 2 * T - 1)


def config(D_pad: int, dtype: torch.dtype, *, backward: bool = False) -> dict[str, int]:
    """Tile and schedule: the largest that compiles for sm_90 without spills (bench/results).

    The larger one beside it spills, with dropout: float32 forward 60 bytes at d = 64; backward
    444 at d = 16 and 48 at d = 64.
    """
    if dtype == torch.float32:
        if not backward:
            return {"BLOCK": 64 if D_pad <= 16 else 32, "num_warps": 4, "num_stages": 2}
        if D_pad > 64:
            return {"BLOCK": 16, "num_warps": 8, "num_stages": 1}
        return {"BLOCK": 32 if D_pad <= 16 else 16, "num_warps": 4, "num_stages": 2}
    if backward and D_pad >= 64:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK": 64, "num_warps": 8 if backward or D_pad > 64 else 4, "num_stages": 2}


def _options(
    q: Tensor, dropout_p: float, key_lengths: Tensor | None, *, backward: bool = False
) -> dict:
    D = q.shape[3]
    D_pad = max(16, triton.next_power_of_2(D))
    return {
        "D": D,
        "D_PAD": D_pad,
        "RAGGED": key_lengths is not None,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        **config(D_pad, q.dtype, backward=backward),
    }


def gated_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    key_lengths: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, d) with the memory of (B, T, H, d), log_sum (B, H, T) float32."""
    B, H, T, D = q.shape
    out = q.new_empty((B, T, H, D)).transpose(1, 2)
    log_sum = q.new_empty((B, H, T), dtype=torch.float32)
    if q.numel() == 0:
        return out, log_sum
    options = _options(q, dropout_p, key_lengths)
    with torch.cuda.device_of(q):
        _gated_bias_attention_fwd_kernel[(triton.cdiv(T, options["BLOCK"]) * B * H,)](
            q, k, v,
            table.float().contiguous(), gate,
            log_sum if key_lengths is None else key_lengths.contiguous(),
            log_sum if seed is None else seed,
            out, log_sum, T, H,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *gate.stride(),
            D**-0.5, dropout_p, **options,
        )  # fmt: skip
    return out, log_sum


def gated_bias_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    key_lengths: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (with the memory of (B, T, H, d)), table and gate."""
    B, H, T, D = q.shape
    dq, dk, dv = (q.new_empty((B, T, H, D)).transpose(1, 2) for _ in range(3))
    d_table = q.new_zeros(table.shape, dtype=torch.float32)
    d_gate, delta = (q.new_empty((B, H, T), dtype=torch.float32) for _ in range(2))
    if q.numel() == 0:
        return dq, dk, dv, d_table.to(table.dtype), d_gate.zero_().to(gate.dtype)
    options = _options(q, dropout_p, key_lengths, backward=True)
    BLOCK, BLOCK_R = options["BLOCK"], 256
    n_blocks = triton.cdiv(T, BLOCK)
    width = (n_blocks + 1) * BLOCK
    partials = q.new_empty((B * H, n_blocks, width), dtype=torch.float32)
    inputs = (
        q, k, v,
        table.float().contiguous(), gate,
        log_sum if key_lengths is None else key_lengths.contiguous(),
        log_sum if seed is None else seed,
    )  # fmt: skip
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    after = (*dq.stride(), *gate.stride(), D**-0.5, dropout_p)
    with torch.cuda.device_of(q):
        _gated_bias_attention_bwd_q_kernel[(n_blocks * B * H,)](
            *inputs, grad, out, log_sum, dq, d_gate, delta, partials, T, H, width,
            *strides, *after, **options,
        )  # fmt: skip
        _gated_bias_attention_bwd_kv_kernel[(n_blocks * B * H,)](
            *inputs, grad, log_sum, delta, dk, dv, T, H, *strides, *after, **options
        )
        _gated_bias_attention_bwd_table_kernel[(triton.cdiv(2 * T - 1, BLOCK_R), H)](
            partials, d_table, B, H, T, n_blocks, width, BLOCK=BLOCK, BLOCK_R=BLOCK_R
        )
    return dq, dk, dv, d_table.to(table.dtype), d_gate.to(gate.dtype)
