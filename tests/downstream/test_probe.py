"""`gmm-jepa probe` as a user types it, on a tiny corpus with a tiny encoder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel

from gmm_jepa.cli import main
from gmm_jepa.downstream.settings import TASKS
from tests.downstream.test_upstreams import TINY

SMALL = ["--steps", "4", "--evaluate-every", "2", "--batch", "4", "--projection", "8"]
RNN = ["--rnn-width", "8"]
PLAIN = ["--augment.time-masks", "0", "--augment.channel-masks", "0", "--dropout", "0"]


def words(task, out, *more):
    return [
        "probe",
        task,
        "--out",
        str(out),
        *map(str, more),
        *SMALL,
        *(RNN if task != "er" else []),
    ]


@pytest.fixture
def without_report(monkeypatch):
    """Pictures are the slowest part; one test looks at them."""
    monkeypatch.setattr("gmm_jepa.cli.probe.write_report", lambda out, numbers: out)


def error_of(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("gmm-jepa: ")
    return lines[-1]


@pytest.mark.parametrize("task", TASKS)
def test_one_command_prints_the_encoder_and_its_controls(
    task, manifest_of, encoder_file, tmp_path, capsys
):
    out = tmp_path / "out"
    given = ["--upstream", encoder_file, "--data", manifest_of(task), "--learning-rates", "0.01"]
    arguments = words(task, out, *given, "--split-by", "utterance")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((out / "probe.json").read_text())
    names = ["small.safetensors", "small.safetensors, untrained", "log-mel"]
    assert [row["features"] for row in numbers["rows"]] == names
    for row in numbers["rows"]:
        assert f"{row['features']} " in printed
        assert row["learning_rate"] == 0.01
        assert abs(sum(row["layer_weights"]) - 1) < 1e-5
        assert len(row["predictions"]) == 3
        assert set(row["test"]) == {"loss", *numbers["scores"]}
        (curve,) = row["curves"]["0.01"]
        assert [line["step"] for line in curve] == [2, 4]
        assert curve[-1]["train_loss"] < curve[0]["train_loss"] or task == "er"
    assert "<table" in (out / "report.html").read_text()
    assert (out / "plots" / "curves.png").stat().st_size > 0
    assert (out / "plots" / "confusion_0.png").exists() == (task == "er")
    assert (out / "plots" / "slots_0.png").exists() == (task == "sf")
    assert not list(out.rglob("*.gmm-jepa-part"))


@pytest.mark.usefixtures("without_report")
def test_started_again_it_skips_what_is_done(manifest_of, tmp_path):
    out, path = tmp_path / "out", manifest_of("asr")
    arguments = words("asr", out, "--data", path, "--learning-rates", "0.01", "0.001")
    assert main(arguments) == 0
    results = {path: path.read_bytes() for path in (out / "results").rglob("*.json")}
    times = {path: path.stat().st_mtime_ns for path in results}
    assert len(results) == 2
    before = json.loads((out / "probe.json").read_text())

    gone, kept = results  # done again, it comes to the same
    gone.unlink()
    assert main(arguments) == 0
    assert kept.stat().st_mtime_ns == times[kept]
    assert gone.stat().st_mtime_ns > times[gone]
    again, first = json.loads(gone.read_text()), json.loads(results[gone])
    after = json.loads((out / "probe.json").read_text())
    for told in (again, first, before["rows"][0], after["rows"][0]):
        told.pop("seconds")
    assert again == first
    assert after == before


@pytest.mark.usefixtures("without_report")
def test_more_learning_rates_can_be_added_and_the_best_on_dev_is_told(
    manifest_of, tmp_path, capsys
):
    out, path = tmp_path / "out", manifest_of("er")
    common = words("er", out, "--data", path, "--split-by", "utterance", "--disk-mib", "9")
    assert main([*common, "--learning-rates", "1e-2", "--memory-mib", "0"]) == 0
    assert main([*common, "--learning-rates", "1e-2", "1e-6", "--memory-mib", "0"]) == 0
    results = [json.loads(p.read_text()) for p in (out / "results").rglob("*.json")]
    assert sorted(r["learning_rate"] for r in results) == [1e-6, 1e-2]
    best = max(results, key=lambda r: (r["best"]["dev_accuracy"], -r["best"]["dev_loss"]))
    (row,) = json.loads((out / "probe.json").read_text())["rows"]
    assert row["learning_rate"] == best["learning_rate"]
    assert not (out / "cache").exists()

    assert main([*common, "--steps", "6"]) == 2
    assert "other settings" in error_of(capsys)
    other = words("er", out, "--data", manifest_of("er", 11, "other"))
    assert main([*other, "--split-by", "utterance"]) == 2
    assert "other data" in error_of(capsys)


@pytest.mark.usefixtures("without_report")
def test_a_folder_without_results_takes_other_settings(manifest_of, encoder_file, tmp_path, capsys):
    out = tmp_path / "out"
    common = words("er", out, "--data", manifest_of("er"), "--split-by", "utterance")
    assert main([*common, "--upstream", str(encoder_file), str(encoder_file)]) == 2
    assert "expected different names" in error_of(capsys)
    assert main([*common, "--steps", "6"]) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["steps"] == 6

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"sources": {}, "recipe": {}}')
    assert main(words("er", run, "--data", manifest_of("er"), "--split-by", "utterance")) == 2
    assert "holds no results" in error_of(capsys)
    assert "recipe" in (run / "config.json").read_text()


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("task", TASKS)
def test_eight_utterances_can_be_learnt_by_heart(task, audio, manifest_of, tmp_path):
    parts = []
    for part in ("train", "dev", "test"):
        copies = shutil.copytree(audio.parent, tmp_path / part)

        def elsewhere(_i, line, copies=copies):
            line["audio_filepath"] = str(copies / Path(line["audio_filepath"]).name)

        parts += [f"--{part}", manifest_of(task, 8, part, elsewhere)]
    arguments = words(task, tmp_path / "out", *parts, "--learning-rates", "1e-2")
    if task == "er":
        arguments += ["--steps", "300", "--projection", "32"]
    else:
        arguments += ["--rnn-width", "48", "--projection", "48", "--steps", "200", *PLAIN]
    assert main([*arguments, "--batch", "8", "--evaluate-every", "50"]) == 0
    numbers = json.loads((tmp_path / "out" / "probe.json").read_text())
    (row,) = numbers["rows"]
    curve = row["curves"]["0.01"][0]
    assert curve[-1]["train_loss"] < 0.5 * curve[0]["train_loss"]
    if task == "asr":
        assert row["test"]["wer"] < 20
        assert row["test"]["cer"] < 10
    elif task == "sf":
        assert row["test"]["slot_type_f1"] > 90
        assert row["test"]["slot_value_cer"] < 20
    else:
        assert row["test"]["accuracy"] > 85


@pytest.mark.usefixtures("without_report")
def test_folds_are_averaged(manifest_of, tmp_path):
    out = tmp_path / "out"
    given = ["--data", manifest_of("er"), "--split-by", "speaker", "--folds"]
    assert main([*words("er", out, *given), "--learning-rates", "1e-2", "1e-3"]) == 0
    assert len(list((out / "results" / "log-mel").glob("fold_s*_lr_*.json"))) == 8
    numbers = json.loads((out / "probe.json").read_text())
    (row,) = numbers["rows"]
    assert len(row["predictions"]) == 12
    found = [
        json.loads(p.read_text())["test"]["accuracy"]
        for p in (out / "results").rglob(f"*lr_{row['learning_rate']!r}.json")
    ]
    assert row["test"]["accuracy"] == pytest.approx(sum(found) / 4)


@pytest.mark.usefixtures("without_report")
def test_hugging_face_and_ours_stand_in_one_table(manifest_of, encoder_file, tmp_path):
    torch.manual_seed(5)
    folder, out = tmp_path / "hubert", tmp_path / "out"
    HubertModel(HubertConfig(**TINY)).save_pretrained(folder)
    given = ["--upstream", encoder_file, folder, "--data", manifest_of("er")]
    arguments = words("er", out, *given, "--split-by", "utterance", "--learning-rates", "1e-2")
    assert main(arguments) == 0
    rows = json.loads((out / "probe.json").read_text())["rows"]
    kinds = ["trained", "untrained", "trained", "untrained", "log-mel"]
    assert [row["kind"] for row in rows] == kinds
    assert [row["layers"] for row in rows] == [3, 3, 3, 3, 1]

    torch.manual_seed(6)  # other weights under the same name
    HubertModel(HubertConfig(**TINY)).save_pretrained(folder)
    assert main(arguments) == 2


def test_superbs_settings_are_superbs(capsys):
    from gmm_jepa.downstream.settings import settings_for

    asr, er, sf = (settings_for(task, "superb") for task in TASKS)
    assert (asr.steps, asr.evaluate_every, asr.batch, sf.batch) == (200_000, 2_000, 16, 32)
    assert (asr.projection, asr.rnn_layers, asr.rnn_width, asr.dropout) == (1024, 2, 1024, 0.2)
    assert (er.steps, er.evaluate_every, er.batch, er.accumulate) == (30_000, 1_000, 4, 8)
    assert er.projection == 256
    for settings in (asr, er, sf):
        assert (settings.clip_norm, settings.seed) == (1.0, 1337)
        assert settings.learning_rates == tuple(10.0**-k for k in range(1, 8))
    with pytest.raises(SystemExit):
        main(["probe", "asr", "--protocol", "superb", "--help"])
    assert "200000" in capsys.readouterr().out.replace("_", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "expected asr, er, sf or manifest"),
        (["asr", "--out", "{out}", "--data", "absent.jsonl"], "absent.jsonl: no such manifest"),
        (["asr", "--out", "{out}"], "--train: expected a manifest"),
        (
            ["asr", "--out", "{out}", "--data", "{asr}", "--folds", "--split-by", "utterance"],
            "--folds",
        ),
        (
            ["asr", "--out", "{out}", "--data", "{asr}", "--upstream", "no/where/at/all"],
            "no/where/at/all",
        ),
        (["er", "--out", "{out}", "--data", "{asr}"], "line 1: label: expected text, got None"),
        (["sf", "--out", "{out}", "--data", "{asr}"], "no slot"),
        (["asr", "--out", "{out}", "--data", "{asr}", "--no-controls"], "nothing to probe"),
        (["asr", "--out", "{out}", "--split-by", "speaker"], "--split-by: only with --data"),
        (["asr", "--out", "{out}", "--dev-share", "0.1"], "--dev-share: only with --data"),
        (["asr", "--out", "{out}", "--split-seed", "0"], "--split-seed: only with --data"),
        (
            ["asr", "--out", "{out}", "--data", "{asr}", "--folds", "--test-share", "0.2"],
            "--test-share: not with --folds",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, said, manifest_of, tmp_path, capsys):
    out, asr = tmp_path / "out", manifest_of("asr")
    assert main(["probe", *(word.format(out=out, asr=asr) for word in arguments)]) == 2
    assert said in error_of(capsys)
    assert not out.exists()


@pytest.mark.parametrize("module", ["jiwer", "matplotlib"])
def test_a_missing_package_is_told_of_before_anything_is_done(
    module, manifest_of, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "out"
    assert main(words("asr", out, "--data", manifest_of("asr"))) == 1
    assert f"{module} is needed here: pip install" in error_of(capsys)
    assert not out.exists()


@pytest.mark.usefixtures("without_report")
def test_what_a_run_was_pretrained_on_is_told(manifest_of, tmp_path, capsys):
    """By the files themselves; where they lie elsewhere now nothing is said."""
    run, data, audio = tmp_path / "run", manifest_of("er"), manifest_of("er", name="pretraining")
    more = ["--mixture.n-components", "4", "--train.steps", "2", "--train.no-tensorboard"]
    more += ["--data.heldout-fraction", "0.5", "--data.heldout-by", "utterance"]
    train = ["train", "--audio", str(audio), "--out", str(run), "--preset", "smoke", *more]
    assert main(train) == 0
    given = ["--upstream", run, "--data", data, "--learning-rates", "0.01", "--no-controls"]
    split = ["--split-by", "utterance", "--test-share", "0.4", "--split-seed", "1"]
    assert main(words("er", tmp_path / "out", *given, *split)) == 0
    numbers = json.loads((tmp_path / "out" / "probe.json").read_text())
    (heard,) = numbers["data"]["heard"].values()
    tested = numbers["data"]["folds"][0]["test"]
    assert 0 < heard < tested
    line = f"run was pretrained on {heard} of the {tested} test utterances, without labels"
    assert line in capsys.readouterr().out
    audio.unlink()
    assert main(words("er", tmp_path / "again", *given, *split)) == 0
    assert "was pretrained on" not in capsys.readouterr().out
