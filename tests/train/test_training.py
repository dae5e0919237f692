"""Runs of the smoke preset on small synthetic audio: learning, resuming, processes, failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gmm_jepa.cli import EXIT_INTERRUPTED, EXIT_STOPPED, main
from gmm_jepa.gmm.partial import PartialFit
from gmm_jepa.train import trainer
from gmm_jepa.train.checkpoint import newest, save, steps
from gmm_jepa.train.metrics import read_metrics
from tests.audio import write_corpus

SMALL = ["--preset", "smoke", "--train.no-tensorboard", "--mixture.n-components", "8"]
LOSSES = ("loss", "jepa", "kl", "target_entropy", "agreement", "gradient_norm", "usage_entropy")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"))


def arguments(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--audio", str(manifest), "--out", str(out), *SMALL, *more]


def train(manifest: Path, out: Path, *more: str) -> list[dict]:
    assert main(arguments(manifest, out, *more)) == 0
    return read_metrics(out / "metrics.jsonl")


def process(
    manifest: Path,
    out: Path,
    *more: str,
    launcher: tuple[str, ...] = (),
    command: str = "train",
) -> subprocess.Popen:
    words = [command, *arguments(manifest, out, *more)[1:]]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "gmm_jepa", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(lines: list[dict]) -> list[tuple]:
    return [(line["step"], *(line[name] for name in LOSSES)) for line in lines]


def assert_close(ours: list[dict], theirs: list[dict], relative: float) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs):
        for name in LOSSES[:4]:
            assert a[name] == pytest.approx(b[name], rel=relative, abs=1e-7), (a["step"], name)


def wait_for_steps(metrics: Path, n: int, running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < n:
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_loss_falls_and_every_figure_is_there(manifest, tmp_path):
    more = ("--train.steps", "40", "--objective.cluster-head", "mlp")  # learns soonest
    lines = train(manifest, tmp_path / "run", *more)
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    for name in (
        *LOSSES,
        "lambda",
        "learning_rate",
        "teacher_decay",
        "audio_s_per_s",
        "wait_share",
        "teacher_cosine",
        *(
            f"{layer}_{meter}"
            for layer in ("front_end", "layer1", "online", "teacher")
            for meter in ("std", "effective_rank", "mean_cosine")
        ),
        "skipped_steps",
    ):
        assert all(isinstance(line[name], (int, float)) for line in lines), name
    assert lines[-1]["lambda"] == pytest.approx(0.01)
    assert [step for step, _ in steps(tmp_path / "run" / "checkpoints")] == [30, 40]


def test_twenty_steps_follow_the_golden_curve(manifest, tmp_path):
    """A refactor leaves the losses as they are; other processors may differ in rounding."""
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    published = ("--objective.cluster-head", "mlp", "--objective.no-align-targets")
    more = ("--train.steps", "20", "--train.log-every", "1", *published)
    lines = train(manifest, tmp_path / "run", *more)
    for name in ("jepa", "kl"):
        assert [line[name] for line in lines] == pytest.approx(golden[name], rel=2e-3), name


def test_killed_at_any_moment_it_resumes_to_the_same_losses(manifest, tmp_path):
    """Every step is logged; dropout, noise, a worker, bf16, micro-batches, recomputed blocks and
    odd checkpoint intervals are on."""
    more = ("--train.steps", "60", "--train.log-every", "1", "--train.checkpoint-every", "7")
    more += ("--data.workers", "1", "--encoder.dropout", "0.1", "--train.precision", "bf16")
    more += ("--train.accumulate", "2", "--train.checkpoint-blocks")
    whole = process(manifest, tmp_path / "whole", *more)
    whole.communicate()
    assert whole.returncode == 0
    for n_logged in (9, 20, 41):
        running = process(manifest, tmp_path / "killed", *more)
        wait_for_steps(tmp_path / "killed" / "metrics.jsonl", n_logged, running)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) < 60
    last = process(manifest, tmp_path / "killed", *more)
    output, _ = last.communicate()
    assert last.returncode == 0, output
    expected = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    found = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    assert len(expected) == 60
    assert losses(found) == losses(expected)


def test_two_processes_give_the_losses_of_one(manifest, tmp_path):
    more = ("--train.steps", "12", "--train.log-every", "1", "--train.checkpoint-every", "6")
    one = process(manifest, tmp_path / "one", *more)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = process(manifest, tmp_path / "two", *more, launcher=launcher)
    for running in (one, two):
        output, _ = running.communicate()
        assert running.returncode == 0, output
    assert_close(
        read_metrics(tmp_path / "one" / "metrics.jsonl"),
        read_metrics(tmp_path / "two" / "metrics.jsonl"),
        relative=2e-4,
    )


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHORT = ("--train.steps", "6", "--train.log-every", "1", "--train.keep-checkpoints", "1")


@pytest.fixture(scope="module")
def one_process(manifest, tmp_path_factory) -> list[dict]:
    return train(manifest, tmp_path_factory.mktemp("one") / "run", *SHORT)


@pytest.mark.parametrize(
    ("options", "relative"),
    [
        (("--train.accumulate", "2"), 2e-4),
        (("--train.checkpoint-blocks", "--train.accumulate", "2"), 2e-4),
        (("--train.reduce-precision", "bf16"), 1e-2),
    ],
)
def test_two_processes_give_the_losses_of_one_with(
    options, relative, one_process, manifest, tmp_path
):
    running = process(manifest, tmp_path / "two", *SHORT, *options, launcher=TWO)
    output, _ = running.communicate()
    assert running.returncode == 0, output
    assert_close(one_process, read_metrics(tmp_path / "two" / "metrics.jsonl"), relative)


@pytest.mark.slow
def test_two_nodes_give_the_losses_of_one_process(one_process, manifest, tmp_path):
    """Two agents of one process each, as in docs/multi-node.md."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    launcher += ("--rdzv-backend", "c10d", "--rdzv-id", "x")
    launcher += ("--rdzv-endpoint", f"localhost:{port}")
    nodes = [process(manifest, tmp_path / "two", *SHORT, launcher=launcher) for _ in range(2)]
    for node in nodes:
        output, _ = node.communicate()
        assert node.returncode == 0, output
    assert_close(one_process, read_metrics(tmp_path / "two" / "metrics.jsonl"), 2e-4)


def test_a_whole_run_under_torchrun_resumes_exactly(manifest, tmp_path):
    """Mixture, training and report by three processes, whose sums depend on their order.

    Lines and weights after a resume are the same.
    """
    more = ("--train.steps", "12", "--train.log-every", "5", "--train.checkpoint-every", "4")
    more += ("--train.keep-checkpoints", "3")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    whole = process(manifest, tmp_path / "whole", *more, launcher=launcher, command="run")
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    assert (tmp_path / "whole" / "report.html").exists()
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for last in ("step_00000008", "step_00000012"):
        shutil.rmtree(cut / "checkpoints" / last)
    again = process(manifest, cut, *more, launcher=launcher, command="run")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    lines = [losses(read_metrics(out / "metrics.jsonl")) for out in (tmp_path / "whole", cut)]
    assert [line[0] for line in lines[0]] == [5, 10, 12]
    assert lines[0] == lines[1]
    weights = [
        (out / "checkpoints" / "step_00000012" / "model.safetensors").read_bytes()
        for out in (tmp_path / "whole", cut)
    ]
    assert weights[0] == weights[1]


def test_ctrl_c_saves_like_sigterm(manifest, tmp_path):
    more = ("--train.steps", "100000", "--train.checkpoint-every", "100000")
    running = process(manifest, tmp_path / "run", *more)
    wait_for_steps(tmp_path / "run" / "metrics.jsonl", 1, running)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED, output
    assert "stopped at step" in output
    assert newest(tmp_path / "run" / "checkpoints") is not None


def test_micro_batches_change_nothing_but_rounding(manifest, tmp_path):
    more = ("--train.steps", "8", "--train.log-every", "1")
    whole = train(manifest, tmp_path / "whole", *more)
    parts = train(manifest, tmp_path / "parts", *more, "--train.accumulate", "3")
    assert_close(whole, parts, relative=2e-4)


def test_bf16_follows_fp32(manifest, tmp_path):
    wide = train(manifest, tmp_path / "wide", "--train.steps", "20")
    narrow = train(
        manifest, tmp_path / "narrow", "--train.steps", "20", "--train.precision", "bf16"
    )
    assert losses(narrow) != losses(wide)
    for a, b in zip(narrow, wide):
        assert a["kl"] == pytest.approx(b["kl"], rel=0.02)
        assert a["target_entropy"] == pytest.approx(b["target_entropy"], rel=1e-5)


def test_sigterm_saves_and_ends_cleanly(manifest, tmp_path):
    more = ("--train.steps", "100000", "--train.checkpoint-every", "100000")
    running = process(manifest, tmp_path / "run", *more)
    wait_for_steps(tmp_path / "run" / "metrics.jsonl", 2, running)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED, output
    assert "stopped at step" in output
    assert newest(tmp_path / "run" / "checkpoints") is not None


def test_a_stop_in_the_last_step_is_obeyed(manifest, tmp_path, monkeypatch, capsys):
    step = trainer.training_step

    def stopped_in_the_last(state, *others):
        schedule = step(state, *others)
        if state.step == 10:
            signal.raise_signal(signal.SIGTERM)
        return schedule

    monkeypatch.setattr(trainer, "training_step", stopped_in_the_last)
    words = ["run", *arguments(manifest, tmp_path / "run", "--train.steps", "10")[1:]]
    assert main(words) == EXIT_STOPPED
    assert "stopped at step 10" in capsys.readouterr().out
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert main(words) == 0
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_stop_while_the_last_checkpoint_is_written_is_obeyed(
    manifest, tmp_path, monkeypatch, capsys
):
    save_state = trainer.TrainState.save

    def stopped(state, *where, **options):
        save_state(state, *where, **options)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer.TrainState, "save", stopped)
    more = ("--train.steps", "10", "--train.checkpoint-every", "100")
    assert main(["run", *arguments(manifest, tmp_path / "run", *more)[1:]]) == EXIT_STOPPED
    assert "stopped at step 10" in capsys.readouterr().out


def test_what_went_bad_before_a_stop_is_written_down(manifest, tmp_path, monkeypatch):
    """Also between two lines of metrics: who goes on does not meet it again."""
    shutil.copytree(manifest.parent, tmp_path / "audio")
    step = trainer.training_step

    def stopped(state, *others):
        schedule = step(state, *others)
        if state.step == 1:
            for path in (tmp_path / "audio").glob("*.flac"):
                path.write_bytes(b"not audio any more")
        if state.step == 7:
            signal.raise_signal(signal.SIGTERM)
        return schedule

    monkeypatch.setattr(trainer, "training_step", stopped)
    more = ("--train.log-every", "20", "--data.workers", "0", "--data.max-bad-fraction", "1")
    words = arguments(tmp_path / "audio" / manifest.name, tmp_path / "run", *more)
    assert main(words) == EXIT_STOPPED
    assert len((tmp_path / "run" / "rejects.jsonl").read_text().splitlines()) > 3


def test_only_what_goes_bad_in_the_training_counts_there(manifest, tmp_path):
    """What was bad before was judged before, as a share of all audio."""
    folder = tmp_path / "audio"
    shutil.copytree(manifest.parent, folder)
    (folder / "broken.wav").write_bytes(b"RIFF")
    share = f"{1 / len(list(folder.glob('*.[fw]*'))) + 1e-6:.8f}"
    more = ("--data.max-bad-fraction", share, "--data.heldout-fraction", "0.3")
    assert main(arguments(folder, tmp_path / "run", *more, "--train.steps", "10")) == 0


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    left = tmp_path / "step_00000003.gmm-jepa-part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 5, {"w": torch.zeros(2)}, {"step": 5}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_a_mixture_is_refused_where_none_is_learnt(manifest, tmp_path, capsys):
    for system in ("pure-jepa", "wavlm-style"):
        more = ("--system", system, "--gmm", str(tmp_path / "gmm.safetensors"))
        assert main(arguments(manifest, tmp_path / system, *more)) == 2
        assert "gmm: this system learns no mixture" in capsys.readouterr().err


def test_a_fit_that_was_killed_in_a_run_goes_on(manifest, tmp_path, monkeypatch):
    done: list[int] = []
    save_state = PartialFit.save

    def killed_in_the_third(self, result, averages=None):
        save_state(self, result, averages)
        done.append(len(result.lower_bounds))
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialFit, "save", killed_in_the_third)
    more = ("--mixture.tol", "0", "--mixture.max-iter", "6", "--train.steps", "2")
    assert main(arguments(manifest, tmp_path / "run", *more)) == EXIT_INTERRUPTED
    assert main(arguments(manifest, tmp_path / "run", *more)) == 0
    assert done == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_non_finite_step_is_skipped_and_ten_in_a_row_stop_the_run(
    manifest, tmp_path, monkeypatch, capsys
):
    from gmm_jepa.models.jepa import JepaModel

    encode = JepaModel.encode
    poisoned = {2, 3, *range(15, 40)}
    calls = iter(range(1000))

    def sometimes_nan(self, waveform, lengths=None, **masks):
        waveform = waveform * (float("nan") if next(calls) in poisoned else 1.0)
        return encode(self, waveform, lengths, **masks)

    monkeypatch.setattr(JepaModel, "encode", sometimes_nan)
    out = tmp_path / "run"
    assert main(arguments(manifest, out, "--train.steps", "40")) == 2
    assert "not finite in 10 steps in a row" in capsys.readouterr().err
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[0]["skipped_steps"] == 2
    assert lines[0]["loss"] is None
    assert lines[1]["loss"] is not None
    weights = list((out / "checkpoints").rglob("model.safetensors"))
    assert weights


def test_values_are_read_back_only_when_a_line_is_due(manifest, tmp_path, monkeypatch):
    """On CUDA a read waits for the device; here every way to read a value is counted."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *, _original=original):
            frame = sys._getframe(1)
            if "gmm_jepa" in frame.f_code.co_filename:
                reads.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            return _original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    train(manifest, tmp_path / "a", "--train.steps", "10", "--train.log-every", "10")
    once = len(reads)
    train(manifest, tmp_path / "b", "--train.steps", "20", "--train.log-every", "10")
    assert 0 < len(reads) - once <= 2 * once


def test_other_settings_in_the_same_folder_are_refused(manifest, tmp_path, capsys):
    train(manifest, tmp_path / "run", "--train.steps", "2")
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert main(arguments(manifest, tmp_path / "run", "--train.steps", "3")) == 2
    assert "recipe.train.steps: there 2, here 3" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_a_damaged_checkpoint_is_one_clear_error(manifest, tmp_path, capsys):
    train(manifest, tmp_path / "run", "--train.steps", "12")
    checkpoint = newest(tmp_path / "run" / "checkpoints")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.safetensors: damaged" in error


def test_checkpoints_hold_no_pickled_code(manifest, tmp_path):
    train(manifest, tmp_path / "run", "--train.steps", "2")
    state = torch.load(newest(tmp_path / "run" / "checkpoints") / "state.pt", weights_only=True)
    assert state["step"] == 2


def test_metrics_lines_are_strict_json(manifest, tmp_path):
    train(manifest, tmp_path / "run", "--train.steps", "5")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
