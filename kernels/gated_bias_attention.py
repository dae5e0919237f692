"""Attention with a gated relative position bias, in tiles: no (T, T) tensor, forward or backward.

    s_ij = q_i . k_j / sqrt(d) + table[h, j - i + T - 1] gate_i
    p = softmax_j(s),   y = (keep p) v,   log_sum_i = log sum_j e^s_ij

q, k, v, y (B, H, T, d) float32, bf16 or float16, any strides, d up to 128 (padded on chip to a
power of two); table (H, 2 T - 1), gate (B, H, T). Keys from key_lengths[b] on are hidden; tiles
that hold none other are not visited. A row of no keys gives zeros, and plus infinity for log_sum.
Scores and softmax are float32, products take the inputs' dtype (float32: three tf32 products).
keep is 0 or 1 / (1 - dropout_p), drawn by a hash of i and j and of two words that Philox makes of
the seed, batch and head, so all passes draw the same.

With 16 values to a product what counts is instructions a score. A program takes one block of
queries of one head in a few rows of the batch, which have the bias in common: a tile of it is
loaded, and laid out as the products are, once for all of them. It enters as what the product adds
to, over the scale, so that score, scale and maximum are one multiplication and addition. At bf16,
d = 16 and two rows the loop has 8.5 instructions a score, with dropout 13.1, of which the hash 2.5;
with the bias loaded by every row, and a hash a score, it had 14.4 and 25.

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
    batch_row,
    bias_of,
    centre,
    grid_of,
    group_and_block,
    is_kept,
    keys_of,
    laid_out_as_rows,
    load_rows,
    options_of,
    rows_of,
    seeds_of,
    spread,
    store_rows,
    threshold_of,
    with_margins,
    without_bit_3,
)


@triton.jit
def _fwd_step(
    state, q, bias, gate, k, v, mask_j, j0, words,
    offs_i, offs_j, scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys for one row of the batch, WHOLE where all of them exist."""
    largest, total, y = state
    of_queries, second, dropped = words
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) + bias * gate[:, None]
    if not WHOLE:
        s = tl.where(mask_j[None, :], s, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s * scale - (new_largest * scale)[:, None])
    shrink = tl.exp2((largest - new_largest) * scale)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        numbers = (of_queries ^ j0)[:, None] ^ without_bit_3(offs_j)[None, :]
        keep = is_kept(numbers, offs_i[:, None], offs_j[None, :], second, dropped)
        # Zero, and no constant: with one the compiler rounds first, and takes pairs apart. As a
        # difference it would be contracted with the product that scale is: a rounding error.
        p = tl.where(keep, p, scale * 0.0)
    y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
    return new_largest, total, y


@triton.jit
def _fwd_tile(
    states, queries, table_ptr, offs_i, offs_j, offs_d, j0,
    stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale,
    D: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys for all rows of a group: the bias is loaded once."""
    bias = bias_of(table_ptr + j0, offs_i, offs_j)
    after = ()
    for r in tl.static_range(ROWS):
        q, gate, words, n_keys, k_ptr, v_ptr = queries[r]
        state = states[r]
        mask_j = (j0 + offs_j < n_keys) | WHOLE
        if WHOLE or j0 < n_keys:
            k = load_rows(k_ptr, j0 + offs_j, offs_d, mask_j, stride_k_t, stride_k_d, D)
            v = load_rows(v_ptr, j0 + offs_j, offs_d, mask_j, stride_v_t, stride_v_d, D)
            state = _fwd_step(
                state, q, bias, gate, k, v, mask_j, j0, words,
                offs_i, offs_j, scale, DROPOUT, PRECISION, WHOLE,
            )  # fmt: skip
        after += (state,)
    return after


@triton.jit(do_not_specialize=["B", "T"])
def _gated_bias_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, gate_ptr, lengths_ptr, seed_ptr, out_ptr, log_sum_ptr,
    B, T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_gate_b, stride_gate_h, stride_gate_t,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    ROWS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, b0, i0 = group_and_block(T, H, BLOCK_I, ROWS)
    offs_i, offs_j, offs_d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J), tl.arange(0, D_PAD)
    mask_i = i0 + offs_i < T
    table_ptr += centre(head, T) - i0
    states, queries = (), ()
    least, most = T, 0
    for r in tl.static_range(ROWS):
        b = batch_row(b0, r, B)
        row = b * H + head
        n_keys = keys_of(lengths_ptr, b, T, RAGGED)
        least, most = tl.minimum(least, n_keys), tl.maximum(most, n_keys)
        words = (0, 0, 0)
        if DROPOUT:
            first, second = seeds_of(seed_ptr, row)
            of_queries = spread(without_bit_3(offs_i) ^ i0) ^ first
            words = (of_queries, second, threshold_of(dropout_p))
        q = load_rows(
            rows_of(q_ptr, row, i0, stride_q_b, stride_q_h, stride_q_t, H),
            offs_i, offs_d, mask_i, stride_q_t, stride_q_d, D,
        )  # fmt: skip
        of_gate = rows_of(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
        gate = tl.load(of_gate + offs_i * stride_gate_t, mask=mask_i, other=0.0)
        gate = laid_out_as_rows(gate.to(tl.float32) / scale, q, BLOCK_J)
        queries += ((
            q, gate, words, n_keys,
            rows_of(k_ptr, row, 0, stride_k_b, stride_k_h, stride_k_t, H),
            rows_of(v_ptr, row, 0, stride_v_b, stride_v_h, stride_v_t, H),
        ),)  # fmt: skip
        states += ((
            tl.full((BLOCK_I,), -float("inf"), dtype=tl.float32),
            tl.zeros((BLOCK_I,), dtype=tl.float32),
            tl.zeros((BLOCK_I, D_PAD), dtype=tl.float32),
        ),)  # fmt: skip
    whole = least // BLOCK_J * BLOCK_J
    for j0 in range(0, whole, BLOCK_J):
        states = _fwd_tile(
            states, queries, table_ptr, offs_i, offs_j, offs_d, j0,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, ROWS, DROPOUT, PRECISION, True,
        )  # fmt: skip
    for j0 in range(whole, most, BLOCK_J):
        states = _fwd_tile(
            states, queries, table_ptr, offs_i, offs_j, offs_d, j0,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, ROWS, DROPOUT, PRECISION, False,
        )  # fmt: skip
    for r in tl.static_range(ROWS):
        row = (b0 + r) * H + head
        is_there = mask_i & (b0 + r < B)
        largest, total, y = states[r]
        log_sum = largest * scale + tl.log2(total) / LOG2_E
        if queries[r][3] == 0:  # as in FlashAttention: exp(s - log_sum) is 0
            total += 1.0
            log_sum = tl.full((BLOCK_I,), float("inf"), dtype=tl.float32)
        if DROPOUT:
            total *= 1.0 - dropout_p
        store_rows(
            rows_of(out_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
            y / total[:, None], offs_i, offs_d, is_there, stride_o_t, stride_o_d, D,
        )  # fmt: skip
        tl.store(log_sum_ptr + row.to(tl.int64) * T + i0 + offs_i, log_sum, mask=is_there)


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
        _gated_bias_attention_fwd_kernel[(grid_of(q, options["BLOCK_I"], options["ROWS"]),)](
            q, k, v,
            with_margins(table), gate,
            log_sum if key_lengths is None else key_lengths.contiguous(),
            log_sum if seed is None else seed,
            out, log_sum, B, T, H,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *gate.stride(),
            D**-0.5, dropout_p, **options,
        )  # fmt: skip
    return out, log_sum
