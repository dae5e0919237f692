"""Attention with a gated relative position bias, in tiles: no (T, T) tensor, forward or backward.

    s_ij = q_i . k_j / sqrt(d) + table[h, j - i + T - 1] gate_i
    p = softmax_j(s),   y = (keep p) v,   log_sum_i = log sum_j e^s_ij

q, k, v, y (B, H, T, d) float32, bf16 or float16, any strides, d up to 128 (padded on chip to a
power of two); table (H, 2 T - 1), gate (B, H, T). Keys from key_lengths[b] on are hidden; tiles
that hold none other are not visited. A row of no keys gives zeros, and plus infinity for log_sum.
Scores and softmax are float32, products take the inputs' dtype (float32: three tf32 products).
keep is 0 or 1 / (1 - dropout_p), drawn by a hash of the score's number i T + j and of two words
that Philox makes of the seed, batch and head, so all passes draw the same.

The gradients are in gated_bias_attention_backward.py. The table is copied with margins, so that
tiles that stick out need no mask.

Source: gmm_jepa.ops.attention; the walk is FlashAttention-2's (arXiv 2307.08691).
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
def _fwd_step(
    largest, total, y, q, gate, k_ptr, v_ptr, table_ptr, i0, j0, n_keys,
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
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    s += bias_of(table_ptr - i0, offs_i, j0 + offs_j) * gate[:, None]
    if not WHOLE:
        s = tl.where(mask_j[None, :], s, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        of_keys = (j0 + offs_j).to(tl.uint32)
        p = tl.where(is_kept(of_queries[:, None], of_keys[None, :], second, dropped), p, 0.0)
    v = load_rows(v_ptr, j0 + offs_j, offs_d, mask_j, stride_v_t, stride_v_d, D)
    y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
    return new_largest, total, y


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
    gate_ptr = rows_of(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
    gate = tl.load(gate_ptr + offs_i * stride_gate_t, mask=mask_i, other=0.0)
    gate = gate.to(tl.float32) * LOG2_E
    table_ptr += centre(row % H, T)
    k_ptr = rows_of(k_ptr, row, 0, stride_k_b, stride_k_h, stride_k_t, H)
    v_ptr = rows_of(v_ptr, row, 0, stride_v_b, stride_v_h, stride_v_t, H)
    largest = tl.full((BLOCK_I,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_I,), dtype=tl.float32)
    y = tl.zeros((BLOCK_I, D_PAD), dtype=tl.float32)
    whole = n_keys // BLOCK_J * BLOCK_J
    for j0 in range(0, whole, BLOCK_J):
        largest, total, y = _fwd_step(
            largest, total, y, q, gate, k_ptr, v_ptr, table_ptr, i0, j0, n_keys,
            of_queries, second, dropped,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, D_PAD, BLOCK_I, BLOCK_J, DROPOUT, PRECISION, True,
        )  # fmt: skip
    if whole < n_keys:
        largest, total, y = _fwd_step(
            largest, total, y, q, gate, k_ptr, v_ptr, table_ptr, i0, whole, n_keys,
            of_queries, second, dropped,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, D_PAD, BLOCK_I, BLOCK_J, DROPOUT, PRECISION, False,
        )  # fmt: skip
    log_sum = (largest + tl.log2(total)) / LOG2_E
    if n_keys == 0:  # as in FlashAttention: exp(s - log_sum) is 0
        total += 1.0
        log_sum = tl.full((BLOCK_I,), float("inf"), dtype=tl.float32)
    if DROPOUT:
        total *= 1.0 - dropout_p
    store_rows(
        rows_of(out_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
        y / total[:, None], offs_i, offs_d, mask_i, stride_o_t, stride_o_d, D,
    )  # fmt: skip
    log_sum_ptr += row.to(tl.int64) * T + i0
    tl.store(log_sum_ptr + offs_i, log_sum, mask=mask_i)


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
    options = options_of("fwd", q, dropout_p, key_lengths)
    with torch.cuda.device_of(q):
        _gated_bias_attention_fwd_kernel[(triton.cdiv(T, options["BLOCK_I"]) * B * H,)](
            q, k, v,
            with_margins(table), gate,
            log_sum if key_lengths is None else key_lengths.contiguous(),
            log_sum if seed is None else seed,
            out, log_sum, T, H,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *gate.stride(),
            D**-0.5, dropout_p, **options,
        )  # fmt: skip
    return out, log_sum
