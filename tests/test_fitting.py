"""Fits of a corpus: resumed to the same bits, the same for any number of processes, reported on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gmm_jepa.cli import main
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.fitting import FitReport, FitSettings, fit_mixture
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.gmm.em import maximisation
from gmm_jepa.gmm.partial import seconds_in
from gmm_jepa.gmm.stepwise import statistics_of
from gmm_jepa.ops import EMStatistics
from gmm_jepa.presets import preset
from tests.audio import write_corpus

METHODS = {
    "em": FitSettings(heldout_fraction=0.2),
    "stepwise": FitSettings(method="stepwise", mini_batch_frames=100, heldout_fraction=0.2),
}
RECIPE = preset("smoke")
RECIPE = replace(RECIPE, mixture=replace(RECIPE.mixture, n_components=12, max_iter=6, tol=0.0))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"), 30)


class StoppedError(Exception):
    pass


def fit(manifest, settings, *, partial=None, stop_after=None, recipe=RECIPE):
    """The fit, and its reports; raises `StoppedError` after some of them."""
    reports: list[FitReport] = []

    def on_report(report: FitReport) -> None:
        reports.append(report)
        if stop_after is not None and len(reports) == stop_after:
            raise StoppedError

    rejects = RejectLog(None)
    with processes() as peers:
        corpus = open_corpus([manifest], rejects=rejects)
        mixture = fit_mixture(
            corpus, recipe, rejects, peers, settings, partial=partial, on_report=on_report
        )
    return mixture, reports


def assert_same(a: GaussianMixture, b: GaussianMixture) -> None:
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.lower_bounds_, a.converged_, a.n_reseeded_, a.n_frames_) == (
        b.lower_bounds_, b.converged_, b.n_reseeded_, b.n_frames_,
    )  # fmt: skip


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_fit_goes_on_to_the_same_bits(manifest, tmp_path, method, stop_after):
    partial = tmp_path / "gmm.partial"
    whole, reports = fit(manifest, METHODS[method])
    with pytest.raises(StoppedError):
        fit(manifest, METHODS[method], partial=partial, stop_after=stop_after)
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    before_s = seconds_in(partial)
    assert before_s > 0.0
    resumed, later = fit(manifest, METHODS[method], partial=partial)
    assert_same(whole, resumed)
    done = [report.iteration for report in reports]
    assert [report.iteration for report in later] == done[stop_after:]
    assert not later or seconds_in(partial) > before_s  # counted from the first process's beginning


def test_an_unfinished_fit_of_something_else_is_refused(manifest, tmp_path):
    partial = tmp_path / "gmm.partial"
    with pytest.raises(StoppedError):
        fit(manifest, METHODS["em"], partial=partial, stop_after=1)
    before = partial.read_bytes()
    with pytest.raises(InputError, match="an unfinished fit with other settings; give the same"):
        fit(manifest, METHODS["em"], partial=partial, recipe=replace(RECIPE, seed=5))
    with pytest.raises(InputError, match="with other settings"):
        fit(manifest, METHODS["stepwise"], partial=partial)
    assert partial.read_bytes() == before
    partial.write_bytes(before[:100])
    with pytest.raises(InputError, match="damaged"):
        fit(manifest, METHODS["em"], partial=partial)


@pytest.mark.parametrize("method", METHODS)
def test_reports_say_how_the_fit_stands(manifest, method):
    mixture, reports = fit(manifest, METHODS[method])
    last = reports[-1]
    assert last.log_likelihood == mixture.lower_bound_
    assert last.heldout_log_likelihood < last.log_likelihood + 5
    assert last.frames_per_s > 0
    weights = np.array(mixture.weights_)
    assert last.n_live == (weights * mixture.n_frames_ * 1.2 >= 1).sum() == 12
    entropy = -(weights * np.log(weights)).sum() / np.log(12)
    assert last.weight_entropy == pytest.approx(entropy)
    assert f"held out {last.heldout_log_likelihood:.4f}" in str(last)


def test_audio_held_out_is_not_fitted_on(manifest):
    every, _ = fit(manifest, FitSettings(heldout_fraction=0.0))
    most, reports = fit(manifest, FitSettings(heldout_fraction=0.2))
    assert 0.5 * every.n_frames_ < most.n_frames_ < 0.9 * every.n_frames_
    none, no_reports = fit(manifest, FitSettings(heldout_fraction=0.0))
    assert no_reports[-1].heldout_log_likelihood is None
    assert reports[-1].heldout_log_likelihood is not None
    assert_same(every, none)


def test_one_stepwise_pass_gets_further_than_one_of_em(manifest):
    one_pass = replace(RECIPE, mixture=replace(RECIPE.mixture, max_iter=1))
    _, em = fit(manifest, METHODS["em"], recipe=one_pass)
    _, stepwise = fit(manifest, METHODS["stepwise"])
    assert stepwise[-1].heldout_log_likelihood > em[-1].heldout_log_likelihood


def test_the_statistics_of_a_mixture_give_it_back(manifest):
    mixture = fit(manifest, METHODS["em"])[0].mixture(dtype=torch.float64)
    scaled = EMStatistics(*(part * 1e6 for part in statistics_of(mixture)))
    again = maximisation(scaled, mixture, 1e-6)
    for ours, theirs in zip(again, mixture):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("step_exponent", 0.5), ("mini_batch_frames", 0), ("heldout_fraction", 1.0)],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(InputError, match=f"{setting}: expected"):
        FitSettings(**{setting: value})


SMALL = ("--preset", "smoke", "--mixture.n-components", "12", "--mixture.tol", "0")


def command(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["fit-gmm", "--audio", str(manifest), "--out", str(out), *SMALL, *more]


def in_two_processes(arguments: list[str]) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "gmm_jepa", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_fit_the_mixture_of_one(manifest, tmp_path, method):
    more = ("--method", method, "--mini-batch-frames", "200", "--mixture.max-iter", "4")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert main(command(manifest, one, *more)) == 0
    finished = in_two_processes(command(manifest, two, *more))
    assert finished.returncode == 0, finished.stderr
    ours, theirs = GaussianMixture.load(one), GaussianMixture.load(two)
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-6)
    assert not list(tmp_path.glob("*.partial"))


def test_a_process_without_audio_fits_with_the_others(tmp_path):
    """One short utterance for two processes: one of them has no frame, from seeding to the end."""
    manifest = write_corpus(tmp_path / "audio", 1)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = ("--mixture.max-iter", "3")
    assert main(command(manifest, one, *more)) == 0
    finished = in_two_processes(command(manifest, two, *more))
    assert finished.returncode == 0, finished.stderr
    ours, theirs = GaussianMixture.load(one), GaussianMixture.load(two)
    np.testing.assert_allclose(theirs.means_, ours.means_, rtol=1e-6)


def test_a_killed_fit_goes_on(manifest, tmp_path):
    """SIGKILL in the middle; started again, it ends as one that was left alone."""
    more = ("--mixture.max-iter", "400")
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    running = subprocess.Popen(
        [sys.executable, "-m", "gmm_jepa", *command(manifest, killed, *more)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = killed.with_name(killed.name + ".partial")
    end = time.monotonic() + 120
    while not partial.exists():
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not killed.exists()
    assert main(command(manifest, killed, *more)) == 0
    assert main(command(manifest, whole, *more)) == 0
    assert_same(GaussianMixture.load(killed), GaussianMixture.load(whole))
    assert not partial.exists()
