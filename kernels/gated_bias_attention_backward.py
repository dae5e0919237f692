"""The gradients of gated-bias attention, in tiles; notation and forward: gated_bias_attention.py.

Backward, with dp = keep (g v'), delta_i = g_i . y_i and ds = p (dp - delta):

    dv = (keep p)' g,   dk = ds' q / sqrt(d),   dq = ds k / sqrt(d)
    dgate_i = sum_j ds_ij table[j - i],   dtable[r] = sum over b, i of ds_i,i+r gate_i

One kernel takes a block of queries and walks over the keys: dq, dgate. Another takes a block of
keys and walks over the queries: dk, dv. A third takes one square tile of one head and walks over
the batch: it adds up ds gate in registers, and only then sums along the tile's diagonals, whose
two halves (a tile has 2 BLOCK - 1) the last kernel adds to those of other tiles in a fixed order:
same input, same bits. Scores are computed once more for that, which costs a fraction of what sums
along the diagonals of every row of the batch did (13 ms against 10 of the gradients themselves).
Atomics into (H, 2 T - 1) would need one addition a score and would not keep the bits.

The sums take 2 H T (T / BLOCK + 1) floats, which no length of batch adds to.

Source: gmm_jepa.ops.attention; the walk is that of FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    LOG2_E,
    bias_of,
    centre,
    is_kept,
    load_rows,
    options_of,
    row_and_block,
    rows_of,
    score_numbers,
    seeds_of,
    store_rows,
    threshold_of,
    with_margins,
)


@triton.jit
def _for_dropout(log_sum, delta, dropout_p):
    """Of p / (1 - dropout_p) and its gradient: p (keep dp / (1 - dropout_p) - delta) without it."""
    return log_sum + tl.log2(tl.cast(1.0 - dropout_p, tl.float32)), delta * (1.0 - dropout_p)


@triton.jit
def _bwd_q_step(
    dq, d_gate, q, g, gate, log_sum, delta, k_ptr, v_ptr, table_ptr, i0, j0, n_keys,
    of_queries, second, dropped,
    stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys, WHOLE where all of them exist."""
    offs_i, offs_j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    offs_d = tl.arange(0, D_PAD)
    mask_j = (j0 + offs_j < n_keys) | WHOLE
    k = load_rows(k_ptr, j0 + offs_j, offs_d, mask_j, stride_k_t, stride_k_d, D)
    v = load_rows(v_ptr, j0 + offs_j, offs_d, mask_j, stride_v_t, stride_v_d, D)
    bias = bias_of(table_ptr - i0, offs_i, j0 + offs_j)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias * gate[:, None]
    p = tl.exp2(s - log_sum[:, None])
    if not WHOLE:
        p = tl.where(mask_j[None, :], p, 0.0)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        of_keys = (j0 + offs_j).to(tl.uint32)
        dp = tl.where(is_kept(of_queries[:, None], of_keys[None, :], second, dropped), dp, 0.0)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, d_gate + tl.sum(ds * bias, 1)


@triton.jit(do_not_specialize=["T"])
def _gated_bias_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, gate_ptr, lengths_ptr, seed_ptr, g_ptr, out_ptr, log_sum_ptr,
    dq_ptr, d_gate_ptr, delta_ptr, shifted_ptr,
    T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, i0 = row_and_block(T, BLOCK_I)
    offs_i, offs_d = tl.arange(0, BLOCK_I), tl.arange(0, D_PAD)
    mask_i = i0 + offs_i < T
    n_keys = tl.load(lengths_ptr + row // H).to(tl.int32) if RAGGED else T
    of_queries, second, dropped = 0, 0, 0
    if DROPOUT:
        first, second = seeds_of(seed_ptr, row)
        of_queries, dropped = score_numbers(i0 + offs_i, first, T), threshold_of(dropout_p)
    q = load_rows(
        rows_of(q_ptr, row, i0, stride_q_b, stride_q_h, stride_q_t, H),
        offs_i, offs_d, mask_i, stride_q_t, stride_q_d, D,
    )  # fmt: skip
    g = load_rows(
        rows_of(g_ptr, row, i0, stride_g_b, stride_g_h, stride_g_t, H),
        offs_i, offs_d, mask_i, stride_g_t, stride_g_d, D,
    )  # fmt: skip
    y = load_rows(
        rows_of(out_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
        offs_i, offs_d, mask_i, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
    of_row = row.to(tl.int64) * T + i0
    log_sum = tl.load(log_sum_ptr + of_row + offs_i, mask=mask_i, other=float("inf")) * LOG2_E
    if DROPOUT:
        log_sum, delta = _for_dropout(log_sum, delta, dropout_p)
    tl.store(delta_ptr + of_row + offs_i, delta, mask=mask_i)
    tl.store(shifted_ptr + of_row + offs_i, log_sum, mask=mask_i)
    gate_ptr = rows_of(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
    gate = tl.load(gate_ptr + offs_i * stride_gate_t, mask=mask_i, other=0.0)
    gate = gate.to(tl.float32) * LOG2_E
    table_ptr += centre(row % H, T)
    k_ptr = rows_of(k_ptr, row, 0, stride_k_b, stride_k_h, stride_k_t, H)
    v_ptr = rows_of(v_ptr, row, 0, stride_v_b, stride_v_h, stride_v_t, H)
    dq = tl.zeros((BLOCK_I, D_PAD), dtype=tl.float32)
    d_gate = tl.zeros((BLOCK_I,), dtype=tl.float32)
    whole = n_keys // BLOCK_J * BLOCK_J
    for j0 in range(0, whole, BLOCK_J):
        dq, d_gate = _bwd_q_step(
            dq, d_gate, q, g, gate, log_sum, delta, k_ptr, v_ptr, table_ptr, i0, j0, n_keys,
            of_queries, second, dropped,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, D_PAD, BLOCK_I, BLOCK_J, DROPOUT, PRECISION, True,
        )  # fmt: skip
    if whole < n_keys:
        dq, d_gate = _bwd_q_step(
            dq, d_gate, q, g, gate, log_sum, delta, k_ptr, v_ptr, table_ptr, i0, whole, n_keys,
            of_queries, second, dropped,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, D_PAD, BLOCK_I, BLOCK_J, DROPOUT, PRECISION, False,
        )  # fmt: skip
    store_rows(
        rows_of(dq_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
        dq * scale, offs_i, offs_d, mask_i, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    tl.store(d_gate_ptr + of_row + offs_i, d_gate, mask=mask_i)


@triton.jit
def _bwd_kv_step(
    dk, dv, k, v, q_ptr, g_ptr, gate_ptr, log_sum_ptr, delta_ptr, turned_ptr, i0, j0, T,
    first, second, dropped,
    stride_q_t, stride_q_d, stride_g_t, stride_g_d, stride_gate_t, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of queries, WHOLE where all of them exist; keys are its rows.

    The table is turned round: with what lies side by side in memory side by side in the tile, no
    two lanes meet in a bank of shared memory.
    """
    offs_i, offs_j = i0 + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    offs_d = tl.arange(0, D_PAD)
    mask_i = (offs_i < T) | WHOLE
    q = load_rows(q_ptr, offs_i, offs_d, mask_i, stride_q_t, stride_q_d, D)
    g = load_rows(g_ptr, offs_i, offs_d, mask_i, stride_g_t, stride_g_d, D)
    if WHOLE:
        log_sum = tl.load(log_sum_ptr + offs_i)
        delta = tl.load(delta_ptr + offs_i)
        gate = tl.load(gate_ptr + offs_i * stride_gate_t)
    else:  # plus infinity: a query that is not there has no probability
        log_sum = tl.load(log_sum_ptr + offs_i, mask=mask_i, other=float("inf"))
        delta = tl.load(delta_ptr + offs_i, mask=mask_i, other=0.0)
        gate = tl.load(gate_ptr + offs_i * stride_gate_t, mask=mask_i, other=0.0)
    gate = gate.to(tl.float32) * LOG2_E
    bias = bias_of(turned_ptr - j0, offs_j, offs_i)  # i - j
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    p = tl.exp2(s + bias * gate[None, :] - log_sum[None, :])
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    kept = p
    if DROPOUT:
        of_queries, of_keys = score_numbers(offs_i, first, T), (j0 + offs_j).to(tl.uint32)
        keep = is_kept(of_queries[None, :], of_keys[:, None], second, dropped)
        dp = tl.where(keep, dp, 0.0)
        kept = tl.where(keep, p, 0.0)
    ds = p * (dp - delta[None, :])
    dv = tl.dot(kept.to(g.dtype), g, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def _gated_bias_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, turned_ptr, gate_ptr, lengths_ptr, seed_ptr, g_ptr, shifted_ptr,
    delta_ptr, dk_ptr, dv_ptr,
    T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, j0 = row_and_block(T, BLOCK_J)
    offs_j, offs_d = tl.arange(0, BLOCK_J), tl.arange(0, D_PAD)
    n_keys = tl.load(lengths_ptr + row // H).to(tl.int32) if RAGGED else T
    mask_j = j0 + offs_j < n_keys
    first, second, dropped = 0, 0, 0
    if DROPOUT:
        first, second = seeds_of(seed_ptr, row)
        dropped = threshold_of(dropout_p)
    k = load_rows(
        rows_of(k_ptr, row, j0, stride_k_b, stride_k_h, stride_k_t, H),
        offs_j, offs_d, mask_j, stride_k_t, stride_k_d, D,
    )  # fmt: skip
    v = load_rows(
        rows_of(v_ptr, row, j0, stride_v_b, stride_v_h, stride_v_t, H),
        offs_j, offs_d, mask_j, stride_v_t, stride_v_d, D,
    )  # fmt: skip
    turned_ptr += centre(row % H, T)
    q_ptr = rows_of(q_ptr, row, 0, stride_q_b, stride_q_h, stride_q_t, H)
    g_ptr = rows_of(g_ptr, row, 0, stride_g_b, stride_g_h, stride_g_t, H)
    gate_ptr = rows_of(gate_ptr, row, 0, stride_gate_b, stride_gate_h, stride_gate_t, H)
    shifted_ptr += row.to(tl.int64) * T
    delta_ptr += row.to(tl.int64) * T
    dk = tl.zeros((BLOCK_J, D_PAD), dtype=tl.float32)
    dv = tl.zeros((BLOCK_J, D_PAD), dtype=tl.float32)
    last = tl.where(j0 < n_keys, T, 0)  # keys that a row lacks have no gradient
    whole = last // BLOCK_I * BLOCK_I
    for i0 in range(0, whole, BLOCK_I):
        dk, dv = _bwd_kv_step(
            dk, dv, k, v, q_ptr, g_ptr, gate_ptr, shifted_ptr, delta_ptr, turned_ptr, i0, j0, T,
            first, second, dropped,
            stride_q_t, stride_q_d, stride_g_t, stride_g_d, stride_gate_t, scale * LOG2_E,
            D, D_PAD, BLOCK_I, BLOCK_J, DROPOUT, PRECISION, True,
        )  # fmt: skip
    if whole < last:
        dk, dv = _bwd_kv_step(
            dk, dv, k, v, q_ptr, g_ptr, gate_ptr, shifted_ptr, delta_ptr, turned_ptr, whole, j0, T,
            first, second, dropped,
            stride_q_t, stride_q_d, stride_g_t, stride_g_d, stride_gate_t, scale * LOG2_E,
            D, D_PAD, BLOCK_I, BLOCK_J, DROPOUT, PRECISION, False,
        )  # fmt: skip
    # What keys that a row lacks have gathered is anything.
    dk = tl.where(mask_j[:, None], dk * scale, 0.0)
    dv = tl.where(mask_j[:, None], dv, 0.0)
    mask_j = j0 + offs_j < T
    store_rows(
        rows_of(dk_ptr, row, j0, stride_o_b, stride_o_h, stride_o_t, H),
        dk, offs_j, offs_d, mask_j, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    store_rows(
        rows_of(dv_ptr, row, j0, stride_o_b, stride_o_h, stride_o_t, H),
        dv, offs_j, offs_d, mask_j, stride_o_t, stride_o_d, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T"])
def _gated_bias_attention_bwd_table_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, gate_ptr, lengths_ptr, seed_ptr, g_ptr, shifted_ptr,
    delta_ptr, partials_ptr,
    B, T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(T, BLOCK)
    head = tl.program_id(0) // (n_blocks * n_blocks)
    tile = tl.program_id(0) % (n_blocks * n_blocks)
    i0, j0 = tile // n_blocks * BLOCK, tile % n_blocks * BLOCK
    offs, offs_d = tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    mask_i = i0 + offs < T
    bias = bias_of(table_ptr + centre(head, T) + j0 - i0, offs, offs)
    # in the layout of the products, once and not for every row of the batch
    nothing = tl.zeros((BLOCK, D_PAD), dtype=q_ptr.dtype.element_ty)
    bias += tl.dot(nothing, tl.trans(nothing))
    dropped = threshold_of(dropout_p)
    q_ptr = rows_of(q_ptr, head, i0, stride_q_b, stride_q_h, stride_q_t, H)
    g_ptr = rows_of(g_ptr, head, i0, stride_g_b, stride_g_h, stride_g_t, H)
    k_ptr = rows_of(k_ptr, head, j0, stride_k_b, stride_k_h, stride_k_t, H)
    v_ptr = rows_of(v_ptr, head, j0, stride_v_b, stride_v_h, stride_v_t, H)
    gate_ptr = rows_of(gate_ptr, head, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
    shifted_ptr += head.to(tl.int64) * T + i0
    delta_ptr += head.to(tl.int64) * T + i0
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for b in range(0, B):
        n_keys = tl.load(lengths_ptr + b).to(tl.int32) if RAGGED else T
        mask_j = j0 + offs < n_keys
        q = load_rows(q_ptr, offs, offs_d, mask_i, stride_q_t, stride_q_d, D)
        g = load_rows(g_ptr, offs, offs_d, mask_i, stride_g_t, stride_g_d, D)
        k = load_rows(k_ptr, offs, offs_d, mask_j, stride_k_t, stride_k_d, D)
        v = load_rows(v_ptr, offs, offs_d, mask_j, stride_v_t, stride_v_d, D)
        log_sum = tl.load(shifted_ptr + offs, mask=mask_i, other=float("inf"))
        delta = tl.load(delta_ptr + offs, mask=mask_i, other=0.0)
        gate = tl.load(gate_ptr + offs * stride_gate_t, mask=mask_i, other=0.0).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.exp2(s + bias * (gate * LOG2_E)[:, None] - log_sum[:, None])
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            first, second = seeds_of(seed_ptr, b * H + head)
            of_queries, of_keys = score_numbers(i0 + offs, first, T), (j0 + offs).to(tl.uint32)
            dp = tl.where(is_kept(of_queries[:, None], of_keys[None, :], second, dropped), dp, 0.0)
        total += tl.where(mask_j[None, :], p * (dp - delta[:, None]) * gate[:, None], 0.0)
        q_ptr += stride_q_b
        g_ptr += stride_g_b
        k_ptr += stride_k_b
        v_ptr += stride_v_b
        gate_ptr += stride_gate_b
        shifted_ptr += tl.cast(H, tl.int64) * T
        delta_ptr += tl.cast(H, tl.int64) * T
    # Row i turned by i + 1 has its diagonals in columns; the later ones go to the next tile.
    turned = offs[:, None] + offs[None, :] + 1
    along = tl.gather(total, turned % BLOCK, 1)
    partials_ptr += tl.program_id(0).to(tl.int64) * 2 * BLOCK
    tl.store(partials_ptr + offs, tl.sum(tl.where(turned >= BLOCK, along, 0.0), 0))
    tl.store(partials_ptr + BLOCK + offs, tl.sum(tl.where(turned < BLOCK, along, 0.0), 0))


@triton.jit(do_not_specialize=["T"])
def _gated_bias_attention_bwd_table_sum_kernel(
    partials_ptr, d_table_ptr, T, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    n_blocks = tl.cdiv(T, BLOCK)
    head = tl.program_id(1)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # j - i + T - 1
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    partials_ptr += head.to(tl.int64) * n_blocks * n_blocks * 2 * BLOCK
    for block in range(n_blocks):
        column = offs_r - (T - 1) + (block + 1) * BLOCK - 1
        tile, place = column // BLOCK, column % BLOCK
        ptrs = partials_ptr + tile * 2 * BLOCK + place
        total += tl.load(ptrs, mask=(column >= 0) & (tile < n_blocks), other=0.0)
        ptrs -= BLOCK  # the tile before, its second half
        total += tl.load(ptrs, mask=(column >= BLOCK) & (tile <= n_blocks), other=0.0)
        partials_ptr += n_blocks * 2 * BLOCK
    d_table_ptr += head.to(tl.int64) * (2 * T - 1)
    tl.store(d_table_ptr + offs_r, total, mask=offs_r < 2 * T - 1)


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
    d_table = q.new_empty(table.shape, dtype=torch.float32)
    d_gate, delta, shifted = (q.new_empty((B, H, T), dtype=torch.float32) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv, d_table.zero_().to(table.dtype), d_gate.zero_().to(gate.dtype)
    of_queries, of_keys, of_table = (
        options_of(kernel, q, dropout_p, key_lengths) for kernel in ("bwd_q", "bwd_kv", "bwd_table")
    )
    BLOCK, BLOCK_R = of_table["BLOCK"], 256
    n_tiles = H * triton.cdiv(T, BLOCK) ** 2
    partials = q.new_empty((n_tiles, 2, BLOCK), dtype=torch.float32)
    by_position = with_margins(table)
    of_rows = (
        gate,
        log_sum if key_lengths is None else key_lengths.contiguous(),
        log_sum if seed is None else seed,
        grad,
    )
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    numbers = (D**-0.5, dropout_p)
    after = (*dq.stride(), *gate.stride(), *numbers)
    with torch.cuda.device_of(q):
        _gated_bias_attention_bwd_q_kernel[(triton.cdiv(T, of_queries["BLOCK_I"]) * B * H,)](
            q, k, v, by_position, *of_rows, out, log_sum, dq, d_gate, delta, shifted,
            T, H, *strides, *after, **of_queries,
        )  # fmt: skip
        _gated_bias_attention_bwd_kv_kernel[(triton.cdiv(T, of_keys["BLOCK_J"]) * B * H,)](
            q,
            k,
            v,
            by_position.flip(1),
            *of_rows,
            shifted,
            delta,
            dk,
            dv,
            T,
            H,
            *strides,
            *after,
            **of_keys,
        )
        _gated_bias_attention_bwd_table_kernel[(n_tiles,)](
            q, k, v, by_position, *of_rows, shifted, delta, partials,
            B, T, H, *strides, *gate.stride(), *numbers, **of_table,
        )  # fmt: skip
        _gated_bias_attention_bwd_table_sum_kernel[(triton.cdiv(2 * T - 1, BLOCK_R), H)](
            partials, d_table, T, BLOCK=BLOCK, BLOCK_R=BLOCK_R
        )
    return dq, dk, dv, d_table.to(table.dtype), d_gate.to(gate.dtype)
