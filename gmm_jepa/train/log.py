"""What a training tells as it goes: lines of metrics, the alarm, advice, and a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gmm_jepa.config import DataConfig, Recipe
from gmm_jepa.distributed import Processes
from gmm_jepa.progress import tqdm_bar
from gmm_jepa.train.advice import on_waiting, share_of_cores
from gmm_jepa.train.alarm import Alarm
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.metrics import MetricsLog

JUDGED_LINE = 3
"""The line of metrics that tells whether there are enough workers: earlier ones see them start."""
SHOWN = ("loss", "kl", "cross_entropy")

Listener = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def training_log(
    folder: RunFolder, start: int, recipe: Recipe, peers: Processes
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that takes in the values of a step (steps done); silent but in the main process.

    Args:
        folder: of the run.
        start: steps done before; later lines of metrics are dropped.
        recipe: all settings.
        peers: this process among its peers.
    """
    config = recipe.train
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm_bar(
                initial=start,
                total=config.steps,
                desc="training",
                unit="step",
                disable=not peers.is_main,
            )
        )
        listeners: list[Listener] = []
        if peers.is_main:
            metrics = MetricsLog(folder.metrics, start, tensorboard=config.tensorboard)
            listeners.append(stack.enter_context(metrics).write)
            if config.alarm:
                starts = [iteration.first_step for iteration in recipe.iterations]
                listeners.append(Alarm(folder.alarms, folder.metrics, config.steps, starts).see)
            listeners.append(_WaitingAdvice(recipe.data, share_of_cores(peers), bar.write).see)

        def write(step: int, values: dict[str, float]) -> None:
            line = {"step": step, **values}
            for listen in listeners:
                listen(line)
            shown = {name: f"{values[name]:.3f}" for name in SHOWN if name in values}
            bar.set_postfix(**shown, refresh=False)
            bar.update(step - bar.n)

        yield write


class _WaitingAdvice:
    """Says once whether more workers would help.

    Args:
        data: settings.
        cores: that this process may use for workers.
        say: takes the advice.
    """

    def __init__(self, data: DataConfig, cores: int, say: Callable[[str], None]) -> None:
        self._data, self._cores, self._say, self._n_lines = data, cores, say, 0

    def see(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics."""
        self._n_lines += 1
        if self._n_lines != JUDGED_LINE:
            return
        advice = on_waiting(line["wait_share"], self._data, self._cores)
        if advice is not None:
            self._say(advice)
