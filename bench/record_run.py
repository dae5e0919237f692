"""Keep the result of a run: its evaluation as one JSON line in ``bench/results/runs.jsonl``.

python bench/record_run.py runs/demo/run --command "make demo" --seconds 303
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from gmm_jepa.files import read_json
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.metrics import read_metrics

RESULTS = Path(__file__).resolve().parent / "results" / "runs.jsonl"


def record(root: Path, command: str, seconds: float | None) -> dict:
    """What is worth keeping of a run: settings that matter, speed, clusters and probes."""
    folder = RunFolder(root)
    _, recipe = folder.read()
    found = read_json(folder.evaluation)
    metrics = read_metrics(folder.metrics)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "name": "run",
        "command": command,
        "commit": commit.stdout.strip(),
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
    arguments = parser.parse_args()
    line = record(arguments.run, arguments.command, arguments.seconds)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
