"""`gmm-jepa probe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from gmm_jepa.cli.parse import last_value, parse
from gmm_jepa.cli.table import format_table
from gmm_jepa.distributed import processes, refuse_torchrun
from gmm_jepa.downstream import data, sweep
from gmm_jepa.downstream.folders import KINDS, write_manifests
from gmm_jepa.downstream.report import heard_lines, summary_rows, write_report
from gmm_jepa.downstream.settings import (
    TASKS,
    ProbeSettings,
    Protocol,
    TaskName,
    settings_for,
)
from gmm_jepa.downstream.tasks import task_for
from gmm_jepa.downstream.upstreams import LogMel, Upstream, open_upstream
from gmm_jepa.errors import InputError, require
from gmm_jepa.pipeline import n_heard
from gmm_jepa.train.folder import RunFolder

_HELP = """usage: gmm-jepa probe asr|er|sf|manifest [OPTIONS]

Train a head on frozen features and test it, beside two controls: the same encoder untrained, and
log-mel frames. Tasks and protocol after SUPERB.

  asr       speech recognition: characters, word error rate
  er        emotion recognition, or any other label: one class an utterance, accuracy
  sf        slot filling: characters and slot tags, F1 of slot types
  manifest  write manifests of LibriSpeech, IEMOCAP or Audio SNIPS

gmm-jepa probe asr --help tells the options of a task."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Train a head on frozen features, once a learning rate, and print a table with its controls.

    Manifests are JSONL lines with audio_filepath and the answer. Started again, finished trainings
    are skipped. Scores are those of the learning rate that is best on the dev part.
    """

    upstream: tuple[str, ...] = ()
    """Run folders, checkpoints or model files; folders or names of Hugging Face speech encoders."""
    out: Path
    """Folder of the results; made if absent."""
    train: tuple[Path, ...] = ()
    """Manifests to learn from."""
    dev: tuple[Path, ...] = ()
    """Manifests that choose among steps and learning rates."""
    test: tuple[Path, ...] = ()
    """Manifests that are scored."""
    data: Path | None = None
    """One manifest instead of the three."""
    split_by: str | None = None
    """Key of --data whose values stay in one part; or utterance; default: speaker."""
    folds: bool = False
    """Test every value of --split-by in turn, and report the mean."""
    dev_share: float | None = None
    """Share of the duration of --data; default: 0.1."""
    test_share: float | None = None
    """Share of the duration of --data; default: 0.2."""
    split_seed: int | None = None
    """Of the choice; default: 0."""
    label_key: str | None = None
    """Key of the answer; default: text, for er label."""
    teacher: bool = False
    """Of ours, the moving average instead of the encoder that was trained."""
    controls: bool = True
    """Add each encoder untrained (fresh weights, seed 0), and log-mel frames."""
    protocol: Protocol = "quick"
    """Settings to start from: SUPERB's, or a small head for a CPU; all can be overridden below."""


@dataclass(frozen=True, kw_only=True)
class ManifestOptions:
    """Write JSONL manifests of a corpus as it is distributed."""

    kind: Literal["librispeech", "iemocap", "audio-snips"]
    """Which corpus."""
    folder: Path
    """LibriSpeech (dev-clean/ in it), IEMOCAP_full_release, or SNIPS (all.iob.snips.txt in it)."""
    out: Path
    """Folder for the manifests; made if absent."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    task, *rest = arguments or ("--help",)
    if task in ("-h", "--help"):
        print(_HELP)
        raise SystemExit(0 if arguments else 2)
    if task == "manifest":
        return _manifest(parse(ManifestOptions, f"{command} {task}", rest))
    if task not in TASKS:
        raise InputError(f"probe: expected {', '.join(TASKS)} or manifest, got {task!r}")
    options = parse(_options_of(task, _protocol(rest)), f"{command} {task}", rest)
    return _probe(task, options)


def _probe(name: TaskName, options: Any) -> int:
    refuse_torchrun("probe runs in one process")
    if not options.upstream and not options.controls:
        raise InputError("upstream: nothing to probe")
    for module in ("matplotlib", "PIL"):  # the report comes last
        require(module, extra="train")
    labelled = _read(name, options)
    task = task_for(name, labelled)
    upstreams = _upstreams(options)
    settings: ProbeSettings = options.settings
    with processes() as peers:
        sweep.open_folder(options.out, name, settings, labelled)
        heard = _heard(options.upstream, upstreams, labelled)
        numbers = sweep.run(
            options.out, upstreams, labelled, task, settings, peers.device, heard=heard
        )
    print(format_table(summary_rows(numbers)))
    for line in heard_lines(numbers):
        print(line)
    print(f"report: {write_report(options.out, numbers)}")
    return 0


def _read(name: TaskName, options: Any) -> data.Labelled:
    key = options.label_key or ("label" if name == "er" else "text")
    parts = (options.train, options.dev, options.test)
    if options.data is None:
        if options.folds:
            raise InputError("--folds: only with --data")
        _refuse(options, ("split_by", "dev_share", "test_share", "split_seed"), "only with --data")
        return data.read_parts(*parts, name, key)
    if any(parts):
        raise InputError("--data: expected alone, or --train, --dev and --test instead of it")
    by, seed = options.split_by or "speaker", options.split_seed or 0
    if options.folds:
        _refuse(options, ("dev_share", "test_share"), "not with --folds")
        return data.read_folds(options.data, name, key, by=by, seed=seed)
    dev = 0.1 if options.dev_share is None else options.dev_share
    test = 0.2 if options.test_share is None else options.test_share
    return data.read_split(options.data, name, key, by=by, seed=seed, dev=dev, test=test)


def _refuse(options: Any, names: Sequence[str], why: str) -> None:
    """Raise `InputError` if one of these options was given."""
    for name in names:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: {why}")


def _upstreams(options: Any) -> list[Upstream]:
    """All rows; upstreams whose last parts are alike are named in full."""
    last = [Path(source).name for source in options.upstream]
    trained = [
        open_upstream(source, source if last.count(name) > 1 else None, teacher=options.teacher)
        for source, name in zip(options.upstream, last)
    ]
    if not options.controls:
        return list(trained)
    return sweep.with_controls(trained) if trained else [LogMel()]


def _heard(
    sources: Sequence[str], upstreams: Sequence[Upstream], labelled: data.Labelled
) -> dict[str, int]:
    """Test utterances that runs were pretrained on, by the names of their rows."""
    tested = np.unique(np.concatenate([fold.test for fold in labelled.folds]))
    corpus = labelled.corpus.select(tested)
    trained = [upstream.name for upstream in upstreams if upstream.kind == "trained"]
    found = {}
    for source, name in zip(sources, trained, strict=True):
        n = n_heard(RunFolder(source), corpus)
        if n is not None:
            found[name] = n
    return found


def _manifest(options: ManifestOptions) -> int:
    for path, count in write_manifests(KINDS[options.kind], options.folder, options.out):
        print(f"{path}: {count:,} utterances")
    return 0


def _options_of(task: TaskName, protocol: Protocol) -> type[ProbeOptions]:
    """The options of a task, with the settings of a protocol as defaults."""
    settings = settings_for(task, protocol)
    made = dataclasses.make_dataclass(
        "Options",
        [
            (
                "settings",
                Annotated[type(settings), tyro.conf.arg(name="")],
                dataclasses.field(default=settings),
            )
        ],
        bases=(ProbeOptions,),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = ProbeOptions.__doc__
    return made


def _protocol(arguments: Sequence[str]) -> Protocol:
    """What is asked for; nonsense is left to the parser."""
    return "superb" if last_value(arguments, "--protocol") == "superb" else "quick"
