"""Compiled networks beside plain ones, and trainings where nothing can be compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gmm_jepa.config import TrainConfig
from gmm_jepa.errors import InputError
from gmm_jepa.models import ConformerConfig, JepaModel
from gmm_jepa.train import compile as compiling
from gmm_jepa.train.metrics import read_metrics
from tests.audio import write_corpus

SMALL = ["--preset", "smoke", "--train.no-tensorboard", "--mixture.n-components", "8"]
SMALL += ["--train.steps", "4", "--train.log-every", "1"]
TINY = ConformerConfig(
    channels=(4, 8), strides=(8,), residual_blocks=1, code_dim=16, layers=1, heads=2, dropout=0.0
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Of one padded length."""
    return write_corpus(tmp_path_factory.mktemp("audio"), 16, seconds=(0.985, 1.0))


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch._dynamo.reset()


def train(manifest: Path, out: Path, *more: str) -> list[dict]:
    from gmm_jepa.cli import main  # needs tyro, which the tests of compiled code do without

    assert main(["train", "--audio", str(manifest), "--out", str(out), *SMALL, *more]) == 0
    return read_metrics(out / "metrics.jsonl")


def assert_equal_losses(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        for name in ("loss", "jepa", "kl", "target_entropy"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-7), (a["step"], name)


@pytest.mark.parametrize("more", [(), ("--train.checkpoint-blocks",)])
def test_a_traced_training_gives_the_same_losses(more, manifest, tmp_path, monkeypatch, capsys):
    """Through all of torch.compile but the making of code."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    plain = train(manifest, tmp_path / "plain")
    traced = train(manifest, tmp_path / "traced", "--train.compile", *more)
    assert_equal_losses(traced, plain)
    assert "goes on without" not in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_one_line_where_nothing_can_be_compiled(manifest, tmp_path, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    plain = train(manifest, tmp_path / "plain")
    capsys.readouterr()
    found = train(manifest, tmp_path / "compiled", "--train.compile")
    assert_equal_losses(found, plain)
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "train.compile" in line]
    assert len(lines) == 1
    assert "train.compile: goes on without" in lines[0]


def test_a_users_mistake_is_no_failed_compilation(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    said, model = [], JepaModel(TINY, 4)
    compiling.compile_networks(model, n_buckets=1, report=said.append)
    with pytest.raises(InputError, match="waveform"):
        model.encode(torch.zeros(3))
    assert not said


def test_every_bucket_keeps_its_graph(monkeypatch):
    """More lengths than PyTorch's own limit of 8; met again, none is traced again."""
    traced = []

    def counting(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", counting)
    model = JepaModel(TINY, 4).eval()
    compiling.compile_networks(model, n_buckets=10, report=print)
    with torch.no_grad():
        for n_samples in range(400, 1400, 100):
            model.encode(torch.zeros(2, n_samples), torch.full((2,), n_samples))
        before = len(traced)
        for n_samples in range(400, 1400, 100):
            model.encode(torch.zeros(2, n_samples), torch.full((2,), n_samples))
    assert len(traced) == before >= 10


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_the_cluster_head_has_one_graph_for_all_numbers_of_rows(kind, monkeypatch):
    traced = []

    def counting(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", counting)
    model = JepaModel(TINY, 4, cluster_head=kind).eval()
    expected = [model.cluster_head(torch.ones(n, 16)) for n in (7, 12, 31)]
    compiling.compile_networks(model, n_buckets=1, report=print)
    for logits in expected:
        torch.testing.assert_close(model.cluster_head(torch.ones(len(logits), 16)), logits)
    assert len(traced) == 1


def test_cuda_graphs_are_asked_of_the_compiler(monkeypatch):
    modes = []

    def noting(graph, inputs, *, mode="default"):
        modes.append(mode)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", noting)
    for cuda_graphs in (False, True):
        model = JepaModel(TINY, 4)
        compiling.compile_networks(model, n_buckets=1, report=print, cuda_graphs=cuda_graphs)
        model.encode(torch.zeros(1, 1600))
    assert modes[0] == "default"
    assert modes[-1] == "reduce-overhead"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="code is made in minutes on a CPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_code_gives_the_same_outputs_and_gradients(cuda_graphs):
    """With the default backend; a graph is recorded in the second round and replayed after it.

    Each step moves all weights together by a hundredth of their length, so that no step grows with
    the loss and what a graph would compute from old weights is far from what it should.
    """
    said, found = [], []
    waveforms = torch.randn(2, 2, 1600, generator=torch.Generator().manual_seed(1)).cuda()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = JepaModel(TINY, 4).cuda()
        if compiled:
            compiling.compile_networks(
                model, n_buckets=1, report=said.append, cuda_graphs=cuda_graphs
            )
        lengths = torch.tensor([1600, 900]).cuda()
        for step in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            output = model.encode(waveforms[step % 2], lengths).output
            output.square().mean().backward()
            moved = [p for p in model.online.parameters() if p.grad is not None]
            found.append((output.detach().clone(), [p.grad.clone() for p in moved]))
            descend(moved, share=0.01)
            model.zero_grad()
    assert not said
    plain, compiled = found[:5], found[5:]
    assert all(t.isfinite().all() for output, grads in plain for t in (output, *grads))
    for (output, gradients), (expected, expected_gradients) in zip(compiled, plain, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        for g, e in zip(gradients, expected_gradients, strict=True):
            # a key's bias has none but what rounding leaves, 1e-9
            torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()) + 1e-7)
    # the same audio two steps earlier: other weights, other outputs, by ten times what may differ
    for (before, _), (after, _) in zip(plain, plain[2:]):
        assert ((after - before).abs() > 10 * (1e-4 + 1e-3 * before.abs())).float().mean() > 0.5


def descend(parameters: list[torch.nn.Parameter], *, share: float) -> None:
    """Against the gradient, by a share of the length of all parameters together."""
    with torch.no_grad():
        length, steepness = (
            torch.stack([t.norm() for t in tensors]).norm()
            for tensors in (parameters, [p.grad for p in parameters])
        )
        for p in parameters:
            p -= share * length / steepness * p.grad


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "compile"),
        ({"compile": True, "accumulate": 2}, "accumulate"),
        ({"compile": True, "shard": True}, "shard"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(settings, what):
    with pytest.raises(InputError, match=what):
        TrainConfig(cuda_graphs=True, **settings)
