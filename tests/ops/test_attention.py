"""Gated-bias attention in plain torch: float64, gradients, memory, dropout, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import attention, native, native_encoder
from tests.attention_cases import CASES, assert_near, by_definition, drawn, results_of

from .test_memory import peak_bytes


@pytest.fixture(params=[*native.instruction_sets(), "torch", "torch in small blocks"])
def kernel(request, monkeypatch):
    if request.param.startswith("torch"):
        monkeypatch.setattr(native_encoder, "_is_attention", lambda *tensors: False)
        values = 400 if request.param.endswith("blocks") else 1 << 17
        monkeypatch.setattr(attention, "BLOCK_VALUES", values)
    else:
        native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, dtype, kernel):
    case = CASES[name]().to("cpu", dtype)
    assert_near(results_of(ops.gated_bias_attention, case), by_definition(case), case)


def test_no_rows():
    case = drawn(0, 2, 5, 8, ())
    output, *gradients = results_of(ops.gated_bias_attention, case)
    assert output.shape == (0, 2, 5, 8)
    assert (gradients[3] == 0).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_row_of_no_keys_gives_zeros(kernel, dropout_p):
    """And the others what they give without it, whatever hidden keys hold."""
    case = drawn(4, 2, 33, 16, (0, 12, 0, 33))
    hidden = (torch.arange(33) >= case.lengths[:, None])[:, None, :, None]
    case = case._replace(k=case.k.masked_fill(hidden, 7.0), v=case.v.masked_fill(hidden, -7.0))

    def dropped(*leaves: Tensor, key_lengths: Tensor | None) -> Tensor:
        options = {"key_lengths": key_lengths, "dropout_p": dropout_p, "seed": torch.tensor([5])}
        return ops.gated_bias_attention(*leaves, **options)

    out, dq, dk, dv, d_table, d_gate = results_of(dropped, case)
    assert all(t.isfinite().all() for t in (out, dq, dk, dv, d_table, d_gate))
    for t in (out, dq, dk, dv, d_gate):
        assert (t[::2] == 0).all()
        assert (t[1::2] != 0).any()
    if dropout_p == 0.0:
        for ours, true in zip((out, dq, dk, dv, d_table, d_gate), by_definition(case)):
            torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=3e-5)


def test_the_gate_and_table_may_be_transposed(kernel):
    case = drawn(1, 3, 20, 16)
    gate, table = case.gate.mT.contiguous().mT, case.table.T.contiguous().T
    strided = case._replace(gate=gate, table=table)
    for ours, true in zip(results_of(ops.gated_bias_attention, strided), by_definition(case)):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=3e-5)


def test_memory_grows_with_frames_not_with_their_square(kernel):
    def peak(T: int) -> int:
        case = drawn(1, 2, T, 32, (T - T // 5,))
        return peak_bytes(lambda: results_of(ops.gated_bias_attention, case))

    short, long = peak(750), peak(3000)
    assert long < 6 * short
    assert long < 3000 * 3000 * 4 / 3


def test_opcheck():
    case = drawn(2, 2, 9, 8, (9, 4))
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    op = torch.ops.gmm_jepa.gated_bias_attention.default
    for seed, dropout_p in ((None, 0.0), (torch.tensor([3]), 0.25)):
        torch.library.opcheck(op, (*leaves, case.lengths, seed, dropout_p))
    torch.library.opcheck(op, (*leaves, None, None, 0.0))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_one_graph(backend, dropout_p):
    case = drawn(2, 2, 11, 8, (11, 4))
    seed = torch.tensor([5])

    def function(*leaves: Tensor, key_lengths: Tensor) -> Tensor:
        q, *others = leaves
        options = {"key_lengths": key_lengths, "dropout_p": dropout_p, "seed": seed}
        return 2 * ops.gated_bias_attention(torch.sin(q), *others, **options).cos()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for eager, ours in zip(results_of(function, case), results_of(compiled, case)):
        torch.testing.assert_close(ours, eager)


def test_one_graph_draws_its_own_seed():
    case = drawn(1, 2, 11, 8)
    compiled = torch.compile(ops.gated_bias_attention, fullgraph=True, backend="aot_eager")
    first, second = (compiled(*case.leaves, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def keep_of(B: int, H: int, T: int, seed: int, dropout_p: float) -> Tensor:
    """The op's mask: with equal scores and v = 1, T times the output is keep."""
    flat = torch.zeros(B, H, T, T)
    table, gate = torch.zeros(H, 2 * T - 1), torch.ones(B, H, T)
    v = torch.eye(T).expand(B, H, T, T)
    options = {"dropout_p": dropout_p, "seed": torch.tensor([seed])}
    return T * ops.gated_bias_attention(flat, flat, v, table, gate, **options)


def test_gradients_under_dropout_are_those_of_its_mask(kernel):
    case = drawn(2, 3, 30, 16)
    keep = keep_of(2, 3, 30, 11, 0.3)
    assert 0.2 < float((keep == 0).float().mean()) < 0.4
    kept = keep[keep != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7), rtol=1e-4, atol=0)

    def dropped(*leaves: Tensor, key_lengths: Tensor | None) -> Tensor:
        return ops.gated_bias_attention(*leaves, dropout_p=0.3, seed=torch.tensor([11]))

    for ours, true in zip(results_of(dropped, case), by_definition(case, keep.double())):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=2e-5)


def test_dropout_keeps_the_mean():
    case = drawn(1, 2, 13, 8, (11,))
    arguments = {"key_lengths": case.lengths}
    whole = ops.gated_bias_attention(*case.leaves, **arguments)
    n_seeds, total = 4000, torch.zeros_like(whole)
    for seed in range(n_seeds):
        total += ops.gated_bias_attention(
            *case.leaves, dropout_p=0.25, seed=torch.tensor([seed]), **arguments
        )
    # one draw deviates by at most sqrt(p / (1 - p)) max |v|; five standard errors of the mean
    deviation = (0.25 / 0.75) ** 0.5 * float(case.v.abs().max())
    assert float((total / n_seeds - whole).abs().max()) < 5 * deviation / n_seeds**0.5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads):
    case, before = drawn(3, 4, 150, 16, (150, 20, 149)), torch.get_num_threads()

    def dropped(*leaves: Tensor, key_lengths: Tensor | None) -> Tensor:
        options = {"key_lengths": key_lengths, "dropout_p": 0.2, "seed": torch.tensor([7])}
        return ops.gated_bias_attention(*leaves, **options)

    expected = results_of(dropped, case)
    try:
        torch.set_num_threads(threads)
        got = results_of(dropped, case)
    finally:
        torch.set_num_threads(before)
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e)


def test_dropout_follows_torchs_own_seed():
    case = drawn(1, 2, 13, 8)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ops.gated_bias_attention(*case.leaves, dropout_p=0.25))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_autocast_does_not_reach_inside():
    case = drawn(2, 2, 30, 16, (30, 12))
    expected = results_of(ops.gated_bias_attention, case)
    with torch.autocast("cpu", torch.bfloat16):
        got = results_of(ops.gated_bias_attention, case)
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_refusals():
    q, k, v, table, gate = drawn(2, 2, 5, 8).leaves
    call = ops.gated_bias_attention
    with pytest.raises(InputError, match="q, k, v"):
        call(q, k[:, :, :4], v, table, gate)
    with pytest.raises(InputError, match="table"):
        call(q, k, v, table[:, 1:], gate)
    with pytest.raises(InputError, match="gate"):
        call(q, k, v, table, gate[:1])
    with pytest.raises(InputError, match="key_lengths"):
        call(q, k, v, table, gate, key_lengths=torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match="dropout_p"):
        call(q, k, v, table, gate, dropout_p=1.0)
    with pytest.raises(TypeError, match="one dtype"):
        call(q, k.double(), v, table, gate)
    with pytest.raises(TypeError, match="v: expected a floating-point"):
        call(q, k, v.long(), table, gate)
