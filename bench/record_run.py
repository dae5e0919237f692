"""Keep the result of a run: its evaluation as one JSON line in ``bench/results/runs.jsonl``.

python -m bench.record_run runs/demo/run --command "make demo" --seconds 303
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from bench.records import RESULTS, append, commit
from gmm_jepa.files import read_json
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.metrics import read_metrics


def record(root: Path, command: str, seconds: float | None) -> dict:
    """What is worth keeping of a run: settings that matter, speed, clusters and probes."""
    folder = RunFolder(root)
    _, recipe = folder.read()
    found = read_json(folder.evaluation)
    metrics = read_metrics(folder.metrics)
    return {
        "name": "run",
        "command": command,
        "commit": commit(),
        "versions": found["versions"],
        "device": "cpu",
        "wall_s": seconds,
        "steps": metrics[-1]["step"],
        "batch_s": recipe.data.batch_s,
        "seed": recipe.seed,
        "audio_s_per_s": statistics.median(line["audio_s_per_s"] for line in metrics),
        "sample": found["sample"],
        "clusters": found["clusters"],
        "embedding": found["embedding"],
        "mixture_log_likelihood": found.get("mixture", {}).get("log_likelihood"),
        "probes": found["probes"],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    parser.add_argument("--command", required=True, help="the command that made it")
    parser.add_argument("--seconds", type=float, help="wall time of that command")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    line = record(arguments.run, arguments.command, arguments.seconds)
    append("runs", line, arguments.out)


if __name__ == "__main__":
    main()
