"""Plans: their arithmetic, what they refuse, and a prediction beside a run of the real trainer."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gmm_jepa import calibration as calibrations
from gmm_jepa.calibration import (
    Calibration,
    calibrate,
    cost_settings,
    labelling_flops,
    step_flops,
    synthetic_labels,
)
from gmm_jepa.cli import main
from gmm_jepa.cli.plan import memory_warning
from gmm_jepa.config import Recipe
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.flops import encoder_flops
from gmm_jepa.memory import memory_of, sharded
from gmm_jepa.objectives.build import initial_model
from gmm_jepa.ops.fused import composed
from gmm_jepa.plan import DEVICES, Assumptions, make_plan
from gmm_jepa.presets import SYSTEMS, preset
from gmm_jepa.train import timing
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.state import TrainState
from gmm_jepa.train.trainer import batch_plan, train
from tests.audio import write_corpus

CPU = torch.device("cpu")
ALONE = Processes(rank=0, world_size=1, device=CPU)


def with_train(recipe: Recipe, **changes) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def measured(recipe: Recipe, **changes) -> Calibration:
    """A calibration with round numbers: 4 rows of 1 s in 0.1 s."""
    values = {
        "device": "toy",
        "threads": 1,
        "torch_version": "2",
        "memory_bytes": 0.0,
        "precision": "fp32",
        "settings": cost_settings(recipe),
        "rows": 4,
        "segment_s": 1.0,
        "flops_per_step": step_flops(recipe, 4, 1.0),
        "step_s": 0.1,
        "step_p20_s": 0.09,
        "step_p80_s": 0.11,
        "n_steps": 8,
        "log_s": 0.5,
        "checkpoint_s": 1.0,
        "matrix_flops_per_s": 1e12,
    }
    return Calibration(**{**values, **changes})


def test_a_plan_counts_steps_lines_and_checkpoints():
    recipe = with_train(preset("smoke"), steps=100, log_every=10, checkpoint_every=50)
    plan = make_plan(recipe, Assumptions(hours=1, segment_s=1.0), measured(recipe))
    assert plan.step_s == pytest.approx(0.1)
    assert plan.training_s == pytest.approx(100 * 0.1 + 10 * 0.5 + 2 * 1.0)
    assert plan.epochs == pytest.approx(100 * 4 * 0.96 / 3600)
    assert "measured" in plan.basis


def test_epochs_gpus_and_the_price():
    recipe = preset("smoke")
    alone = make_plan(recipe, Assumptions(hours=10, epochs=2), measured(recipe))
    assert alone.steps == pytest.approx(2 * 36_000 / (0.96 * 4), rel=1e-3)
    assert alone.epochs == pytest.approx(2, rel=1e-3)
    four = make_plan(
        recipe, Assumptions(hours=10, epochs=2, gpus=4, price_per_hour=2.5), measured(recipe)
    )
    assert four.steps == alone.steps
    assert four.step_s == pytest.approx(alone.step_s / 4)
    assert four.price == pytest.approx(2.5 * 4 * four.training_s / 3600)
    assert four.memory.activations < 0.3 * alone.memory.activations
    assert any("communication" in line for line in four.assumed)


def test_relabelling_costs_a_pass_of_a_frozen_encoder_in_all_iterations_but_the_first():
    recipe, once = (preset("smoke", system=f"{name}-style") for name in ("hubert", "wavlm"))
    assert (recipe.objective.iterations, once.objective.iterations) == (2, 1)
    twice, alone = (make_plan(r, Assumptions(hours=1)) for r in (recipe, once))
    encoder = encoder_flops(recipe.encoder, round(recipe.data.max_segment_s * 16_000))
    assert twice.step_flops - alone.step_flops == pytest.approx(0.5 * twice.rows * encoder)
    size = sum(p.numel() for p in initial_model(recipe).online.parameters())
    assert (twice.memory.labels, alone.memory.labels) == (4 * size, 0)
    assert twice.disk == alone.disk


def test_a_known_gpu_by_its_peak_and_an_assumed_share():
    recipe = with_train(preset("paper"), precision="bf16")
    half = make_plan(recipe, Assumptions(hours=100, device="h200", utilisation=0.5))
    per_second = 0.5 * DEVICES["h200"].bf16_flops_per_s
    assert half.step_s == pytest.approx(half.step_flops / per_second)
    assert half.step_flops == pytest.approx(480 * 25e9, rel=0.05)
    assumed = make_plan(recipe, Assumptions(hours=100))
    assert "ASSUMED" in assumed.basis
    assert "H200" in assumed.device
    wide = make_plan(preset("paper"), Assumptions(hours=100))
    assert wide.step_s > assumed.step_s


def test_disk():
    recipe = preset("smoke")
    disk = make_plan(recipe, Assumptions(hours=50_000)).disk
    assert disk.packed_corpus == 50_000 * 3600 * 16_000 * 2
    assert disk.checkpoints == 3 * disk.checkpoint


def test_memory_is_what_a_step_holds(tmp_path):
    """Beside a real model, its optimiser after a step, and its checkpoint."""
    recipe = preset("cpu")
    memory = memory_of(recipe, 4, 1.0)
    state = TrainState(recipe, synthetic_labels(recipe), ALONE)
    teacher = sum(p.numel() for p in state.model.teacher.parameters())
    learned = sum(p.numel() for p in state.parameters)
    assert memory.teacher == 4 * teacher
    assert memory.parameters == 4 * sum(p.numel() for p in state.model.parameters()) - 4 * teacher
    assert memory.gradients == 4 * learned
    for p in state.parameters:
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    moments = state.optimizer.state.values()
    held = sum(s[name].nbytes for s in moments for name in ("exp_avg", "exp_avg_sq"))
    assert memory.optimizer == held
    state.save(tmp_path, keep=1)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    disk = make_plan(recipe, Assumptions(hours=1)).disk
    assert disk.checkpoint == pytest.approx(written, rel=0.03)


def test_activations_are_those_of_a_real_forward_pass():
    """Counted here on real tensors; linear in the rows but for what belongs to no row."""
    recipe = preset("smoke")
    model = TrainState(recipe, synthetic_labels(recipe), ALONE).model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, composed():  # as on a GPU
        encoded = model.encode(torch.randn(4, 16_000), torch.full((4,), 16_000))
        keep_all = torch.ones(encoded.output.shape[:2], dtype=torch.bool)
        keep(model.predict(encoded.output, keep_all, encoded.lengths_frames))
        keep(model.cluster_head(encoded.output.flatten(0, 1)))
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert memory_of(recipe, 4, 1.0).activations == pytest.approx(expected, rel=0.05)
    eight = memory_of(recipe, 8, 1.0).activations
    assert eight == pytest.approx(2 * memory_of(recipe, 4, 1.0).activations, rel=0.05)


def test_sharding_leaves_each_gpu_its_part():
    """Of everything but activations; a checkpoint stays whole."""
    recipe = with_train(preset("smoke"), shard=True)
    plans = [
        make_plan(changed, Assumptions(hours=1, gpus=gpus))
        for changed, gpus in (
            (recipe, 4),
            (with_train(recipe, shard=False), 4),
            (with_train(recipe, accumulate=2), 4),
            (recipe, 1),
        )
    ]
    parts, whole, in_two, alone = (plan.memory for plan in plans)
    for name in ("parameters", "gradients", "optimizer", "teacher"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name) / 4)
        assert getattr(alone, name) == getattr(whole, name)
    assert parts.activations == whole.activations
    assert parts.gathered > 0 == whole.gathered == alone.gathered
    # Gradients are whole until the last micro-batch sends them.
    assert in_two.gradients == pytest.approx(whole.gradients * (1 + 1 / 4))
    assert plans[0].disk == plans[1].disk
    assert any("in 4 parts" in line for line in plans[0].assumed)
    tight = [dataclasses.replace(plan, device_memory_bytes=1e3) for plan in plans]
    advised = ["--train.shard" in memory_warning(plan, 1) for plan in tight]
    assert advised == [False, True, False, False]


def test_the_large_preset_on_eight_gpus():
    recipe = preset("large")
    assert recipe.train.shard
    assert recipe.train.checkpoint_blocks
    whole = memory_of(recipe, 1, 1.0)
    assert 330e6 < whole.parameters / 4 < 350e6
    parts = sharded(whole, recipe, 8)
    assert parts.total - parts.activations < 0.2 * (whole.total - whole.activations)
    largest = 6 * 2048 * 2048  # parameters of the cluster head, without its ends
    assert (3 * 2 + 4) * largest < parts.gathered < 1.2 * (3 * 2 + 4) * largest


def test_planning_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make_plan(preset("smoke"), Assumptions(hours=1))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_can_be_planned_and_calibrated(system):
    recipe = preset("smoke", system=system)
    found = calibrate(recipe, CPU, longest_s=0.0)
    assert found.n_steps == calibrations.LEAST_STEPS
    assert found.step_s > 0 < found.share
    plan = make_plan(recipe, Assumptions(hours=1), found)
    labelling = labelling_flops(recipe, found.rows, found.segment_s) / found.flops_per_step
    assert plan.step_s == pytest.approx((1 + labelling) * found.step_s, rel=1e-6)


def test_a_batch_too_large_to_time_is_made_smaller(monkeypatch):
    recipe = preset("smoke")
    monkeypatch.setattr(calibrations, "matrix_rate", lambda *_: 1.0)
    found = calibrate(recipe, CPU, longest_s=0.0)
    assert found.rows == 1
    plan = make_plan(recipe, Assumptions(hours=1), found)
    assert plan.step_s == pytest.approx(4 * found.step_s)


def test_a_calibration_comes_back_from_its_file(tmp_path):
    found = measured(preset("smoke"))
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found


def test_another_recipes_calibration_is_named_as_an_assumption():
    found = measured(preset("smoke"))
    plan = make_plan(preset("cpu"), Assumptions(hours=1), found)
    assert any("OTHER settings" in line for line in plan.assumed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hours": 0}, "hours: expected a number above 0, got 0"),
        ({"hours": float("nan")}, "hours"),
        ({"gpus": 0}, "gpus: expected 1 or more, got 0"),
        ({"utilisation": 1.5}, "utilisation"),
        ({"price_per_hour": -1.0}, "price_per_hour"),
        ({"epochs": 0.0}, "epochs"),
        ({"segment_s": 99.0}, "segment_s"),
        ({"device": "abacus"}, "device: expected one of h100, h200, a100, rtx4090 or cpu"),
        ({"device": "cpu"}, "plan --calibrate"),
        ({"gpus": 64}, "data.batch_s: expected a row of 1 s for each of 64 GPUs"),
    ],
)
def test_nonsense_is_refused(changes, said):
    with pytest.raises(InputError, match=said) as refused:
        make_plan(preset("smoke"), Assumptions(**{"hours": 1, **changes}))
    assert "\n" not in str(refused.value)


def test_a_device_beside_a_calibration_is_refused():
    recipe = preset("smoke")
    with pytest.raises(InputError, match="device: expected without a calibration"):
        make_plan(recipe, Assumptions(hours=1, device="h100"), measured(recipe))


def test_the_command(tmp_path, capsys):
    out, found = tmp_path / "plan.json", tmp_path / "calibration.json"
    words = ["plan", "--preset", "smoke"]
    assert main([*words, "--calibrate", "--calibration", str(found)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(found.read_text())
    more = ["--hours", "2", "--price-per-hour", "1.5", "--json", str(out)]
    assert main([*words, *more, "--calibration", str(found)]) == 0
    printed = capsys.readouterr().out
    for part in ("training", "memory a GPU", "packed corpus", "checkpoints", "cost", "assumed:"):
        assert part in printed
    written = json.loads(out.read_text())
    assert written["disk"]["packed_corpus"] == 2 * 3600 * 32_000
    assert written["memory"]["total"] > written["memory"]["activations"] > 0
    assert written["training_s"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "hours: expected --hours of audio, or --calibrate"),
        (("--hours", "1", "--calibration", "nowhere.json"), "nowhere.json: no such file"),
        (("--calibrate", "--device", "h100"), "device: expected with --hours"),
        (("--calibrate", "--hours", "1", "--device", "h100"), "device: expected without --cal"),
        (("--calibrate", "--hours", "1", "--utilisation", "1"), "utilisation: expected without"),
        (("--calibrate", "--json", "plan.json"), "json: expected with --hours"),
        (("--hours", "1", "--device", "tpu"), "device: expected one of"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(["plan", "--preset", "smoke", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_damaged_calibration_is_one_line(tmp_path, capsys):
    for text in ("{", "[]", '{"device": 1}'):
        (tmp_path / "c.json").write_text(text)
        words = ["plan", "--hours", "1", "--calibration", str(tmp_path / "c.json")]
        assert main(words) == 2
        assert "c.json" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_said(capsys):
    assert main(["plan", "--preset", "paper", "--hours", "1", "--device", "rtx4090"]) == 0
    assert "--train.accumulate" in capsys.readouterr().out


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for one that was interrupted spin, which is processor time as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_prediction_holds_for_a_real_run(tmp_path, monkeypatch, one_thread):
    """Each run between two calibrations, in one process, in processor seconds of one thread.

    Other jobs on the machine lengthen wall time by what they please, processor time hardly. The
    run decodes real files of uneven lengths, writes lines and checkpoints and starts a model.
    """
    for module in (calibrations, timing):
        monkeypatch.setattr(module, "perf_counter", time.process_time)
    manifest = write_corpus(tmp_path / "audio", 48, seconds=(0.9, 1.0))
    corpus = open_corpus([str(manifest)], rejects=RejectLog(None))
    recipe = with_train(preset("smoke"), steps=60, tensorboard=False, log_every=10)
    for rows, padded in batch_plan(corpus, recipe).shapes:  # a small corpus need not fill them
        assert rows * padded > 0.9 * recipe.data.batch_s * 16_000
    segment_s = float(corpus.total_s / len(corpus))
    assumptions = Assumptions(hours=corpus.total_s / 3600, segment_s=segment_s)

    def predicted_s() -> float:
        found = calibrate(recipe, CPU, segment_s=segment_s)
        return make_plan(recipe, assumptions, found).training_s

    predicted, taken = [predicted_s()], []
    for turn in range(5):
        begin = time.process_time()
        folder = RunFolder(tmp_path / f"run{turn}")
        folder.root.mkdir()
        train(
            folder,
            recipe,
            corpus,
            synthetic_labels(recipe),
            ALONE,
            iteration=recipe.iterations[0],
            rejects=RejectLog(None),
        )
        taken.append(time.process_time() - begin)
        predicted.append(predicted_s())
    around = np.add(predicted[:-1], predicted[1:]) / 2
    assert 0.8 < np.median(around / taken) < 1.2, (predicted, taken)
