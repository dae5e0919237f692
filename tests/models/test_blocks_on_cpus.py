"""Conformer blocks, transformer blocks and heads whose parts are operators on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.attention import GatedRelativeBias
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerBlock
from gmm_jepa.models.heads import ClusterHead
from gmm_jepa.models.padding import FrameMask, frame_mask, zero_padding
from gmm_jepa.models.transformer import GlobalGatedBias, TransformerBlock, TransformerConfig
from gmm_jepa.ops import fused, native
from tests.against_float64 import assert_near, cotangent, needs_products, norm


class Biased(nn.Module):
    """A block with the position bias that its encoder would hand in."""

    def __init__(self, block: nn.Module, bias: nn.Module | None) -> None:
        super().__init__()
        self.block, self.bias = block, bias

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        if self.bias is None:
            return self.block(x)
        return self.block(x, mask, self.bias, self.bias.table(x.shape[1]))


POSITIONS = {"n_buckets": 16, "max_distance": 40}


def model_of(name: str, *, dropout: float = 0.0, dim: int = 64) -> Biased:
    torch.manual_seed(0)
    sizes = {"code_dim": dim, "heads": 2, "dropout": dropout}
    if name == "cluster head":
        return Biased(ClusterHead(dim, 50, dropout), None)
    if name == "transformer block":
        block = TransformerBlock(TransformerConfig(ffn_dim=96, **sizes))
        return Biased(block, GlobalGatedBias(2, dim // 2, **POSITIONS))
    block = ConformerBlock(ConformerConfig(conv_kernel=7, **sizes))
    return Biased(block, GatedRelativeBias(2, dim // 2, **POSITIONS))


OPERATORS = ("feed_forward", "self_attention", "convolution_module")
# Calls of each.
MODELS = {"conformer block": (2, 1, 1), "cluster head": (3, 0, 0), "transformer block": (1, 0, 0)}


def frames_of(model: Biased, has_mask: bool) -> tuple[Tensor, FrameMask | None]:
    dim = next(p.shape[-1] for p in model.parameters() if p.ndim == 2)
    mask = frame_mask(torch.tensor([21, 0, 13]), 21) if has_mask else None
    return zero_padding(torch.randn(3, 21, dim), mask), mask


@pytest.fixture
def calls(monkeypatch) -> Callable[[], tuple[int, ...]]:
    """How often each of the three operators was called."""
    counts = dict.fromkeys(OPERATORS, 0)
    for name in counts:
        op = getattr(ops, name)

        def counting(*arguments, name=name, op=op, **options):
            counts[name] += 1
            return op(*arguments, **options)

        monkeypatch.setattr(ops, name, counting)
    return lambda: tuple(counts.values())


def results_of_model(
    model: nn.Module, x: Tensor, mask: FrameMask | None, autocast: bool = True
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(leaves[0], mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent(out))]


@needs_products
@pytest.mark.parametrize("has_mask", [False, True], ids=["whole", "mask"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_near_as_plain_torch(name, has_mask, calls):
    """To the model in float64; padding of a block comes out as zeros."""
    model = model_of(name)
    x, mask = frames_of(model, has_mask)
    got = results_of_model(model, x, mask)
    assert calls() == MODELS[name]
    with fused.composed():
        peer = results_of_model(model, x, mask)
    assert calls() == MODELS[name]
    exact = results_of_model(model.double(), x.double(), mask, autocast=False)
    assert [t.dtype for t in got] == [t.dtype for t in peer]
    if has_mask and name != "cluster head":
        assert (got[0][mask.keep.expand_as(got[0]) == 0] == 0).all()
    got = [t.float() for t in got]  # a head's logits are bfloat16
    assert_near(got, peer, exact, factor=2, unit=1e-6, size=norm)


@needs_products
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "why", ["float32", "float16", "float64", "width", "instruction set", "narrow frames"]
)
def test_models_that_do_not_take_the_operators(name, why, calls):
    model = model_of(name, dim=24 if why == "width" else 64)
    x, mask = frames_of(model, True)
    if why == "float64":
        model, x = model.double(), x.double()
    if why == "narrow frames":
        x = x.bfloat16()
        if name == "cluster head":  # which widens its own
            model = model.block.blocks[0]
            model, x = (lambda block: lambda x, _: block(x))(model), x.repeat(1, 1, 2)
    narrow = torch.float16 if why == "float16" else torch.bfloat16
    native.use_instruction_set("portable" if why == "instruction set" else "")
    try:
        with torch.autocast("cpu", narrow, enabled=why != "float32"):
            model(x, mask)
    finally:
        native.use_instruction_set("")
    assert calls() == (0, 0, 0)


@needs_products
@pytest.mark.parametrize("name", MODELS)
def test_training_drops_out_as_composed_models_do(name, calls):
    """Mean and variance of every output, over draws."""
    model, n_draws = model_of(name, dropout=0.2).train(), 300
    x, mask = frames_of(model, True)

    def drawn() -> tuple[Tensor, Tensor]:
        outputs = torch.stack([model(x, mask) for _ in range(n_draws)]).float()
        return outputs.mean(0), outputs.var(0)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mean, variance = drawn()
        assert calls() == tuple(n * n_draws for n in MODELS[name])
        with fused.composed():
            mean_composed, variance_composed = drawn()
    assert variance.mean() == pytest.approx(float(variance_composed.mean()), rel=0.05)
    deviation = ((variance + variance_composed) / n_draws).sqrt()
    rounding = 2.0**-9 * mean_composed.abs().max()
    assert ((mean - mean_composed).abs() <= 5 * deviation + rounding).all()


@needs_products
@pytest.mark.parametrize("name", MODELS)
def test_in_evaluation_nothing_is_dropped(name, calls):
    model, plain = (model_of(name, dropout=p).eval() for p in (0.5, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (m(*frames_of(plain, True)) for m in (model, plain) if torch.manual_seed(1))
    assert torch.equal(first, second)
    assert calls() == tuple(2 * n for n in MODELS[name])


@needs_products
def test_one_graph_of_a_block_draws_anew():
    model = model_of("conformer block", dropout=0.1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, mask = frames_of(model, True)
    first, second = (results_of_model(compiled, x, mask) for _ in "12")
    assert not torch.equal(first[0], second[0])


@needs_products
def test_one_graph_holds_a_conformer_block():
    model, graphs = model_of("conformer block").eval(), []
    x, mask = frames_of(model, True)

    def noting(graph, inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=noting)
    eager, ours = (results_of_model(form, x, mask) for form in (model, compiled))
    found = [graphs[0].count(f"gmm_jepa.{name}.") for name in OPERATORS]
    assert found == list(MODELS["conformer block"])
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * float(e.abs().max()))


def test_a_head_of_bfloat16_runs_without_autocast():
    head, z = ClusterHead(32, 10, 0.0).bfloat16(), torch.randn(5, 32).bfloat16()
    out = head(z)
    assert out.dtype == torch.bfloat16
    apart = (out.float() - head.float()(z.float())).abs().max()
    assert apart < 0.05
