"""The gradients of gated-bias attention, in tiles; notation and forward: gated_bias_attention.py.

Backward, with dp = keep (g v'), delta_i = g_i . y_i and ds = p (dp - delta):

    dv = (keep p)' g,   dk = ds' q / sqrt(d),   dq = ds k / sqrt(d)
    dgate_i = sum_j ds_ij table[j - i],   dtable[r] = sum over b, i of ds_i,i+r gate_i

One kernel takes a block of queries and walks over the keys: dq, dgate, and what the others need
of each query, signs and factors such that a score takes no more than a multiplication and addition
of it. Another takes a block of keys and walks over the queries: dk, dv; both do so for a few rows
of the batch, which share each tile of the bias, as in the forward. A third takes one square tile
of one head and walks over the batch: it adds up ds gate in registers, and only then sums along the
tile's diagonals, whose two halves (a tile has 2 BLOCK - 1) the last kernel adds to those of other
tiles in a fixed order: same input, same bits. Scores are computed once more for that, which costs
a fraction of what sums along the diagonals of every row of the batch did (13 ms against 10 of the
gradients themselves). Atomics into (H, 2 T - 1) would need one addition a score and would not keep
the bits.

The sums take 2 H BLOCK ceil(T / BLOCK)^2 floats, which no length of batch adds to.

Source: gmm_jepa.ops.attention; the walk is that of FlashAttention-2 (arXiv 2307.08691).
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
def _for_dropout(minus_log_sum, minus_delta, dropout_p):
    """Of p / (1 - dropout_p) and its gradient: p (keep dp / (1 - dropout_p) - delta) without it."""
    kept = 1.0 - dropout_p
    return minus_log_sum - tl.log2(tl.cast(kept, tl.float32)), minus_delta * kept


@triton.jit
def _words_of(words_ptr, row):
    """The two random words of a (batch, head) pair, which the first kernel has left."""
    words_ptr += 2 * row.to(tl.int64)
    first, second = tl.load(words_ptr), tl.load(words_ptr + 1)
    return first.to(tl.uint32, bitcast=True), second.to(tl.uint32, bitcast=True)


@triton.jit
def _bwd_q_step(
    state, query, bias, k, v, mask_j, j0, offs_i, offs_j, scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys for one row of the batch, WHOLE where all of them exist."""
    dq, d_gate = state
    q, g, gate, minus_log_sum, minus_delta, of_queries, second, dropped = query
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) + bias * gate[:, None]
    p = tl.exp2(s * scale + minus_log_sum[:, None])
    if not WHOLE:
        p = tl.where(mask_j[None, :], p, 0.0)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        numbers = (of_queries ^ j0)[:, None] ^ without_bit_3(offs_j)[None, :]
        keep = is_kept(numbers, offs_i[:, None], offs_j[None, :], second, dropped)
        dp = tl.where(keep, dp, 0.0)
    ds = p * (dp + minus_delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, d_gate + tl.sum(ds * bias, 1)


@triton.jit
def _bwd_q_tile(
    states, queries, places, table_ptr, offs_i, offs_j, offs_d, j0,
    stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale,
    D: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys for all rows of a group: the bias is loaded once."""
    bias = bias_of(table_ptr + j0, offs_i, offs_j)
    after = ()
    for r in tl.static_range(ROWS):
        n_keys, k_ptr, v_ptr = places[r]
        state = states[r]
        mask_j = (j0 + offs_j < n_keys) | WHOLE
        if WHOLE or j0 < n_keys:
            k = load_rows(k_ptr, j0 + offs_j, offs_d, mask_j, stride_k_t, stride_k_d, D)
            v = load_rows(v_ptr, j0 + offs_j, offs_d, mask_j, stride_v_t, stride_v_d, D)
            state = _bwd_q_step(
                state, queries[r], bias, k, v, mask_j, j0, offs_i, offs_j, scale,
                DROPOUT, PRECISION, WHOLE,
            )  # fmt: skip
        after += (state,)
    return after


@triton.jit(do_not_specialize=["B", "T"])
def _gated_bias_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, g_ptr, out_ptr, log_sum_ptr, gate_ptr, seed_ptr,
    dq_ptr, d_gate_ptr, words_ptr, scaled_gate_ptr, minus_log_sum_ptr, minus_delta_ptr, stride_row,
    B, T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
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
    states, queries, places = (), (), ()
    least, most = T, 0
    for r in tl.static_range(ROWS):
        b = batch_row(b0, r, B)
        row = b * H + head
        n_keys = keys_of(lengths_ptr, b, T, RAGGED)
        least, most = tl.minimum(least, n_keys), tl.maximum(most, n_keys)
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
        minus_delta = -tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
        of_log_sum = log_sum_ptr + row.to(tl.int64) * T + i0
        log_sum = tl.load(of_log_sum + offs_i, mask=mask_i, other=float("inf"))
        minus_log_sum = log_sum * -LOG2_E
        of_queries, second, dropped = 0, 0, 0
        if DROPOUT:
            minus_log_sum, minus_delta = _for_dropout(minus_log_sum, minus_delta, dropout_p)
            first, second = seeds_of(seed_ptr, row)
            of_words = words_ptr + 2 * row.to(tl.int64)
            tl.store(of_words, first.to(tl.int32, bitcast=True))
            tl.store(of_words + 1, second.to(tl.int32, bitcast=True))
            of_queries = spread(without_bit_3(offs_i) ^ i0) ^ first
            dropped = threshold_of(dropout_p)
        of_gate = rows_of(gate_ptr, row, i0, stride_gate_b, stride_gate_h, stride_gate_t, H)
        gate = tl.load(of_gate + offs_i * stride_gate_t, mask=mask_i, other=0.0)
        gate = gate.to(tl.float32) / scale
        of_row = row.to(tl.int64) * stride_row + i0
        tl.store(scaled_gate_ptr + of_row + offs_i, gate, mask=mask_i)
        tl.store(minus_log_sum_ptr + of_row + offs_i, minus_log_sum, mask=mask_i)
        tl.store(minus_delta_ptr + of_row + offs_i, minus_delta, mask=mask_i)
        gate = laid_out_as_rows(gate, q, BLOCK_J)
        queries += ((q, g, gate, minus_log_sum, minus_delta, of_queries, second, dropped),)
        places += ((
            n_keys,
            rows_of(k_ptr, row, 0, stride_k_b, stride_k_h, stride_k_t, H),
            rows_of(v_ptr, row, 0, stride_v_b, stride_v_h, stride_v_t, H),
        ),)  # fmt: skip
        states += ((
            tl.zeros((BLOCK_I, D_PAD), dtype=tl.float32), tl.zeros((BLOCK_I,), dtype=tl.float32)
        ),)  # fmt: skip
    whole = least // BLOCK_J * BLOCK_J
    for j0 in range(0, whole, BLOCK_J):
        states = _bwd_q_tile(
            states, queries, places, table_ptr, offs_i, offs_j, offs_d, j0,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, ROWS, DROPOUT, PRECISION, True,
        )  # fmt: skip
    for j0 in range(whole, most, BLOCK_J):
        states = _bwd_q_tile(
            states, queries, places, table_ptr, offs_i, offs_j, offs_d, j0,
            stride_k_t, stride_k_d, stride_v_t, stride_v_d, scale * LOG2_E,
            D, ROWS, DROPOUT, PRECISION, False,
        )  # fmt: skip
    for r in tl.static_range(ROWS):
        row = (b0 + r) * H + head
        is_there = mask_i & (b0 + r < B)
        dq, d_gate = states[r]
        store_rows(
            rows_of(dq_ptr, row, i0, stride_o_b, stride_o_h, stride_o_t, H),
            dq * scale, offs_i, offs_d, is_there, stride_o_t, stride_o_d, D,
        )  # fmt: skip
        tl.store(d_gate_ptr + row.to(tl.int64) * T + i0 + offs_i, d_gate, mask=is_there)


@triton.jit
def _bwd_kv_step(
    state, keys, bias, q, g, gate, minus_log_sum, minus_delta, i0, of_queries,
    offs_i, offs_j, scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries for one row of the batch; keys are its rows."""
    dk, dv = state
    k, v, of_keys, second, dropped = keys
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) + bias * gate[None, :]
    p = tl.exp2(s * scale + minus_log_sum[None, :])
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    kept = p
    if DROPOUT:
        numbers = (of_keys ^ spread(tl.cast(i0, tl.uint32)))[:, None] ^ of_queries[None, :]
        keep = is_kept(numbers, offs_i[None, :], offs_j[:, None], second, dropped)
        kept = tl.where(keep, p, scale * 0.0)  # no constant: see the forward
    ds = kept * dp + p * minus_delta[None, :]
    dv = tl.dot(kept.to(g.dtype), g, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _bwd_kv_tile(
    states, keys, places, turned_ptr, i0, offs_i, offs_j, offs_d, T,
    stride_q_t, stride_q_d, stride_g_t, stride_g_d, scale,
    D: tl.constexpr, ROWS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of queries for all rows of a group, WHOLE where all of them exist.

    The table is turned round: with what lies side by side in memory side by side in the tile, no
    two lanes meet in a bank of shared memory.
    """
    bias = bias_of(turned_ptr + i0, offs_j, offs_i)  # i - j
    frames = i0 + offs_i
    mask_i = (frames < T) | WHOLE
    of_queries = spread(without_bit_3(offs_i))
    after = ()
    for r in tl.static_range(ROWS):
        q_ptr, g_ptr, gate_ptr, minus_log_sum_ptr, minus_delta_ptr = places[r]
        q = load_rows(q_ptr, frames, offs_d, mask_i, stride_q_t, stride_q_d, D)
        g = load_rows(g_ptr, frames, offs_d, mask_i, stride_g_t, stride_g_d, D)
        # minus infinity: a query that is not there has no probability
        minus_log_sum = tl.load(minus_log_sum_ptr + frames, mask=mask_i, other=-float("inf"))
        minus_delta = tl.load(minus_delta_ptr + frames, mask=mask_i, other=0.0)
        gate = tl.load(gate_ptr + frames, mask=mask_i, other=0.0)
        state = _bwd_kv_step(
            states[r], keys[r], bias, q, g, gate, minus_log_sum, minus_delta, i0, of_queries,
            offs_i, offs_j, scale, DROPOUT, PRECISION,
        )  # fmt: skip
        after += (state,)
    return after


@triton.jit(do_not_specialize=["B", "T"])
def _gated_bias_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, turned_ptr, lengths_ptr, g_ptr, words_ptr, gate_ptr,
    minus_log_sum_ptr, minus_delta_ptr, stride_row, dk_ptr, dv_ptr,
    B, T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    scale, dropout_p,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    ROWS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, b0, j0 = group_and_block(T, H, BLOCK_J, ROWS)
    offs_i, offs_j, offs_d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J), tl.arange(0, D_PAD)
    turned_ptr += centre(head, T) - j0
    states, keys, places = (), (), ()
    most = 0
    for r in tl.static_range(ROWS):
        b = batch_row(b0, r, B)
        row = b * H + head
        n_keys = keys_of(lengths_ptr, b, T, RAGGED)
        most = tl.maximum(most, n_keys)
        mask_j = j0 + offs_j < n_keys
        of_keys, second, dropped = 0, 0, 0
        if DROPOUT:
            first, second = _words_of(words_ptr, row)
            of_keys, dropped = without_bit_3(offs_j) ^ j0 ^ first, threshold_of(dropout_p)
        k = load_rows(
            rows_of(k_ptr, row, j0, stride_k_b, stride_k_h, stride_k_t, H),
            offs_j, offs_d, mask_j, stride_k_t, stride_k_d, D,
        )  # fmt: skip
        v = load_rows(
            rows_of(v_ptr, row, j0, stride_v_b, stride_v_h, stride_v_t, H),
            offs_j, offs_d, mask_j, stride_v_t, stride_v_d, D,
        )  # fmt: skip
        keys += ((k, v, of_keys, second, dropped),)
        of_row = row.to(tl.int64) * stride_row
        places += ((
            rows_of(q_ptr, row, 0, stride_q_b, stride_q_h, stride_q_t, H),
            rows_of(g_ptr, row, 0, stride_g_b, stride_g_h, stride_g_t, H),
            gate_ptr + of_row, minus_log_sum_ptr + of_row, minus_delta_ptr + of_row,
        ),)  # fmt: skip
        states += ((
            tl.zeros((BLOCK_J, D_PAD), dtype=tl.float32),
            tl.zeros((BLOCK_J, D_PAD), dtype=tl.float32),
        ),)  # fmt: skip
    last = tl.where(j0 < most, T, 0)  # keys that no row has have no gradient
    whole = last // BLOCK_I * BLOCK_I
    for i0 in range(0, whole, BLOCK_I):
        states = _bwd_kv_tile(
            states, keys, places, turned_ptr, i0, offs_i, offs_j, offs_d, T,
            stride_q_t, stride_q_d, stride_g_t, stride_g_d, scale * LOG2_E,
            D, ROWS, DROPOUT, PRECISION, True,
        )  # fmt: skip
    if whole < last:
        states = _bwd_kv_tile(
            states, keys, places, turned_ptr, whole, offs_i, offs_j, offs_d, T,
            stride_q_t, stride_q_d, stride_g_t, stride_g_d, scale * LOG2_E,
            D, ROWS, DROPOUT, PRECISION, False,
        )  # fmt: skip
    for r in tl.static_range(ROWS):
        row = (b0 + r) * H + head
        dk, dv = states[r]
        n_keys = keys_of(lengths_ptr, batch_row(b0, r, B), T, RAGGED)
        # What keys that a row lacks have gathered is anything.
        mask_j = (j0 + offs_j < n_keys)[:, None]
        dk, dv = tl.where(mask_j, dk * scale, 0.0), tl.where(mask_j, dv, 0.0)
        is_there = (j0 + offs_j < T) & (b0 + r < B)
        store_rows(
            rows_of(dk_ptr, row, j0, stride_o_b, stride_o_h, stride_o_t, H),
            dk, offs_j, offs_d, is_there, stride_o_t, stride_o_d, D,
        )  # fmt: skip
        store_rows(
            rows_of(dv_ptr, row, j0, stride_o_b, stride_o_h, stride_o_t, H),
            dv, offs_j, offs_d, is_there, stride_o_t, stride_o_d, D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T"])
def _gated_bias_attention_bwd_table_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, g_ptr, words_ptr, gate_ptr,
    minus_log_sum_ptr, minus_delta_ptr, stride_row, partials_ptr,
    B, T, H,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
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
    of_queries, of_keys = spread(without_bit_3(offs) ^ i0), without_bit_3(offs) ^ j0
    dropped = threshold_of(dropout_p)
    q_ptr = rows_of(q_ptr, head, i0, stride_q_b, stride_q_h, stride_q_t, H)
    g_ptr = rows_of(g_ptr, head, i0, stride_g_b, stride_g_h, stride_g_t, H)
    k_ptr = rows_of(k_ptr, head, j0, stride_k_b, stride_k_h, stride_k_t, H)
    v_ptr = rows_of(v_ptr, head, j0, stride_v_b, stride_v_h, stride_v_t, H)
    of_row = head.to(tl.int64) * stride_row + i0
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for b in range(0, B):
        n_keys = keys_of(lengths_ptr, b, T, RAGGED)
        if j0 < n_keys:
            mask_j = j0 + offs < n_keys
            q = load_rows(q_ptr, offs, offs_d, mask_i, stride_q_t, stride_q_d, D)
            g = load_rows(g_ptr, offs, offs_d, mask_i, stride_g_t, stride_g_d, D)
            k = load_rows(k_ptr, offs, offs_d, mask_j, stride_k_t, stride_k_d, D)
            v = load_rows(v_ptr, offs, offs_d, mask_j, stride_v_t, stride_v_d, D)
            gate = tl.load(gate_ptr + of_row + offs, mask=mask_i, other=0.0)
            minus_log_sum = tl.load(
                minus_log_sum_ptr + of_row + offs, mask=mask_i, other=-float("inf")
            )
            minus_delta = tl.load(minus_delta_ptr + of_row + offs, mask=mask_i, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) + bias * gate[:, None]
            p = tl.exp2(s * (scale * LOG2_E) + minus_log_sum[:, None])
            if j0 + BLOCK > n_keys:
                p = tl.where(mask_j[None, :], p, 0.0)
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                first, second = _words_of(words_ptr, b * H + head)
                numbers = (of_queries ^ first)[:, None] ^ of_keys[None, :]
                keep = is_kept(numbers, offs[:, None], offs[None, :], second, dropped)
                dp = tl.where(keep, dp, 0.0)
            total += p * (dp + minus_delta[:, None]) * gate[:, None]
        q_ptr += stride_q_b
        g_ptr += stride_g_b
        k_ptr += stride_k_b
        v_ptr += stride_v_b
        of_row += tl.cast(H, tl.int64) * stride_row
    total *= scale  # which the gates lack
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
    # As the forward pass left them, unless somebody moved them meanwhile.
    out, log_sum = out.transpose(1, 2).contiguous().transpose(1, 2), log_sum.contiguous()
    dq, dk, dv = (q.new_empty((B, T, H, D)).transpose(1, 2) for _ in range(3))
    d_table = q.new_empty(table.shape, dtype=torch.float32)
    d_gate = q.new_empty((B, H, T), dtype=torch.float32)
    stride_row = triton.cdiv(T, 16) * 16  # so that what threads load begins at multiples
    gates, minus_log_sum, minus_delta = q.new_empty((3, B, H, stride_row), dtype=torch.float32)
    if q.numel() == 0:
        return dq, dk, dv, d_table.zero_().to(table.dtype), d_gate.zero_().to(gate.dtype)
    for_q, for_kv, for_table = (
        options_of(kernel, q, dropout_p, key_lengths) for kernel in ("bwd_q", "bwd_kv", "bwd_table")
    )
    BLOCK, BLOCK_R = for_table["BLOCK"], 256
    n_tiles = H * triton.cdiv(T, BLOCK) ** 2
    partials = q.new_empty((n_tiles, 2, BLOCK), dtype=torch.float32)
    by_position = with_margins(table)
    lengths = log_sum if key_lengths is None else key_lengths.contiguous()
    words = torch.empty((B, H, 2), dtype=torch.int32, device=q.device)
    scratch = (words, gates, minus_log_sum, minus_delta, stride_row)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    numbers = (D**-0.5, dropout_p)
    with torch.cuda.device_of(q):
        _gated_bias_attention_bwd_q_kernel[(grid_of(q, for_q["BLOCK_I"], for_q["ROWS"]),)](
            q, k, v, by_position, lengths, grad, out, log_sum, gate,
            log_sum if seed is None else seed, dq, d_gate, *scratch,
            B, T, H, *strides, *dq.stride(), *gate.stride(), *numbers, **for_q,
        )  # fmt: skip
        _gated_bias_attention_bwd_kv_kernel[(grid_of(q, for_kv["BLOCK_J"], for_kv["ROWS"]),)](
            q, k, v, by_position.flip(1), lengths, grad, *scratch, dk, dv,
            B, T, H, *strides, *dq.stride(), *numbers, **for_kv,
        )  # fmt: skip
        _gated_bias_attention_bwd_table_kernel[(n_tiles,)](
            q, k, v, by_position, lengths, grad, *scratch, partials,
            B, T, H, *strides, *numbers, **for_table,
        )  # fmt: skip
        _gated_bias_attention_bwd_table_sum_kernel[(triton.cdiv(2 * T - 1, BLOCK_R), H)](
            partials, d_table, T, BLOCK=BLOCK, BLOCK_R=BLOCK_R
        )
    return dq, dk, dv, d_table.to(table.dtype), d_gate.to(gate.dtype)
