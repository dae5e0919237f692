"""Kernels of gated-bias attention against float64: output and all five gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from gmm_jepa.kernels import (
    attention_tiles,
    gated_bias_attention,
    gated_bias_attention_backward,
)
from torch import Tensor

from bench.null_cuda.interpreter import mend_the_interpreter
from gmm_jepa.ops import triton_attention
from tests.attention_cases import CASES, Case, assert_near, by_definition, drawn

mend_the_interpreter()
DTYPES = (torch.float32, torch.bfloat16)


def results(case: Case, seed: Tensor | None = None, dropout_p: float = 0.0) -> list[Tensor]:
    arguments = (*case.leaves, case.lengths, seed, dropout_p)
    out, log_sum = triton_attention.gated_bias_attention(*arguments)
    backward = triton_attention.gated_bias_attention_backward
    return [out, *backward(case.cotangent, out, log_sum, *arguments)]


@pytest.fixture(params=[1, 2])
def rows(request, monkeypatch):
    """Rows of the batch that share a tile of the bias, whatever the dtype's own number."""
    config = attention_tiles.config
    monkeypatch.setattr(
        attention_tiles, "config", lambda *args: config(*args)._replace(ROWS=request.param)
    )
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, dtype, device):
    case = CASES[name]().to(device, dtype)
    # probabilities go into the product as bf16, which the interpreter cuts off, not rounds
    factor = 2.0 if dtype == torch.float32 else 4.0
    assert_near(results(case), by_definition(case), case, factor=factor)


def test_log_of_the_sum(device):
    case = drawn(3, 2, 70, 16, (70, 9, 0)).to(device, torch.float32)
    arguments = (*case.leaves, case.lengths, None, 0.0)
    _, ours = triton_attention.gated_bias_attention(*arguments)
    _, plain = triton_attention.attention.attention_reference(*arguments)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def keep_of(case: Case, seed: Tensor, dropout_p: float) -> Tensor:
    """The mask of the kernels: with equal scores and v = 1, T times the output is keep."""
    B, H, T, _ = case.q.shape
    flat = torch.zeros((B, H, T, T), device=case.q.device)
    table, gate = torch.zeros_like(case.table), torch.ones_like(case.gate)
    v = torch.eye(T, device=flat.device).expand(B, H, T, T)
    out, _ = triton_attention.gated_bias_attention(
        flat, flat, v, table, gate, None, seed, dropout_p
    )
    return T * out


def test_gradients_under_dropout_are_those_of_its_mask(device, rows):
    case = drawn(3, 2, 71, 16, (71, 40, 60)).to(device, torch.float32)
    seed = torch.tensor([123456789012], device=device)
    keep = keep_of(case, seed, 0.3)
    kept = keep[keep != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7), rtol=1e-4, atol=0)
    assert abs(float((keep == 0).float().mean()) - 0.3) < 0.015  # 30,246 draws: 5.7 deviations
    assert not torch.equal(keep[0, 0], keep[0, 1])
    got = results(case, seed, 0.3)
    for ours, true in zip(got, by_definition(case, keep.double())):
        size = max(1.0, float(true.abs().max()))
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=3e-5 * size)


def test_scores_that_share_a_hash_are_dropped_apart(device):
    """Queries i, i ^ 8 and keys j, j ^ 8, and those side by side; 30,720 pairs of correlation 0."""
    case = drawn(1, 2, 128, 16).to(device, torch.float32)
    keep = keep_of(case, torch.tensor([5], device=device), 0.4)
    kept = (keep != 0).float().sub_(0.6).div_(0.24**0.5)
    for i, j in ((0, 8), (8, 0), (8, 8), (0, 1), (1, 0)):
        pairs = kept[:, :, : 128 - i, : 128 - j] * kept[:, :, i:, j:]
        assert abs(float(pairs.mean())) < 0.03, (i, j)


@triton.jit
def _keep_kernel(out_ptr, i0, j0, first, second, dropped, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    queries = attention_tiles.spread(attention_tiles.without_bit_3(offs) ^ i0) ^ first
    numbers = (queries ^ j0)[:, None] ^ attention_tiles.without_bit_3(offs)[None, :]
    keep = attention_tiles.is_kept(numbers, offs[:, None], offs[None, :], second, dropped)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], keep.to(tl.float32))


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)])
def test_masks_far_apart_have_nothing_in_common(step, device):
    """Tiles of 128 x 128 scores, 128 to 16,384 queries and keys apart; a rate of 0.1.

    Of eight seeds: 131,072 pairs of correlation 0, of a standard deviation of 0.0028.
    """
    BLOCK, rate = 128, 0.1
    words = torch.randint(-(1 << 31), 1 << 31, (8, 2)).tolist()

    def mask(i0: int, j0: int) -> Tensor:
        tiles = torch.empty(len(words), BLOCK, BLOCK, device=device)
        for tile, (first, second) in zip(tiles, words):
            dropped = round(rate * 2**32)
            _keep_kernel[(1,)](tile, i0, j0, first, second, dropped, BLOCK=BLOCK)
        return (tiles - (1 - rate)) / (rate * (1 - rate)) ** 0.5

    for k in range(7, 15):
        i, j = (direction << k for direction in step)
        pairs = mask(max(i, 0), max(j, 0)) * mask(max(-i, 0), max(-j, 0))
        assert abs(float(pairs.mean())) < 0.012, (i, j)


def test_expanded_gates_and_any_strides(device):
    """One gate an utterance, as in the transformer; keys side by side with other things."""
    case = drawn(2, 3, 20, 24).to(device, torch.float32)
    wide = torch.randn(2, 3, 24, 20, device=device).transpose(2, 3)
    case = case._replace(
        k=wide, gate=case.gate[..., :1].expand_as(case.gate), cotangent=torch.randn_like(wide)
    )
    assert case.gate.stride(2) == 0
    for ours, true in zip(results(case), by_definition(case)):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=3e-5)


def test_same_input_same_bits(device, rows):
    case = drawn(2, 2, 100, 16, (100, 70)).to(device, torch.float32)
    for first, second in zip(results(case), results(case)):
        assert torch.equal(first, second)


def test_no_rows(device):
    case = drawn(0, 2, 5, 16, ()).to(device, torch.float32)
    out, *gradients = results(case)
    assert out.shape == (0, 2, 5, 16)
    assert (gradients[3] == 0).all()


def test_hidden_keys_may_hold_anything(device, rows):
    case = drawn(3, 2, 33, 16, (12, 0, 33)).to(device, torch.float32)
    hidden = (torch.arange(33, device=device) >= case.lengths[:, None])[:, None, :, None]
    k, v = (t.masked_fill(hidden, torch.nan) for t in (case.k, case.v))
    expected = results(case)
    for ours, true in zip(results(case._replace(k=k, v=v)), expected):
        assert torch.equal(ours, true)
    out, dq, dk, dv, _, d_gate = expected
    for t in (out, dq, dk, dv, d_gate):
        assert (t[1] == 0).all()


class Grids:
    """Stands for a kernel and takes down the grids that it is asked for."""

    def __init__(self) -> None:
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *arguments, **options: None


def test_any_number_of_heads_and_rows_fits_the_grid(monkeypatch):
    """CUDA's second and third axes end at 65,535."""
    grids = Grids()
    for kernels, name in (
        (gated_bias_attention, "fwd"),
        (gated_bias_attention_backward, "bwd_q"),
        (gated_bias_attention_backward, "bwd_kv"),
        (gated_bias_attention_backward, "bwd_table"),
    ):
        monkeypatch.setattr(kernels, f"_gated_bias_attention_{name}_kernel", grids)
    case = drawn(70_000, 1, 2, 16)
    results(case)
    assert len(grids.seen) == 4
    assert all(axis <= 65_535 for grid in grids.seen for axis in grid[1:])
    assert [grid[0] for grid in grids.seen[:3]] == [70_000] * 3


@pytest.mark.gpu
def test_more_heads_and_rows_than_an_axis_holds():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = drawn(70_000, 1, 2, 16).to("cuda", torch.float32)
    last = Case(*(t[-3:] for t in case.leaves[:3]), case.table, case.gate[-3:], None, None)
    out, _ = triton_attention.gated_bias_attention(*case.leaves, None, None, 0.0)
    few, _ = triton_attention.gated_bias_attention(*last.leaves, None, None, 0.0)
    assert torch.equal(out[-3:], few)


@pytest.mark.parametrize("op", ["gated_bias_attention", "gated_bias_attention_backward"])
def test_it_is_the_kernel_on_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gmm_jepa::{op}", "CUDA")


OPCHECK = """
import sys, torch
from gmm_jepa.ops import attention, triton_attention
from bench.null_cuda.interpreter import mend_the_interpreter
mend_the_interpreter()
device = sys.argv[1]
if device == "cpu":
    attention._attention.register_kernel("cpu")(triton_attention.gated_bias_attention)
    backward = triton_attention.gated_bias_attention_backward
    attention._attention_backward.register_kernel("cpu")(backward)
q, k, v = torch.randn(3, 2, 2, 5, 16, device=device).requires_grad_().unbind()
table = torch.randn(2, 9, device=device, requires_grad=True)
gate = torch.rand(2, 2, 5, device=device, requires_grad=True)
op = torch.ops.gmm_jepa.gated_bias_attention.default
lengths, seed = torch.tensor([5, 2], device=device), torch.tensor([3], device=device)
torch.library.opcheck(op, (q, k, v, table, gate, lengths, seed, 0.25))
torch.library.opcheck(op, (q, k, v, table, gate, None, None, 0.0))
"""


def test_opcheck_with_the_kernels_behind_the_op(device, tmp_path):
    """A process of its own: on a CPU the kernels take the place of the plain ones."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", OPCHECK, device],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
