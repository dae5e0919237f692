"""A few steps of a training under PyTorch's profiler: a trace, and a table by operation.

The steps are the training's own and their losses do not change. Where the operations of an op are
known (matrix products, convolutions), its time stands beside the least the device could take at
its rate of matrix products, which is measured afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType

from gmm_jepa.files import write_json, write_text, written_aside
from gmm_jepa.ops.flop_formulas import BY_OUTPUT, FORMULAS
from gmm_jepa.train.timing import device_name, matrix_rate

WARM_UP_STEPS = 3
"""Steps before the profiler is switched on, and one more under it that is thrown away."""
PROFILED_STEPS = 3
SHOWN_OPS = 40
"""Lines of the table; the JSON file has all."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::conv2d")
"""Ops whose operations the profiler counts from their shapes."""


@dataclass(frozen=True, kw_only=True)
class OpLine:
    """One op of a step, means over the profiled steps."""

    name: str
    calls: float
    """A step."""
    ms: float
    """Milliseconds a step, without what it calls; on a GPU those of the GPU."""
    share: float
    """Of all ops."""
    flops: float
    """Operations a step; 0 where unknown."""
    floor_share: float | None
    """The least time those take at the device's rate, as a share of the op's, what it calls
    included; None where operations are unknown."""


class StepProfile:
    """Profiles a few steps early in a training and writes what it found.

    Args:
        folder: gets ``trace.json`` (for chrome://tracing or Perfetto), ``ops.txt``, ``ops.json``.
        device: of the training.
        precision: of the matrix rate, fp32 or bf16.
    """

    def __init__(self, folder: Path, device: torch.device, precision: str) -> None:
        self._folder, self._device, self._precision = folder, device, precision
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._n_steps = 0
        self._profiler = torch.profiler.profile(
            activities=kinds,
            schedule=torch.profiler.schedule(
                wait=WARM_UP_STEPS, warmup=1, active=PROFILED_STEPS, repeat=1
            ),
            on_trace_ready=self._write,
            record_shapes=True,
            with_flops=True,
            acc_events=True,
        )

    def __enter__(self) -> StepProfile:
        self._profiler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._profiler.stop()
        if kind is None and self._n_steps <= WARM_UP_STEPS + 1:
            print(f"profile: the training ended after {self._n_steps} steps, before it began")

    def after_step(self) -> None:
        """Take note of the end of a step."""
        self._n_steps += 1
        self._profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        n_steps = self._n_steps - WARM_UP_STEPS - 1
        if n_steps < 1:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with written_aside(self._folder / "trace.json") as aside:
            profiler.export_chrome_trace(str(aside))
        rate = matrix_rate(self._device, self._precision)
        events = profiler.key_averages(group_by_input_shape=True)
        lines = op_lines(events, n_steps, rate, on_gpu=self._device.type == "cuda")
        values = {
            "device": device_name(self._device),
            "precision": self._precision,
            "steps": n_steps,
            "matrix_flops_per_s": rate,
            "ops": [dataclasses.asdict(line) for line in lines],
        }
        write_json(self._folder / "ops.json", values)
        write_text(self._folder / "ops.txt", op_table(lines, values))
        print(f"profile: {self._folder / 'ops.txt'}")


def op_lines(events: Any, n_steps: int, rate: float, *, on_gpu: bool) -> list[OpLine]:
    """The profiler's averages by op and shapes as one line an op, the longest first.

    Args:
        events: of `torch.profiler.profile.key_averages`, grouped by shapes.
        n_steps: steps they are of.
        rate: of matrix products, operations per second.
        on_gpu: count the GPU's time, not the processor's.
    """
    time = "device_time_total" if on_gpu else "cpu_time_total"
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for event in events:
        if event.device_type != DeviceType.CPU or event.key.startswith("ProfilerStep"):
            continue  # kernels are counted with the op that launched them
        own_us, whole_us = getattr(event, f"self_{time}"), getattr(event, time)
        values = (event.count, own_us, whole_us, _flops(event))
        sums[event.key] = [a + b for a, b in zip(sums[event.key], values)]
    all_us = sum(own_us for _, own_us, _, _ in sums.values())
    lines = [
        OpLine(
            name=name,
            calls=calls / n_steps,
            ms=own_us / 1e3 / n_steps,
            share=own_us / all_us if all_us else 0.0,
            flops=flops / n_steps,
            floor_share=flops / rate / (whole_us / 1e6) if flops and whole_us else None,
        )
        for name, (calls, own_us, whole_us, flops) in sums.items()
    ]
    return sorted(lines, key=lambda line: -line.ms)


def _flops(event: Any) -> float:
    """Operations of all calls with these shapes; 0 where unknown."""
    if event.key in _PRODUCTS:
        return float(event.flops)
    name = event.key.removeprefix("gmm_jepa::")
    if name != event.key and name in FORMULAS and name not in BY_OUTPUT and event.input_shapes:
        return float(event.count * FORMULAS[name](*event.input_shapes))
    if event.key == "aten::convolution_backward":
        output, _, weight = event.input_shapes[:3]
        if output and weight:  # gradients of input and of weight, each as the forward pass
            return event.count * 2 * 2.0 * math.prod(output) * math.prod(weight[1:])
    return 0.0


def op_table(lines: list[OpLine], values: dict[str, Any]) -> str:
    """The longest ops as text."""
    head = (
        f"{values['steps']} steps on {values['device']} in {values['precision']}, "
        f"{sum(line.ms for line in lines):.1f} ms of ops a step; floors at "
        f"{values['matrix_flops_per_s'] / 1e12:.3g} TFLOP/s\n\n"
    )
    width = max((len(line.name) for line in lines[:SHOWN_OPS]), default=2)
    rows = [f"{'op':<{width}}  {'calls':>7}  {'ms':>9}  {'share':>6}  {'GFLOP':>8}  {'floor':>6}"]
    for line in lines[:SHOWN_OPS]:
        flops = f"{line.flops / 1e9:.2f}" if line.flops else ""
        floor = "" if line.floor_share is None else f"{line.floor_share:.0%}"
        rows.append(
            f"{line.name:<{width}}  {line.calls:>7g}  {line.ms:>9.3f}  {line.share:>6.1%}  "
            f"{flops:>8}  {floor:>6}"
        )
    return head + "\n".join(row.rstrip() for row in rows) + "\n"
