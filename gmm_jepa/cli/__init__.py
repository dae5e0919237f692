"""The `gmm-jepa` command: finds the command, and turns a user's mistake into one clear line."""

from __future__ import annotations

import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import NamedTuple

from gmm_jepa.errors import InputError, require


class _Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "run": _Command("training", "everything: audio, mixture, training, evaluation, report"),
    "train": _Command("training", "fit the mixture, or take one, and train the encoder"),
    "evaluate": _Command("training", "measure a trained run on held-out audio, write its report"),
    "plan": _Command("plan", "hours, memory, disk and cost of a training before it is begun"),
    "compare": _Command("compare", "train several systems alike on one corpus, one page on them"),
    "fit-gmm": _Command("mixture", "fit a Gaussian mixture on the log-mel frames of a corpus"),
    "validate": _Command("corpus", "read all audio of a corpus and list what cannot be used"),
    "pack": _Command("corpus", "decode a corpus once into memory-mapped shards"),
    "synthesize": _Command("corpus", "make a corpus of synthetic speech with phone labels"),
    "extract": _Command("extract", "write an encoder's features and clusters of new audio"),
    "probe": _Command("probe", "test encoders on transcripts, emotions and slots, after SUPERB"),
    "export": _Command("export", "write an encoder for Hugging Face, ONNX or torch.export"),
    "convert": _Command("convert", "files of the published code to this project's, and back"),
    "doctor": _Command("doctor", "versions, devices and live backends"),
}

_GO_ON = ("run", "train", "fit-gmm", "pack", "probe")
"""Commands that find what they had done, wherever they were interrupted."""

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""Asked to stop, and stopped: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130

SPINS = "5000"
"""How often an idle thread of GNU's OpenMP looks for work before it sleeps: a quarter of a
millisecond. By its own choice it looks for 10 ms and more, and so takes the time of whatever else
needs the core: beside one busy loop the small conformer trained on two cores at a twentieth of its
speed, with this at a third to a half, and alone at the same speed within noise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        0; 2 for a user's mistake; 1 for a missing package or a failed write; 75 if it was asked to
        stop, saved and can go on; 130 if interrupted. An error of the program itself is raised,
        with its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else EXIT_BAD_INPUT
    name, *rest = words
    if name == "--version":
        print(importlib.import_module("gmm_jepa").__version__)
        return 0
    if name not in COMMANDS:
        return _fail(
            f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}", EXIT_BAD_INPUT
        )

    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be in no encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # read once, when torch is imported
    try:
        require("tyro", extra="train")
        module = importlib.import_module(f"gmm_jepa.cli.{COMMANDS[name].module}")
        return module.main(name, rest)
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except BrokenPipeError as error:
        if _is_read():
            return _fail(str(error), EXIT_FAILED)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ImportError, OSError) as error:
        return _fail(str(error), EXIT_FAILED)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported yet
            advice = "a smaller --data.batch-s, --train.accumulate or --train.checkpoint-blocks"
            return _fail(f"out of memory; {advice} takes less ({error})", EXIT_FAILED)
        if "DataLoader worker" not in str(error):
            raise
        reason = "a decoding process died; out of memory? Try fewer: --data.workers 0"
        return _fail(f"{reason} ({error})", EXIT_FAILED)
    except KeyboardInterrupt:
        more = "; start again to go on" if name in _GO_ON else ""
        return _fail(f"interrupted{more}", EXIT_INTERRUPTED)


def _is_read() -> bool:
    """Whether somebody reads the output: who has seen enough may be gone.

    The pipe is asked: a write that failed may leave nothing behind whose flush would fail, too.
    """
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in pipe.poll(0))


def _fail(message: str, code: int) -> int:
    print(f"gmm-jepa: {' '.join(message.split())}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gmm-jepa COMMAND [OPTIONS]",
            "",
            "Pretrain speech encoders with GMM-anchored joint-embedding prediction.",
            "",
            *lines,
            "",
            "gmm-jepa COMMAND --help tells the options of a command.",
        ]
    )
