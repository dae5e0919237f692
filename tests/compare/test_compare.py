"""Two systems and two seeds on a toy corpus, from the command line to the page."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.study import override
from gmm_jepa import locks
from gmm_jepa.cli import EXIT_STOPPED, main
from gmm_jepa.compare import job, jobs, page, plan, results
from gmm_jepa.config import Sources
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.probe import LinearProbe
from gmm_jepa.presets import preset
from gmm_jepa.report import theme
from gmm_jepa.train.folder import RunFolder
from tests.audio import write_corpus

SYSTEMS = ["gmm-anchored", "pure-jepa"]
SMALL = [
    "--preset", "smoke", "--mixture.n-components", "8", "--train.steps", "4", "--train.log-every",
    "1", "--train.checkpoint-every", "2", "--train.no-tensorboard",
]  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"), 16, seconds=(0.6, 1.2))


def words(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["compare", "--audio", str(manifest), "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory) -> Path:
    """A comparison whose runs were made in this process, without the pictures of their reports."""
    out = tmp_path_factory.mktemp("comparison") / "a & b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theme, "DPI", 40)
        patch.setattr("gmm_jepa.cli.compare.run_all", run_here)
        make_cheap(patch)
        assert main(words(manifest, out, "--systems", *SYSTEMS, "--seeds", "0", "1")) == 0
    return out


def make_cheap(patch: pytest.MonkeyPatch) -> None:
    """Evaluate with short probes, and leave out the pictures of the runs' own reports."""
    patch.setattr("gmm_jepa.evaluate.evaluation.LinearProbe", partial(LinearProbe, steps=20))
    patch.setattr("gmm_jepa.pipeline.write_report", write_numbers)


def write_numbers(root, evaluation, _metrics) -> None:
    evaluation.save(root)
    (root / "report.html").write_text("a report")


def run_here(planned, *, jobs, on_done) -> None:
    for p in planned:
        if not p.is_done:
            assert job.finish(p.folder)
            on_done(p)


def test_every_run_is_an_ordinary_one(finished):
    for system in SYSTEMS:
        for seed in (0, 1):
            root = finished / system / f"seed{seed}"
            _, recipe = RunFolder(root).read()
            assert (recipe.system, recipe.seed) == (system, seed)
            assert (root / "report.html").exists()
            assert (root / "checkpoints" / "step_00000004").is_dir()


def test_the_numbers_hold_every_system_with_mean_and_spread(finished):
    numbers = json.loads((finished / "compare.json").read_text())
    assert numbers["seeds"] == [0, 1]
    assert list(numbers["systems"]) == SYSTEMS
    for system in numbers["systems"].values():
        runs, summary = system["runs"], system["summary"]
        values = [run["embedding"]["effective_rank"] for run in runs]
        found = summary["embedding/effective_rank"]
        assert found["mean"] == pytest.approx(sum(values) / 2)
        assert found["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert {"probe/text/trained, all layers", "probe/text/log-mel"} <= set(summary)
        assert summary["last/front_end_mean_cosine"]["n"] == 2
        assert system["parameters"]["trained"] >= system["parameters"]["encoder"] > 0
        assert summary["seconds/train"]["mean"] > 0
    anchored, pure = numbers["systems"].values()
    assert anchored["summary"]["seconds/labels"]["mean"] > 0
    assert "seconds/labels" not in pure["summary"]
    assert "head/entropy" in anchored["summary"]
    assert "head/entropy" not in pure["summary"]
    assert anchored["parameters"]["encoder"] == pure["parameters"]["encoder"]
    assert numbers["differences"]["objective.anchor_start"] == {"gmm-anchored": 1, "pure-jepa": 0}
    assert "seed" not in numbers["differences"]


def test_the_page_is_whole_and_needs_nothing_else(finished):
    text = (finished / "compare.html").read_text(encoding="utf-8")
    for head in ("Probes", "Clusters and embedding", "Training", "Cost", "Differences", "Runs"):
        assert f"<h2>{head}</h2>" in text
    assert "a &amp; b" in text
    assert "2 systems, 2 seeds, 4 steps of 4 s" in text
    assert "log-mel, 3 frames each side" in text
    assert "trained weights over the fewest, %" in text
    assert "making labels, s" in text
    assert "learning_rate" in text
    assert "<script" not in text
    assert "$" not in text
    sources = re.findall(r'(?:src|srcset)="([^"]{0,30})', text)
    assert len(sources) == 2 * 4
    assert all(source.startswith("data:image/png") for source in sources)
    links = re.findall(r'href="([^"#]+)"', text)
    assert len(links) == 4
    assert all((finished / link).exists() for link in links)
    assert {file.stem for file in (finished / "plots").glob("*.png")} == {
        "compare_losses", "compare_meters", "compare_held_out", "compare_probes"
    }  # fmt: skip


def test_a_second_start_goes_on_where_a_run_was_stopped(
    finished, manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(theme, "DPI", 40)
    monkeypatch.setattr("gmm_jepa.cli.compare.run_all", run_here)
    make_cheap(monkeypatch)
    out = tmp_path / "again"
    for system in SYSTEMS:
        shutil.copytree(finished / system / "seed0", out / system / "seed0")
    stopped, other = (out / system / "seed0" for system in SYSTEMS)
    shutil.rmtree(stopped / "checkpoints" / "step_00000004")
    before = (stopped / "metrics.jsonl").read_bytes()
    untouched = (other / "evaluation.json").stat().st_mtime_ns
    more = ["--systems", *SYSTEMS, "--jobs", "2"]
    assert main(words(manifest, out, *more)) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 1 to train, 2 at a time" in printed
    assert f"done: {stopped}" in printed
    assert "usage entropy" in printed
    assert without_rates(stopped / "metrics.jsonl") == without_rates_of(before)
    assert (other / "evaluation.json").stat().st_mtime_ns == untouched
    assert "2 runs at a time" in (out / "compare.html").read_text(encoding="utf-8")


def without_rates(path: Path) -> list[dict]:
    return without_rates_of(path.read_bytes())


def without_rates_of(content: bytes) -> list[dict]:
    rates = ("audio_s_per_s", "wait_share")
    lines = [json.loads(line) for line in content.splitlines()]
    return [{k: v for k, v in line.items() if k not in rates} for line in lines]


def test_labels_are_made_once_for_equal_settings(manifest, tmp_path):
    recipe = preset("smoke")
    small = plan.dataclasses.replace(
        recipe, mixture=plan.dataclasses.replace(recipe.mixture, n_components=8)
    )
    recipes = {"first": small, "second": small, "other": recipe, "pure": preset(
        "smoke", system="pure-jepa")}  # fmt: skip
    planned = plan.plan(tmp_path, recipes, [0])
    with processes() as peers:
        plan.prepare(planned, Sources(audio=(str(manifest),)), peers)
    first, second, other, pure = (p.folder for p in planned)
    assert second.mixture.read_bytes() == first.mixture.read_bytes()
    assert plan.read_seconds(second)["labels"] == plan.read_seconds(first)["labels"] > 0
    assert other.mixture.read_bytes() != first.mixture.read_bytes()
    assert not pure.mixture.exists()
    assert plan.read_seconds(pure) == {}
    assert len({(p.folder.root / "audio.json").read_bytes() for p in planned}) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--systems", "gmm-anchored", "gmm-anchored"], "systems: expected different ones"),
        (["--seeds", "0", "0"], "seeds: expected different ones"),
        (["--system", "pure-jepa"], "--system: a comparison takes --systems"),
        (["--seed", "3"], "--seed: a comparison takes --seeds"),
        (["--jobs", "0"], "jobs: expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(more, said, manifest, tmp_path, capsys):
    assert main(words(manifest, tmp_path / "out", *more)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]
    assert "Traceback" not in "\n".join(errors)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_where_runs_have_begun(finished, manifest, capsys):
    more = ["--systems", *SYSTEMS, "--seeds", "0", "1", "--data.batch-s", "8"]
    assert main(words(manifest, finished, *more)) == 2
    assert "batch_s" in capsys.readouterr().err


def test_a_run_folder_is_no_comparison(finished, manifest, capsys):
    assert main(words(manifest, finished / "pure-jepa" / "seed0")) == 2
    assert "holds a run, not a comparison" in capsys.readouterr().err


def test_a_job_says_a_mistake_in_a_line_of_its_own(tmp_path, capsys):
    assert job.main([str(tmp_path)]) == job.BAD_INPUT
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"gmm-jepa: {tmp_path}: no run here")


def test_what_a_job_said_is_passed_on(finished, manifest, tmp_path, capsys):
    out = tmp_path / "broken"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "pure-jepa" / "seed0" / "checkpoints" / "step_00000004")
    (out / "pure-jepa" / "seed0" / "checkpoints" / "step_00000002" / "state.pt").write_text("x")
    more = ["--systems", *SYSTEMS, "--seeds", "0", "1"]
    assert main(words(manifest, out, *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "state.pt" in said
    assert "damaged" in said


BAR = "training:   0%|          | 5/3000 [00:00<09:16,  5.38step/s, loss=0.114]"


@pytest.fixture
def run_programs(tmp_path, monkeypatch):
    """`run_all` of one run whose process is a small program instead of a job."""
    (planned,) = plan.plan(tmp_path, {"pure": preset("smoke", system="pure-jepa")}, [0])
    planned.folder.root.mkdir(parents=True)
    monkeypatch.setattr(jobs, "_LOOK_EVERY_S", 0.01)

    def run(program: str) -> None:
        def start(planned, **_share):
            with (planned.folder.root / jobs.LOG).open("ab") as log:
                words = [sys.executable, "-c", program]
                return subprocess.Popen(words, stdout=log, stderr=log)

        monkeypatch.setattr(jobs, "_start", start)
        jobs.run_all([planned], jobs=1)

    return run


@pytest.mark.parametrize(
    ("program", "error", "said"),
    [
        (f"print({BAR!r}); raise SystemExit({job.STOPPED})", jobs.StoppedError, "was stopped"),
        ("import os; os.kill(os.getpid(), 15)", jobs.StoppedError, "was stopped"),
        (f"print({BAR!r}); import os; os.kill(os.getpid(), 9)", ChildProcessError, "by SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", ChildProcessError, "by signal 40"),
        (f"import sys; sys.exit('boom\\r{BAR}')", ChildProcessError, "see log.txt there: boom"),
        ("raise SystemExit(1)", ChildProcessError, "see log.txt there: nothing was said"),
        (
            f"print('gmm-jepa: bad.wav: bad'); print({BAR!r}); print('later'); raise SystemExit(2)",
            InputError,
            "wav: bad",
        ),
    ],
)
def test_how_a_job_ended_is_one_line(program, error, said, run_programs):
    with pytest.raises(error, match=f"{said}$") as raised:
        run_programs(program)
    assert "pure/seed0" in str(raised.value)


def test_a_stopped_comparison_says_how_to_go_on(finished, manifest, capsys, monkeypatch):
    def stop(*_planned, **_options):
        raise jobs.StoppedError("pure-jepa/seed0 was stopped")

    monkeypatch.setattr("gmm_jepa.cli.compare.run_all", stop)
    more = ["--systems", *SYSTEMS, "--seeds", "0", "1"]
    assert main(words(manifest, finished, *more)) == 75
    assert "pure-jepa/seed0 was stopped; start again to go on" in capsys.readouterr().out


def test_fewer_runs_than_jobs_share_all_cores(tmp_path, monkeypatch):
    planned = plan.plan(tmp_path, {"pure": preset("smoke", system="pure-jepa")}, [0, 1])
    given = []

    def start(planned, *, slot, threads):
        given.append((slot, threads))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(jobs, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(jobs, "_start", start)
    monkeypatch.setattr(jobs, "usable_cores", lambda: 8)
    jobs.run_all(planned, jobs=4)
    assert given == [(0, 4), (1, 4)]


def test_jobs_at_a_time_are_on_different_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [jobs._share(slot, 1)["LOCAL_RANK"] for slot in range(3)] == ["0", "1", "0"]


def test_a_folder_where_a_comparison_works_is_refused(manifest, tmp_path, capsys):
    with locks.held(tmp_path / "out"):
        assert main(words(manifest, tmp_path / "out")) == 2
    assert "another process works here" in capsys.readouterr().err


def test_help_lists_what_a_comparison_takes(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    listed = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert {"--systems", "--seeds", "--jobs", "--train.steps"} <= listed
    assert not {"--system", "--seed", "--profile"} & listed


@pytest.mark.slow
def test_jobs_train_and_evaluate_in_processes_of_their_own(manifest, tmp_path):
    unlabelled = manifest.with_name("unlabelled.jsonl")
    paths = [json.loads(line)["audio_filepath"] for line in manifest.read_text().splitlines()]
    unlabelled.write_text("".join(json.dumps({"audio_filepath": p}) + "\n" for p in paths))
    small = override(
        preset("smoke", system="pure-jepa"),
        {"train.steps": 2, "train.tensorboard": False, "evaluate.max_test_s": 2.0},
    )
    planned = plan.plan(tmp_path, {"pure": small}, [0, 1])
    with processes() as peers:
        plan.prepare(planned, Sources(audio=(str(unlabelled),)), peers)
    ended: list[int] = []
    jobs.run_all(planned, jobs=2, on_done=lambda p: ended.append(p.seed))
    assert sorted(ended) == [0, 1]
    assert all(p.is_done for p in planned)
    numbers = results.run_numbers(planned[0])
    assert numbers["steps"] == 2
    assert numbers["probes"] == []
    page_of = page.write(tmp_path, planned, jobs=2).read_text(encoding="utf-8")
    assert "no labels that a probe could learn" in page_of


@pytest.mark.slow
def test_sigterm_stops_the_jobs_at_a_checkpoint(manifest, tmp_path):
    out = tmp_path / "out"
    command = words(manifest, out, "--systems", "pure-jepa", "--train.steps", "100000")
    process = subprocess.Popen([sys.executable, "-m", "gmm_jepa", *command])
    root = out / "pure-jepa" / "seed0"
    try:
        until = time.monotonic() + 120
        while not (root / "metrics.jsonl").exists() or not (root / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_STOPPED
    size = (root / "metrics.jsonl").stat().st_size
    assert list((root / "checkpoints").iterdir())
    time.sleep(0.5)
    assert (root / "metrics.jsonl").stat().st_size == size  # nobody trains on


def test_spread_and_summary():
    runs = [{"a": 1.0, "b": 2.0}, {"a": 3.0}]
    summary = results.summarise(runs)
    assert summary["a"] == {"mean": 2.0, "spread": pytest.approx(2**0.5), "n": 2}
    assert summary["b"] == {"mean": 2.0, "spread": None, "n": 1}
    assert page.with_spread(summary["a"], ".1f") == "2.0 ± 1.4"
    assert page.with_spread(summary["b"], ".0f") == "2"
    assert page.with_spread(None, ".0f") == "–"


def test_nothing_to_compare():
    with pytest.raises(InputError, match="systems: expected at least one"):
        plan.plan(Path("nowhere"), {}, [0])
