"""The profile of a run: its files, its figures, and a training that does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from gmm_jepa.cli import main
from gmm_jepa.train.metrics import read_metrics
from gmm_jepa.train.profile import PROFILED_STEPS, op_lines
from tests.audio import write_corpus

SMALL = ["--preset", "smoke", "--train.no-tensorboard", "--mixture.n-components", "8"]
SMALL += ["--train.steps", "10", "--train.log-every", "1", "--encoder.dropout", "0.1"]
TIMED = ("audio_s_per_s", "wait_share")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"), 12)


def train(manifest: Path, out: Path, *more: str) -> list[dict]:
    assert main(["train", "--audio", str(manifest), "--out", str(out), *SMALL, *more]) == 0
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def test_a_profile_is_written_and_changes_no_loss(manifest, tmp_path, capsys):
    profile = tmp_path / "profile"
    plain = train(manifest, tmp_path / "plain")
    assert train(manifest, tmp_path / "profiled", "--profile", str(profile)) == plain
    assert "ops.txt" in capsys.readouterr().out
    assert json.loads((profile / "trace.json").read_text())["traceEvents"]
    found = json.loads((profile / "ops.json").read_text())
    assert found["steps"] == PROFILED_STEPS
    assert sum(op["share"] for op in found["ops"]) == pytest.approx(1)
    ops = {op["name"]: op for op in found["ops"]}
    # With AVX-512 linear maps are an op of their own.
    product = next(name for name in ("gmm_jepa::linear", "aten::addmm") if name in ops)
    backward = next(name for name in ("gmm_jepa::linear_backward", "aten::mm") if name in ops)
    for name in (product, backward, "aten::conv2d", "aten::convolution_backward"):
        assert ops[name]["flops"] > 0, name
        assert 0 < ops[name]["floor_share"] < 1.5, name
    assert ops["aten::gelu"]["floor_share"] is None
    assert product in (profile / "ops.txt").read_text()
    assert sorted(path.name for path in profile.iterdir()) == ["ops.json", "ops.txt", "trace.json"]


def test_a_training_shorter_than_the_warm_up_says_so(manifest, tmp_path, capsys):
    train(manifest, tmp_path / "run", "--train.steps", "3", "--profile", str(tmp_path / "none"))
    assert "profile: the training ended after 3 steps" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_training_that_ends_while_profiled_counts_the_steps_there_were(manifest, tmp_path):
    train(manifest, tmp_path / "run", "--train.steps", "6", "--profile", str(tmp_path / "some"))
    assert json.loads((tmp_path / "some" / "ops.json").read_text())["steps"] == 2


def event(key: str, *, own: float, whole: float, **more) -> SimpleNamespace:
    times = {"self_cpu_time_total": own, "cpu_time_total": whole}
    times |= {"self_device_time_total": 10 * own, "device_time_total": 10 * whole}
    held = {"count": 2, "flops": 0, "input_shapes": [], "device_type": DeviceType.CPU}
    return SimpleNamespace(key=key, **{**times, **held, **more})


def test_lines_by_hand():
    events = [
        event("aten::mm", own=300.0, whole=300.0, flops=600),
        event("aten::mm", own=100.0, whole=100.0, flops=200),
        event("aten::mul", own=400.0, whole=400.0, flops=99),
        event(
            "aten::convolution_backward",
            own=200.0,
            whole=250.0,
            input_shapes=[[2, 8, 1, 5], [2, 4, 1, 5], [8, 4, 1, 3]],
        ),
        event("ProfilerStep#4", own=1e6, whole=1e6),
        event("a_kernel", own=1e6, whole=1e6, device_type=DeviceType.CUDA),
    ]
    lines = {line.name: line for line in op_lines(events, 2, 4e6, on_gpu=False)}
    assert list(lines) == ["aten::mm", "aten::mul", "aten::convolution_backward"]
    mm = lines["aten::mm"]
    assert (mm.calls, mm.ms, mm.share, mm.flops) == (2.0, 0.2, 0.4, 400.0)
    assert mm.floor_share == pytest.approx(800 / 4e6 / 400e-6)
    assert lines["aten::mul"].floor_share is None
    assert lines["aten::convolution_backward"].flops == 2 * 2 * (2 * 8 * 5) * (4 * 3)
    on_gpu = op_lines(events, 2, 4e6, on_gpu=True)
    assert on_gpu[0].ms == 2.0
