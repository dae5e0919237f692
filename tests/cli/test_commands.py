"""The commands as a user types them, on small audio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from gmm_jepa.cli import COMMANDS, SPINS, main
from gmm_jepa.evaluate.embed import Utterance
from gmm_jepa.evaluate.labels import find_tasks
from gmm_jepa.gmm import GaussianMixture
from tests.audio import babble, write_corpus

SMALL = ["--preset", "smoke", "--mixture.n-components", "8", "--train.steps", "6"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["run", "--audio", str(manifest), "--out", str(out), *SMALL]) == 0
    return out


def one_line_error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines, "no error was printed"
    assert "Traceback" not in "\n".join(lines)
    assert lines[-1].startswith("gmm-jepa: ")
    return lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"gmm-jepa {command}" in capsys.readouterr().out


def test_the_overview_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert main([]) == 2


def test_help_shows_presets_and_nested_settings_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--preset", "paper", "--help"])
    printed = capsys.readouterr().out
    assert "--encoder.code-dim" in printed
    assert "50000" in printed.replace(",", "").replace("_", "")
    assert "nats" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ruin"], "unknown command 'ruin'"),
        (["run", "--audio", "x", "--out", "y", "--preset", "huge"], "--preset"),
        (["run", "--audio", "nowhere.jsonl", "--out", "{out}"], "nowhere.jsonl"),
        (["run", "--audio", "", "--out", "{out}"], "audio: an empty path"),
        (["evaluate", "--run", "nowhere"], "no such folder"),
        (
            ["extract", "--run", "nowhere", "--audio", "x", "--out", "{out}"],
            "no such file or folder",
        ),
        (["validate", "--audio", "nowhere"], "nowhere"),
        (["pack", "--audio", "nowhere", "--out", "{out}"], "nowhere"),
        (["fit-gmm", "--audio", "nowhere", "--out", "{out}"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, capsys):
    words = [word.replace("{out}", str(tmp_path / "out")) for word in arguments]
    assert main(words) == 2
    assert said in one_line_error(capsys)


def test_nonsense_settings_name_the_setting(manifest, tmp_path, capsys):
    words = ["run", "--audio", str(manifest), "--out", str(tmp_path / "out"), "--train.steps", "0"]
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert "steps: expected 1 or more, got 0" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_run_leaves_everything_a_run_folder_holds(run):
    for name in (
        "config.json",
        "gmm.safetensors",
        "metrics.jsonl",
        "evaluation.json",
        "report.html",
        "checkpoints/step_00000006/model.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "plots").glob("*.png"))
    assert list((run / "tensorboard").glob("events*"))
    assert not list(run.rglob("*.gmm-jepa-part"))
    numbers = json.loads((run / "evaluation.json").read_text())
    assert numbers["clusters"]["n_clusters"] == 8


def test_run_again_goes_on_to_the_same_end(run, manifest, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["run", "--audio", str(manifest), "--out", str(run), *SMALL]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "report:" in capsys.readouterr().out


def test_evaluate_alone_gives_the_same_numbers(run):
    before = json.loads((run / "evaluation.json").read_text())
    assert main(["evaluate", "--run", str(run)]) == 0
    after = json.loads((run / "evaluation.json").read_text())
    before.pop("seconds"), after.pop("seconds")
    assert before == after


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_extract_writes_frames_layers_and_clusters(run, tmp_path, form):
    folder = tmp_path / "new"
    folder.mkdir()
    soundfile.write(folder / "a.wav", babble(44_100, 99), 22_050)
    soundfile.write(folder / "b.wav", np.stack([babble(16_000, 98)] * 2, 1), 16_000)
    out = tmp_path / "features"
    words = ["extract", "--run", str(run), "--audio", str(folder), "--out", str(out)]
    words += ["--layers", "0", "1", "--clusters", "--format", form]
    assert main(words) == 0
    index = json.loads((out / "index.json").read_text())
    assert [entry["frames"] for entry in index["utterances"]] == [99, 49]
    assert index["frames_per_s"] == 50
    for entry in index["utterances"]:
        path = out / entry["features"]
        if form == "npz":
            arrays = dict(np.load(path))
        else:
            from safetensors.numpy import load_file

            arrays = load_file(path)
        assert set(arrays) == {"output", "layer_0", "layer_1", "clusters"}
        assert arrays["output"].shape == (entry["frames"], 32)
        np.testing.assert_allclose(arrays["clusters"].sum(1), 1, atol=1e-5)
        assert np.isfinite(arrays["output"]).all()


def test_extract_refuses_a_layer_that_is_not_there(run, manifest, tmp_path, capsys):
    words = ["extract", "--run", str(run), "--audio", str(manifest), "--out", str(tmp_path / "f")]
    assert main([*words, "--layers", "7"]) == 2
    assert "layers: expected 0 to 1, got 7" in one_line_error(capsys)


def test_a_packed_corpus_trains_like_its_source(manifest, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert main(["pack", "--audio", str(manifest), "--out", str(packed), "--workers", "0"]) == 0
    out = tmp_path / "run"
    words = ["train", "--audio", str(packed), "--out", str(out), *SMALL, "--data.workers", "0"]
    assert main(words) == 0
    assert "none rejected" in capsys.readouterr().out


def test_a_fitted_mixture_can_be_given_to_train(manifest, tmp_path, capsys):
    gmm = tmp_path / "gmm.safetensors"
    words = ["fit-gmm", "--audio", str(manifest), "--out", str(gmm), *SMALL[:4]]
    assert main(words) == 0
    assert "K = 8, D = 80" in capsys.readouterr().out
    out = tmp_path / "run"
    words = ["train", "--audio", str(manifest), "--out", str(out), "--gmm", str(gmm), *SMALL]
    assert main(words) == 0
    ours, theirs = GaussianMixture.load(gmm), GaussianMixture.load(out / "gmm.safetensors")
    np.testing.assert_array_equal(ours.means_, theirs.means_)
    assert main([*words[:3], "--out", str(tmp_path / "b"), "--gmm", str(gmm), *SMALL[:2]]) == 2
    assert "a mixture of 8 components, but the recipe says 16" in one_line_error(capsys)


def test_fit_gmm_never_overwrites(manifest, tmp_path, capsys):
    gmm = tmp_path / "gmm.safetensors"
    gmm.write_text("precious")
    assert main(["fit-gmm", "--audio", str(manifest), "--out", str(gmm)]) == 2
    assert "exists already" in one_line_error(capsys)
    assert gmm.read_text() == "precious"


def write_bad_inputs(folder: Path) -> Path:
    """Six inputs that cannot be used among twenty that can; returns the manifest."""
    manifest = write_corpus(folder, 20)
    whole = folder / "whole.wav"
    soundfile.write(whole, babble(16_000, 1), 16_000)
    (folder / "cut.wav").write_bytes(whole.read_bytes()[:20_000])
    nan = babble(16_000, 2)
    nan[5000] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16_000, subtype="FLOAT")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    lines = manifest.read_text()
    for name in ("cut.wav", "nan.wav", "empty.flac", "text.wav", "missing.wav"):
        lines += json.dumps({"audio_filepath": name}) + "\n"
    lines += '{"audio_filepath": "u001.fl'
    manifest.write_text(lines)
    return manifest


def test_bad_inputs_are_listed_with_reasons_and_the_rest_trains(tmp_path, capsys):
    manifest = write_bad_inputs(tmp_path / "audio")
    out = tmp_path / "run"
    words = ["run", "--audio", str(manifest), "--out", str(out), *SMALL]
    assert main([*words, "--data.max-bad-fraction", "0.5"]) == 0
    assert "6 rejected" in capsys.readouterr().out
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    reasons = {Path(reject["file"]).name: reject["reason"] for reject in rejects}
    assert set(reasons) == {
        "cut.wav",
        "nan.wav",
        "empty.flac",
        "text.wav",
        "missing.wav",
        "manifest.jsonl",
    }
    assert all(reasons.values())
    by_line = {reject["line"] for reject in rejects}
    assert by_line == set(range(21, 27))
    assert (out / "report.html").exists()


def test_too_many_bad_inputs_stop_the_run(tmp_path, capsys):
    manifest = write_bad_inputs(tmp_path / "audio")
    words = ["run", "--audio", str(manifest), "--out", str(tmp_path / "run"), *SMALL]
    assert main(words) == 2
    error = one_line_error(capsys)
    assert "6 of 26" in error
    assert "rejects.jsonl" in error


def test_validate_lists_rejects_and_its_exit_code_tells(tmp_path, capsys):
    manifest = write_bad_inputs(tmp_path / "audio")
    rejects = tmp_path / "rejects.jsonl"
    words = ["validate", "--audio", str(manifest), "--rejects", str(rejects), "--workers", "0"]
    assert main(words) == 2
    assert "20 of 26 usable" in capsys.readouterr().out
    assert len(rejects.read_text().splitlines()) == 6
    assert main([*words, "--max-bad-fraction", "0.3"]) == 0
    assert len(rejects.read_text().splitlines()) == 6
    capsys.readouterr()
    assert main([*words, "--audio", str(manifest), str(manifest)]) == 2
    captured = capsys.readouterr()
    assert "40 of 52 usable" in captured.out
    assert "counted 12 times, as often as listed" in captured.out
    assert "12 of 52 inputs are bad, more than --max-bad-fraction 0.01 allows" in captured.err
    good = write_corpus(tmp_path / "good", 2)
    assert main([*words[:2], str(good), *words[3:]]) == 0
    assert not rejects.exists()


def test_lists_of_rejects_begin_anew(tmp_path, capsys):
    """But for a list of another pack, and one of a fit that goes on."""
    bad, good = write_bad_inputs(tmp_path / "bad"), write_corpus(tmp_path / "good", 3)
    pack = ["pack", "--out", str(tmp_path / "pack"), "--max-bad-fraction", "1", "--workers", "0"]
    assert main([*pack, "--audio", str(bad)]) == 0
    listed = tmp_path / "pack.rejects.jsonl"
    before = listed.read_bytes()
    assert len(before.splitlines()) == 6
    assert main([*pack, "--audio", str(good)]) == 2
    assert "made of other audio or settings (the audio differs)" in one_line_error(capsys)
    assert listed.read_bytes() == before
    shutil.rmtree(tmp_path / "pack")
    assert main([*pack, "--audio", str(good)]) == 0
    assert not listed.exists()

    fit = ["fit-gmm", "--out", str(tmp_path / "gmm.safetensors"), *SMALL[:4]]
    listed = tmp_path / "gmm.safetensors.rejects.jsonl"
    listed.write_bytes(before)
    assert main([*fit, "--audio", str(good), "--mixture.max-iter", "2"]) == 0
    assert not listed.exists()
    listed.write_bytes(before)
    (tmp_path / "gmm.safetensors").unlink()
    (tmp_path / "gmm.safetensors.partial").write_text("of a fit")
    main([*fit, "--audio", str(good)])
    assert listed.read_bytes() == before


@pytest.mark.parametrize(
    "words", [["validate"], ["pack", "--out", "{out}"], ["extract", "--run", "x", "--out", "{out}"]]
)
def test_a_share_that_is_none_is_refused_before_audio_is_read(words, tmp_path, capsys):
    words = [word.replace("{out}", str(tmp_path / "out")) for word in words]
    assert main([*words, "--audio", "nowhere", "--max-bad-fraction", "2"]) == 2
    assert "--max-bad-fraction: expected between 0 and 1, got 2.0" in one_line_error(capsys)


def test_malformed_phones_are_told_of(tmp_path, capsys):
    manifest = write_corpus(tmp_path / "audio", 6)
    phones = [[[0, 1]], [[1, 0, "a"]], "abc"]
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["phones"] = phones[i] if i < 3 else [[0, 0.3, "a"], [0.3, 0.6, "b"]]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "warning: phones of 3 utterances are not [start_s, end_s, symbol]: left out"
    rejects = str(tmp_path / "rejects.jsonl")
    assert main(["validate", "--audio", str(manifest), "--rejects", rejects, "--workers", "0"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == said
    sample = [Utterance(np.zeros(9, np.float32), line, False) for line in lines]
    find_tasks(sample, seed=0)
    assert capsys.readouterr().err == said + "\n"


def test_doctor_tells_versions_devices_and_backends(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("torch", "cpu", "triton", "native module"))


@pytest.mark.parametrize(("given", "expected"), [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_idle_threads_leave_the_core_to_others(given, expected):
    """What libgomp reads at its start is there before torch is."""
    program = (
        "import os, sys; from gmm_jepa.cli import main; assert 'torch' not in sys.modules; "
        f"main(['doctor']); assert os.environ['GOMP_SPINCOUNT'] == {expected!r}"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    subprocess.run([sys.executable, "-c", program], env=bare | given, check=True)


def test_output_that_nobody_reads_ends_in_silence():
    command = f"{sys.executable} -m gmm_jepa run --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""


def test_a_missing_package_is_one_line_that_says_what_to_install(manifest, tmp_path):
    code = (
        "import sys; sys.modules['tyro'] = None\n"
        "from gmm_jepa.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "gmm-jepa[train]"' in done.stderr
    assert "Traceback" not in done.stderr
