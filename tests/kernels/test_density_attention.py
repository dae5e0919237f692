"""Kernels of density-adaptive attention against float64: output and all three gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gmm_jepa.kernels import density_attention, density_attention_backward, density_chunks
from torch import Tensor

from bench.null_cuda.interpreter import mend_the_interpreter
from gmm_jepa.ops import density, fused, triton_front_end

from .guard_pages import guarded, run_in_child
from .strides import moved

mend_the_interpreter()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("output", "x", "offsets", "squared widths")


class Case(NamedTuple):
    """What the op takes, and the gradient that comes back to it."""

    x: Tensor  # (B, T, C)
    offsets: Tensor  # (4, 4)
    squared_widths: Tensor  # (4, 4)
    lengths: Tensor | None  # (B,)
    cotangent: Tensor  # (B, T, C)

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """The Gaussians stay as they are, as under autocast; so do strides."""
        x, cotangent = (moved(t, device, dtype) for t in (self.x, self.cotangent))
        lengths = None if self.lengths is None else moved(self.lengths, device)
        return Case(x, self.offsets.to(device), self.squared_widths.to(device), lengths, cotangent)


def drawn(
    B: int, T: int, C: int, lengths: tuple[int, ...] | None = None, *, scale=1.0, offset=0.0
) -> Case:
    torch.manual_seed(B + T + C)
    x, cotangent = torch.randn(2, B, T, C)
    x = scale * x + offset
    lengths = None if lengths is None else torch.tensor(lengths)
    if lengths is not None:
        x = x * (torch.arange(T) < lengths[:, None])[..., None]
    return Case(x, 0.3 * torch.randn(4, 4), 0.3 + torch.rand(4, 4), lengths, cotangent)


def _silent_channels() -> Case:
    """Digital silence, noise of std 2e-3 under a loud burst, and a constant."""
    case = drawn(1, 300, 16)
    case.x[..., ::4] = 0.0
    case.x[..., 1::4] *= 2e-3
    case.x[:, 290:, 1::4] *= 1e3
    case.x[..., 2::4] = 0.5
    return case


def _narrow_widths() -> Case:
    """L reaches -1e6."""
    case = drawn(1, 200, 16)
    return case._replace(squared_widths=torch.full((4, 4), 1.0001e-4), offsets=0 * case.offsets)


def _beyond_the_clamp() -> Case:
    case = drawn(1, 300, 16)
    case.x[:, ::75] *= 40
    case.offsets[3, 3] = 100.0
    return case


def _spike_first() -> Case:
    """The frame that others are taken relative to is the one far away."""
    case = drawn(1, 300, 16)
    case.x[:, ::75] = 1e3
    return case


def _strided() -> Case:
    """x channels-first, the gradient every other channel of a wider one."""
    case = drawn(2, 70, 24, (70, 33))
    x = case.x.transpose(1, 2).contiguous().mT
    return case._replace(x=x, cotangent=torch.randn(2, 70, 48)[..., ::2])


CASES: dict[str, Callable[[], Case]] = {
    "a_block_of_channels": lambda: drawn(2, 75, 64, (75, 41)),
    "ragged": lambda: drawn(6, 203, 16, (0, 1, 7, 8, 9, 203)),
    "all_frames": lambda: drawn(2, 150, 16),
    "five_channels": lambda: drawn(2, 60, 5, (60, 41)),
    "channels_beyond_a_block": lambda: drawn(1, 45, 70),
    "two_blocks_of_channels": lambda: drawn(1, 21, 128),
    "four_blocks_of_channels": lambda: drawn(2, 24, 256, (24, 13)),
    "least_frames": lambda: drawn(2, 8, 16),
    "too_few_frames": lambda: drawn(2, 7, 16),
    "one_frame": lambda: drawn(2, 1, 16, (1, 0)),
    "primes": lambda: drawn(3, 101, 37, (101, 97, 13)),
    "several_pieces": lambda: drawn(1, 701, 16, (697,)),
    "most_pieces": lambda: drawn(1, 2101, 5),
    "quiet": lambda: drawn(1, 300, 16, scale=1e-2),
    "far_from_zero": lambda: drawn(1, 400, 16, scale=1e-3, offset=1e3),
    "silent_channels": _silent_channels,
    "narrow_widths": _narrow_widths,
    "beyond_the_clamp": _beyond_the_clamp,
    "spike_first": _spike_first,
    "strided": _strided,
    "expanded_gradient": lambda: drawn(2, 90, 16)._replace(
        cotangent=torch.ones(()).expand(2, 90, 16)
    ),
}


# On a GPU each number of channels is compiled anew for each type.
NARROW = ("a_block_of_channels", "ragged", "silent_channels", "beyond_the_clamp", "strided")
RUNS = [(name, F32) for name in CASES] + [(name, BF16) for name in NARROW]
RUNS += [("ragged", F16)]


@pytest.fixture(autouse=True)
def _pieces_are_short(monkeypatch, request) -> None:
    """So that a chunk has several though the interpreter is slow, some clamped, some not."""
    if "cpu" in request.node.name:
        monkeypatch.setattr(density_chunks, "LEAST_FRAMES", 32)


class Plain:
    """The form that the op is defined by."""

    density_attention = staticmethod(density.density_attention_reference)
    density_attention_backward = staticmethod(density.density_attention_backward_reference)


def results(case: Case, form=triton_front_end) -> list[Tensor]:
    out = form.density_attention(*case[:4])
    return [out, *form.density_attention_backward(case.cotangent, *case[:4])]


def widened(case: Case, dtype: torch.dtype) -> Case:
    floats = (t.to(dtype) for t in (case.x, case.offsets, case.squared_widths, case.cotangent))
    x, offsets, squared_widths, cotangent = floats
    return Case(x, offsets, squared_widths, case.lengths, cotangent)


def by_definition(case: Case) -> list[Tensor]:
    return results(widened(case, torch.float64), Plain)


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda run: str(run).removeprefix("torch."))
def test_against_the_definition(name, dtype, device):
    """At most four times the error of plain float32, a trifle more, and the rounding to x's dtype.

    Four times: torch adds in a tree what a thread adds one after the other.
    """
    case = CASES[name]().to(device, dtype)
    # the interpreter cuts off where the hardware rounds
    ulps = 1.0 if device == "cpu" else 0.5
    for name, ours, plain, true in zip(
        NAMES, results(case), results(widened(case, F32), Plain), by_definition(case)
    ):
        assert ours.dtype == (dtype if name in ("output", "x") else F32), name
        assert ours.shape == true.shape, name
        assert ours.isfinite().all(), name
        allowed = 4 * float((plain.double() - true).abs().max())
        # sums over D are zero but for rounding where all y^2 are 100
        trifle = 4 if name in ("output", "x") else 100
        allowed += trifle * torch.finfo(F32).eps * max(1.0, float(true.abs().max()))
        rounding = ulps * torch.finfo(ours.dtype).eps * true.abs() * (ours.dtype != F32)
        worst = float(((ours.double() - true).abs() - rounding).max())
        assert worst <= allowed, (name, worst, allowed)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 1e3), (1.0, -1e4), (1e-2, 5.0)])
def test_an_offset_costs_no_digits(scale, offset, device):
    """Relative to the largest value; plain float32 is off by a quarter at an offset of 1e3."""
    case = drawn(1, 300, 16, (289,), scale=scale, offset=offset)
    case = case._replace(offsets=scale * case.offsets).to(device, F32)
    for name, ours, true, allowed in zip(
        NAMES, results(case), by_definition(case), (3e-6, 2e-5, 5e-4, 1e-3)
    ):
        error = float((ours.double() - true).abs().max() / true.abs().max())
        assert error <= allowed, (name, error)


def test_padding_and_short_rows_pass(device):
    case = drawn(4, 40, 16, (0, 7, 8, 40)).to(device, BF16)
    case = case._replace(x=torch.randn_like(case.x))
    out, d_x, *_ = results(case)
    for row, behind in enumerate((0, 0, 8, 40)):
        assert torch.equal(out[row, behind:], case.x[row, behind:])
        assert torch.equal(d_x[row, behind:], case.cotangent[row, behind:])
    short = Case(case.x[:2], *case[1:3], case.lengths[:2], case.cotangent[:2])
    assert all((gradient == 0).all() for gradient in results(short)[2:])


def test_rows_do_not_depend_on_their_neighbours(device):
    case = drawn(3, 200, 16, (200, 120, 33)).to(device, F32)
    out, d_x, *_ = results(case)
    for row, n in enumerate(case.lengths.tolist()):
        rows = slice(row, row + 1)
        alone = Case(case.x[rows, :n], *case[1:3], None, case.cotangent[rows, :n])
        alone_out, alone_d_x, *_ = results(alone)
        torch.testing.assert_close(alone_out, out[rows, :n])
        torch.testing.assert_close(alone_d_x, d_x[rows, :n], rtol=1e-5, atol=1e-5)


def test_same_input_same_bits(device):
    case = drawn(2, 300, 70, (300, 191)).to(device, BF16)
    for first, second in zip(results(case), results(case)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 9, 16), (2, 0, 16), (2, 9, 0)])
def test_nothing(shape, device):
    out, d_x, *others = results(drawn(*shape).to(device, F32))
    assert out.shape == d_x.shape == shape
    assert all((gradient == 0).all() for gradient in others)


def test_parameters_of_16_bits(device):
    case = drawn(2, 60, 16).to(device, BF16)
    narrow = case._replace(offsets=case.offsets.to(BF16), squared_widths=case[2].to(BF16))
    wide = narrow._replace(offsets=narrow.offsets.float(), squared_widths=narrow[2].float())
    ours, expected = results(narrow), results(wide)
    assert [t.dtype for t in ours] == [BF16] * 4
    for a, e in zip(ours, expected):
        assert torch.equal(a, e.to(BF16))


def test_lengths_of_32_bits_and_beyond_the_frames(device):
    case = drawn(2, 60, 16, (60, 33)).to(device, F32)
    other = torch.tensor([61, 33], dtype=torch.int32, device=device)
    for a, e in zip(results(case._replace(lengths=other)), results(case)):
        assert torch.equal(a, e)


def test_the_plain_form_takes_float64(monkeypatch):
    for kernel in (density_attention, density_attention_backward):
        monkeypatch.delattr(kernel, kernel.__name__.rsplit(".", 1)[1])
    case = widened(drawn(2, 40, 5), torch.float64)
    for ours, true in zip(results(case), by_definition(case)):
        assert torch.equal(ours, true)


@pytest.mark.parametrize("op", ["density_attention", "density_attention_backward"])
def test_it_is_the_kernel_on_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gmm_jepa::{op}", "CUDA")


def between_guard_pages(end: str) -> None:
    """In a process of its own: reads or writes beside a tensor end it."""
    for shape, lengths in (((2, 37, 5), (37, 8)), ((1, 300, 16), (299,)), ((2, 7, 16), (7, 3))):
        case = drawn(*shape, lengths).to("cpu", BF16)
        floats = (case.x, case.cotangent, case.offsets, case.squared_widths, case.lengths)
        x, grad, *rest = (guarded(t, at_end=end == "end") for t in floats)
        expected = results(case)
        for ours, plain in zip(results(Case(x, *rest, grad)), expected):
            assert torch.equal(ours, plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")
@pytest.mark.parametrize("side", ["begin", "end"])
def test_nothing_is_read_beside_the_inputs(side):
    name = "tests.kernels.test_density_attention:between_guard_pages"
    child = run_in_child(name, side)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [700, 7])
def test_a_compiled_step_under_autocast_holds_the_kernels(T, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(fused, "uses_unproven", True)
    from gmm_jepa.models.daam import DensityAttention
    from gmm_jepa.models.padding import frame_mask

    module = DensityAttention().cuda()
    mask = frame_mask(torch.tensor([T, T // 2], device="cuda"), T)
    x = torch.randn(2, T, 64, device="cuda", dtype=BF16) * mask.keep.to(BF16)
    x.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = []
        for form in (module, torch.compile(module, fullgraph=True)):
            with torch.autocast("cuda", BF16):
                out = form(x, mask)
            leaves = (x, module.offsets, module.widths)
            found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert [t.dtype for t in found[0]] == [BF16, BF16, F32, F32]
    for compiled, eager in zip(found[1], found[0], strict=True):
        # the widths' square may differ in its last bit, and then a rounding to bf16 falls otherwise
        rtol = 2**-7 if eager.dtype == BF16 else 1e-5
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=1e-5)
    ran = {event.key for event in profile.key_averages()}
    assert {"_density_out_kernel", "_density_dx_kernel"} <= ran


OPCHECK = """
import sys, torch
from gmm_jepa.ops import density, fused, triton_front_end
from bench.null_cuda.interpreter import mend_the_interpreter
from tests.kernels.opcheck import check
mend_the_interpreter()
device, fused.uses_unproven = sys.argv[1], True
if device == "cpu":
    density._density_attention.register_kernel("cpu")(triton_front_end.density_attention)
    backward = triton_front_end.density_attention_backward
    density._density_attention_backward.register_kernel("cpu")(backward)
gaussians = [torch.rand(4, 4, device=device).add_(0.1).requires_grad_() for _ in "oc"]
ops = torch.ops.gmm_jepa
lengths = torch.tensor([9, 8], device=device)
for x in (torch.randn(2, 9, 6, device=device), torch.randn(2, 6, 9, device=device).mT):
    check(ops.density_attention.default, (x.requires_grad_(), *gaussians, lengths))
    check(ops.density_attention.default, (x, *gaussians, None))
    inputs = (x.detach(), *(t.detach() for t in gaussians), lengths)
    check(ops.density_attention_backward.default, (x.detach(), *inputs))
"""


def test_opcheck_with_the_kernels_behind_the_op(device, tmp_path):
    """A process of its own: on a CPU the kernels take the place of the native ones."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", OPCHECK, device],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
