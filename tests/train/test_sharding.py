"""Sharded trainings: the losses of one process, checkpoints, and what a step sends and holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gmm_jepa.calibration import synthetic_labels
from gmm_jepa.cli import main
from gmm_jepa.config import Recipe
from gmm_jepa.distributed import Processes
from gmm_jepa.objectives.build import initial_model
from gmm_jepa.objectives.schedules import schedule_at
from gmm_jepa.presets import preset
from gmm_jepa.train import compile as compiling
from gmm_jepa.train import sharding
from gmm_jepa.train import state as state_of_training
from gmm_jepa.train.checkpoint import load_state, newest
from gmm_jepa.train.metrics import read_metrics
from gmm_jepa.train.state import TrainState
from tests.audio import write_corpus
from tests.train.commands import cut
from tests.train.steps import alone, steps_of
from tests.train.test_sync import floats_read

SMALL = ["--preset", "smoke", "--train.no-tensorboard", "--mixture.n-components", "8"]
SMALL += ["--train.steps", "4", "--train.log-every", "1", "--train.checkpoint-every", "2"]
TRANSFORMER = ["--model", "transformer-cpu", "--encoder.layers", "2", "--encoder.conv-dim", "16"]
TRANSFORMER += ["--encoder.code-dim", "32", "--encoder.ffn-dim", "64", "--objective.cluster-head"]
TRANSFORMER += ["mlp", "--train.precision", "bf16", "--train.checkpoint-blocks"]
TRANSFORMER += ["--train.accumulate", "2"]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMANDS = Path(__file__).with_name("commands.py")
FIGURES = ("loss", "jepa", "kl", "gradient_norm")
TWO = Processes(rank=0, world_size=2, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: ``one*`` by one process, ``two*`` sharded over two."""
    root = tmp_path_factory.mktemp("runs")
    manifest = str(write_corpus(root / "audio", 12))

    def words(name: str, *more: str) -> list[str]:
        return ["train", "--audio", manifest, "--out", str(root / name), *SMALL, *more]

    assert main(words("one")) == 0
    assert main(words("one-transformer", *TRANSFORMER)) == 0
    commands = [
        words("two", "--train.shard"),
        words("two-transformer", "--train.shard", *TRANSFORMER),
        ["cut", str(root / "two"), str(root / "two-resumed"), "2"],
        words("two-resumed", "--train.shard"),
        ["cut", str(root / "one"), str(root / "one-then-two"), "2"],
        words("one-then-two", "--train.shard"),
        ["start", "conformer-cpu"],
        ["start", "transformer-cpu"],
    ]
    done = subprocess.run(
        [sys.executable, *LAUNCHER, str(COMMANDS), json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    cut(root / "two", root / "two-then-one", 2)
    assert main(words("two-then-one")) == 0
    return root


def figures(run: Path) -> list[list[float]]:
    return [[line[name] for name in FIGURES] for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("found", "expected", "relative"),
    [
        ("two", "one", 1e-5),
        ("one-then-two", "one", 1e-5),
        ("two-then-one", "one", 1e-5),
        ("two-transformer", "one-transformer", 1e-2),  # bf16
    ],
)
def test_two_processes_give_the_figures_of_one(found, expected, relative, runs):
    assert len(figures(runs / found)) == 4
    for ours, theirs in zip(figures(runs / found), figures(runs / expected)):
        assert ours == pytest.approx(theirs, rel=relative)


def test_a_resumed_run_gives_the_same_bits(runs):
    whole, resumed = runs / "two", runs / "two-resumed"
    assert figures(whole) == figures(resumed)
    weights = "checkpoints/step_00000004/model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()


def test_checkpoints_are_those_of_one_process(runs):
    """Same names, shapes and types, and the values to rounding."""
    one, two = (load_state(newest(runs / run / "checkpoints")) for run in ("one", "two"))
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [
            {i: held[name] for i, held in run["optimizer"]["state"].items()} for run in (one, two)
        ]
        assert distance(*moments) < 1e-4
    weights = "checkpoints/step_00000004/model.safetensors"
    whole, joined = (load_file(runs / run / weights) for run in ("one", "two"))
    assert whole.keys() == joined.keys()
    for network in ("online.", "teacher."):
        parts = [{k: v for k, v in of.items() if k.startswith(network)} for of in (whole, joined)]
        assert distance(*parts) < 1e-4


def distance(expected: dict, found: dict) -> float:
    """Of all tensors together, relative to their size."""
    assert expected
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
    apart = sum(float((found[name] - tensor).square().sum()) for name, tensor in expected.items())
    return (apart / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


@pytest.fixture
def two_processes() -> Iterator[None]:
    """A process group of two whose other process never answers nor is waited for."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_other_processes_hold_one_whole_unit_at_a_time(monkeypatch):
    """The main process alone makes a model; that all get its bits is a command of `runs`."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    objectives, whole = [], []
    build, shard = state_of_training.build_objective, sharding.fully_shard

    def built(*arguments):
        objectives.append(build(*arguments))
        return objectives[0]

    def seen(unit, **options):
        held = (p for p in objectives[0].model.parameters() if not isinstance(p, DTensor))
        whole.append(sum(p.numel() for p in held if not p.is_meta))
        return shard(unit, **options)

    monkeypatch.setattr(state_of_training, "build_objective", built)
    monkeypatch.setattr(sharding, "fully_shard", seen)
    try:
        recipe = sharded(preset("smoke"))
        model = initial_model(recipe)
        TrainState(recipe, synthetic_labels(recipe), dataclasses.replace(TWO, rank=1))
    finally:
        dist.destroy_process_group()
    parts = sharding.units(model)
    assert len(whole) == len(parts) + 1  # the root
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    root = sum(p.numel() for p in model.parameters()) - sum(sizes)
    assert sorted(whole) == sorted([*sizes, root])
    assert not any(p.is_meta for p in objectives[0].parameters())


def sharded(recipe: Recipe, **changes) -> Recipe:
    return dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, shard=True, **changes)
    )


def test_everything_is_held_in_halves(two_processes):
    recipe = sharded(preset("smoke"))
    whole = TrainState(preset("smoke"), synthetic_labels(recipe), alone(TWO.device))
    state = TrainState(recipe, synthetic_labels(recipe), TWO)
    expected = dict(whole.model.named_parameters())
    assert list(expected) == [name for name, _ in state.model.named_parameters()]
    for name, p in state.model.named_parameters():
        assert isinstance(p, DTensor), name
        assert p.shape == expected[name].shape
        first_half = expected[name][: -(-len(p) // 2)]
        torch.testing.assert_close(p.to_local().detach(), first_half.detach(), rtol=0, atol=0)
    for p in state.parameters:
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    n_learned = sum(p.numel() for p in whole.parameters)
    held = sum(m["exp_avg"].numel() for m in state.optimizer.state.values())
    assert n_learned / 2 <= held < 0.51 * n_learned


def test_a_gradient_that_is_not_finite_skips_the_step(two_processes):
    recipe = sharded(preset("smoke"))
    state = TrainState(recipe, synthetic_labels(recipe), TWO)
    before = [p.detach().clone() for p in state.parameters]
    for value, skipped in ((float("nan"), 1.0), (1.0, 0.0)):
        for p in state.model.parameters():
            p.grad = torch.full_like(p, value) if p.requires_grad else None
        _, bad = state.update(schedule_at(recipe, 0), recipe.train.clip_norm)
        assert bad == skipped
        same = [torch.equal(p, old) for p, old in zip(state.parameters, before)]
        assert all(same) == bool(skipped)
        assert all(p.grad is None for p in (*state.parameters, *state.model.parameters()))


@pytest.mark.parametrize("n_parts", [1, 2])
def test_units_are_gathered_twice_and_gradients_sent_once(n_parts, two_processes, monkeypatch):
    """The units: two front ends, two blocks, predictor, cluster head; and the root."""
    sent = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 0, "all_reduce": 0}
    for name in sent:
        original = getattr(dist, name)

        def counted(*arguments, _name=name, _original=original, **options):
            sent[_name] += 1
            return _original(*arguments, **options)

        monkeypatch.setattr(dist, name, counted)
    step, _ = steps_of(sharded(preset("smoke"), accumulate=n_parts), peers=TWO)
    step(0)
    sent.update(dict.fromkeys(sent, 0))
    step(1)
    # For the gradient again: all but the root, which was kept, and the teacher's two.
    assert sent["all_gather_into_tensor"] == n_parts * (7 + 4)
    assert sent["reduce_scatter_tensor"] == 5
    assert sent["all_reduce"] == 1  # the gradient's norm


def test_a_step_reads_nothing_back(two_processes, monkeypatch):
    step, _ = steps_of(sharded(preset("smoke")), peers=TWO)
    step(0)
    reads = floats_read(monkeypatch)
    step(1)
    step(2)
    assert not reads


def test_parts_are_compiled_one_by_one_and_equal_blocks_share_a_graph(
    two_processes, monkeypatch, capsys
):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    recipe = preset("smoke", model="transformer-cpu")
    small = dataclasses.replace(recipe.encoder, code_dim=32, layers=3, conv_dim=8, ffn_dim=32)
    recipe = dataclasses.replace(recipe, encoder=small)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step, _ = steps_of(sharded(recipe, compile=True), peers=TWO)
    step(0)
    step(1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert graphs == 6  # front end and blocks with and without gradient, predictor, cluster head
    assert "goes on without" not in capsys.readouterr().out


def test_one_process_shards_nothing_and_says_so(runs, tmp_path, capsys):
    run, audio = tmp_path / "run", runs / "audio" / "manifest.jsonl"
    assert main(["train", "--audio", str(audio), "--out", str(run), *SMALL, "--train.shard"]) == 0
    assert "train.shard: one process, so nothing is sharded" in capsys.readouterr().out
    assert figures(run) == figures(runs / "one")
