"""Compile every Triton kernel for sm_90 without a GPU, and record what it needs.

    python -m bench.compile_kernels

calls each launcher on CPU tensors of the paper's shapes with Triton's driver replaced by one that
knows the target alone: what the launcher would launch is compiled, exactly as specialised for
those arguments. Registers, spills and shared memory of each kernel are what `ptxas -v` says of
its PTX. One JSON line a kernel is appended to bench/results/compile.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch
import triton
from gmm_jepa.kernels import (
    density_attention,
    density_attention_backward,
    depthwise_conv,
    gated_bias_attention,
    gated_bias_attention_backward,
    gaussian,
    gmm_log_likelihood,
    gmm_posterior,
    log_mel,
    masked_cross_entropy,
    masked_kl,
    masked_kl_targets,
    masked_mse,
    residual_unit,
    residual_unit_backward,
    snake,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.records import RESULTS, append, commit

TARGET = GPUTarget("cuda", 90, 32)
N, K, D, C = 4096, 1024, 80, 512  # rows do not change what is compiled
F32, BF16 = torch.float32, torch.bfloat16


class TargetOnly:
    """Stands for Triton's driver where there is no device: it has a target, and no more."""

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return TARGET

    def get_current_device(self) -> int:
        """Any number: nothing runs."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any number: nothing runs."""
        return 0


def compiled_by(launch: Callable[[], object]) -> list:
    """The kernels that `launch` would launch, compiled; none is run."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    triton.runtime.driver.set_active(TargetOnly())
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def resources(ptx: str) -> dict[str, int]:
    """Registers a thread, bytes of spills and of stack, from `ptxas -v`."""
    ptxas = shutil.which("ptxas") or triton.knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_store_bytes": r"(\d+) bytes spill stores",
        "spill_load_bytes": r"(\d+) bytes spill loads",
        "stack_bytes": r"(\d+) bytes stack frame",
    }
    return {name: int(re.search(pattern, log)[1]) for name, pattern in patterns.items()}


def mixture_operand(
    *, exact: bool, components: int = K, features: int = D, dtype: torch.dtype = F32
) -> gaussian.Operand:
    """A mixture of the right shape; values do not change what is compiled."""
    row = torch.ones(components)
    if exact:
        grid = torch.ones(components, features, dtype=dtype)
        return gaussian.direct_operand(grid, grid, row.double())
    affine, weight = torch.ones(features), torch.ones(2 * features, components)
    return gaussian.split_operand(affine, affine, weight, row, row.double())


def mixture_cases() -> dict[str, Callable[[], object]]:
    """Kernels of the mixture and the losses at the paper's shapes: name -> launch."""
    cases: dict[str, Callable[[], object]] = {}
    frames, weights = torch.zeros(N, D), torch.ones(N)
    labels = torch.zeros(N, dtype=torch.int64)
    for dtype in (F32, BF16):
        name = str(dtype).removeprefix("torch.")
        logits, latents = torch.zeros(N, K, dtype=dtype), torch.zeros(N, C, dtype=dtype)
        cases |= {
            f"gmm_posterior fast {name}": lambda dtype=dtype: gmm_posterior.gmm_posterior(
                frames, mixture_operand(exact=False), K, out_dtype=dtype
            ),
            f"gmm_posterior exact {name}": lambda dtype=dtype: gmm_posterior.gmm_posterior(
                frames, mixture_operand(exact=True), K, out_dtype=dtype
            ),
            f"masked_kl {name}": lambda logits=logits: masked_kl.masked_kl(
                logits, frames, weights, mixture_operand(exact=False)
            ),
            f"masked_kl {name}, no gradient": lambda logits=logits: masked_kl.masked_kl(
                logits, frames, weights, mixture_operand(exact=False), with_gradient=False
            ),
            f"masked_kl_targets {name}": lambda logits=logits: masked_kl_targets.masked_kl_targets(
                logits, logits, weights
            ),
            f"masked_cross_entropy {name}": lambda logits=logits: (
                masked_cross_entropy.masked_cross_entropy(logits, labels, weights)
            ),
            f"masked_mse {name}": lambda latents=latents: masked_mse.masked_mse(
                latents, latents, weights
            ),
        }
    for name, options in (
        ("fast", {"exact": False}),
        ("exact", {"exact": True}),
        ("exact, float64 mixture", {"exact": True, "dtype": torch.float64}),
    ):
        cases |= {
            f"gmm_log_posterior {name}": lambda options=options: gmm_posterior.gmm_posterior(
                frames, mixture_operand(**options), K, log=True
            ),
            f"gmm_log_likelihood {name}": lambda options=options: (
                gmm_log_likelihood.gmm_log_likelihood(frames, mixture_operand(**options))
            ),
            f"gmm_argmax {name}": lambda options=options: gmm_log_likelihood.gmm_argmax(
                frames, mixture_operand(**options)
            ),
        }
    return cases | large_cases()


def large_cases() -> dict[str, Callable[[], object]]:
    """The largest mixtures the kernels are meant for, and the most features."""
    weights = torch.ones(N)
    cases: dict[str, Callable[[], object]] = {}
    for components, features in ((8192, D), (K, 512), (8192, 512)):
        name = f"K={components} D={features}"
        frames, logits = torch.zeros(N, features), torch.zeros(N, components)
        sizes = {"components": components, "features": features}

        def posterior(
            exact: bool,
            dtype: torch.dtype = F32,
            frames: torch.Tensor = frames,
            sizes: dict[str, int] = sizes,
        ) -> object:
            operand = mixture_operand(exact=exact, dtype=dtype, **sizes)
            return gmm_posterior.gmm_posterior(frames, operand, sizes["components"])

        def likelihood(
            exact: bool, frames: torch.Tensor = frames, sizes: dict[str, int] = sizes
        ) -> object:
            operand = mixture_operand(exact=exact, **sizes)
            return gmm_log_likelihood.gmm_log_likelihood(frames, operand)

        def kl(
            with_gradient: bool,
            frames: torch.Tensor = frames,
            logits: torch.Tensor = logits,
            sizes: dict[str, int] = sizes,
        ) -> object:
            operand = mixture_operand(exact=False, **sizes)
            return masked_kl.masked_kl(
                logits, frames, weights, operand, with_gradient=with_gradient
            )

        cases |= {
            f"gmm_posterior fast float32 {name}": partial(posterior, False),
            f"gmm_posterior exact float32 {name}": partial(posterior, True),
            f"gmm_posterior exact, float64 mixture {name}": partial(posterior, True, torch.float64),
            f"gmm_log_likelihood fast {name}": partial(likelihood, False),
            f"gmm_log_likelihood exact {name}": partial(likelihood, True),
            f"masked_kl float32 {name}": partial(kl, True),
            f"masked_kl float32 {name}, no gradient": partial(kl, False),
        }
    return cases


def log_mel_cases() -> dict[str, Callable[[], object]]:
    """Log-mel at the paper's front end, and at a wider one: name -> launch."""

    def launch(
        samples: torch.dtype, out: torch.dtype, n_fft: int = 400, n_mels: int = 80
    ) -> object:
        return log_mel.log_mel(
            torch.zeros(2, 240_000, dtype=samples),
            torch.full((2,), 240_000),
            torch.zeros(n_fft),
            torch.zeros(n_fft // 2 + 1, n_mels),
            hop=320,
            floor=1e-6,
            out_dtype=out,
        )

    return {
        "log_mel float32": lambda: launch(F32, F32),
        "log_mel float32 to bfloat16": lambda: launch(F32, BF16),
        "log_mel bfloat16": lambda: launch(BF16, BF16),
        "log_mel int16": lambda: launch(torch.int16, F32),
        "log_mel n_fft 1024, 128 mels": lambda: launch(F32, F32, 1024, 128),
    }


def attention_cases() -> dict[str, Callable[[], object]]:
    """Gated-bias attention, forward and backward: name -> launch."""

    def launch(dtype: torch.dtype, D: int, dropout_p: float) -> None:
        B, H, T = 4, 12, 750
        q = torch.zeros(B, T, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)
        table, gate = torch.zeros(H, 2 * T - 1), torch.zeros(B, H, T, dtype=dtype)
        seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
        arguments = (*q, table, gate, torch.full((B,), T), seed, dropout_p)
        out, log_sum = gated_bias_attention.gated_bias_attention(*arguments)
        gated_bias_attention_backward.gated_bias_attention_backward(out, out, log_sum, *arguments)

    return {
        f"gated_bias_attention {str(dtype).removeprefix('torch.')} d={D}"
        + (" dropout" if dropout_p else ""): lambda options=(dtype, D, dropout_p): launch(*options)
        for dtype, D, dropout_p in (
            (BF16, 16, 0.0),
            (BF16, 16, 0.1),
            (BF16, 32, 0.1),
            (F32, 16, 0.0),
            (F32, 16, 0.1),
            (BF16, 64, 0.0),
            (BF16, 64, 0.1),
            (BF16, 128, 0.1),
            (F32, 64, 0.1),
            (F32, 128, 0.1),
        )
    }


def depthwise_cases() -> dict[str, Callable[[], object]]:
    """The conformer's depthwise convolution, forward and backward: name -> launch."""

    def launch(dtype: torch.dtype, channels: int, taps: int) -> None:
        x = torch.zeros(4, 750, channels, dtype=dtype)
        weight, bias = torch.zeros(channels, 1, taps), torch.zeros(channels)
        depthwise_conv.depthwise_conv(x, weight, bias)
        depthwise_conv.depthwise_conv_backward(x, x, weight)

    return {
        f"depthwise_conv {str(dtype).removeprefix('torch.')} C={channels} K={taps}": (
            lambda options=(dtype, channels, taps): launch(*options)
        )
        for dtype, channels, taps in ((BF16, C, 31), (F32, C, 31), (BF16, 500, 31), (BF16, C, 63))
    }


def front_end_cases() -> dict[str, Callable[[], object]]:
    """What follows the strided convolutions of the paper's stages, forward and backward.

    The stages have 30,000, 3,750 and 750 frames of 15 s. Neither those nor the dilations, up to
    125, are known to the compiler.
    """
    B = 2
    parameters = torch.ones(4, 4)

    def unit(dtype: torch.dtype, T: int, C: int, lengths: torch.Tensor | None) -> None:
        x, weight, bias = torch.empty(B, T, C, dtype=dtype), torch.ones(C, C, 3), torch.ones(C)
        arguments = (weight, bias, weight, bias, lengths, 25)
        out, a = residual_unit.residual_unit(x, *arguments)
        residual_unit_backward.residual_unit_backward(out, x, a, *arguments)

    def activation(dtype: torch.dtype, T: int, C: int, lengths: torch.Tensor | None) -> None:
        x, a = torch.empty(B, T, C, dtype=dtype), torch.ones(C)
        snake.snake(x, a, lengths)
        snake.snake_backward(x, x, a, lengths)

    def attention(dtype: torch.dtype, T: int, C: int, lengths: torch.Tensor | None) -> None:
        inputs = (torch.empty(B, T, C, dtype=dtype), parameters, parameters, lengths)
        out = density_attention.density_attention(*inputs)
        density_attention_backward.density_attention_backward(out, *inputs)

    cases: dict[str, Callable[[], object]] = {}
    for T, channels in ((30_000, 64), (3_750, 128), (750, 256)):
        for ragged in (False, True):
            lengths = torch.full((B,), T) if ragged else None
            case = f"bfloat16 C={channels}{' ragged' if ragged else ''}"
            cases |= {
                f"residual_unit {case}": partial(unit, BF16, T, channels, lengths),
                f"snake {case}": partial(activation, BF16, T, channels, lengths),
                f"density_attention {case}": partial(attention, BF16, T, channels, lengths),
            }
    return cases | {
        "snake float32 C=64 ragged": partial(activation, F32, 30_000, 64, torch.full((B,), 30_000)),
        "density_attention float32 C=64 ragged": (
            partial(attention, F32, 30_000, 64, torch.full((B,), 30_000))
        ),
    }


# Each entry gives name -> launch on CPU tensors; append yours.
REGISTRY: list[Callable[[], dict[str, Callable[[], object]]]] = [
    mixture_cases,
    log_mel_cases,
    attention_cases,
    depthwise_cases,
    front_end_cases,
]


def main() -> None:
    """Compile, print a table, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    print(f"{'case':44} {'kernel':36} regs  spills (bytes)  shared (KiB)  wgmma  warps")
    for cases in REGISTRY:
        for case, launch in cases().items():
            if options.only in case:
                for kernel in compiled_by(launch):
                    record(case, kernel, None if options.dry else options.out)


def record(case: str, kernel, out: Path | None) -> None:
    """Print one compiled kernel's needs and, where there is a folder, append them in it."""
    line = {
        "case": case,
        "kernel": kernel.metadata.name,
        "target": "sm_90a",
        **resources(kernel.asm["ptx"]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "commit": commit(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    spills = f"{line['spill_store_bytes']} + {line['spill_load_bytes']}"
    print(
        f"{case:44} {line['kernel']:36} {line['registers']:4}  {spills:>14}  "
        f"{line['shared_bytes'] / 1024:12.1f}  {line['wgmma']:5}  {line['warps']:5}",
        flush=True,
    )
    if out is not None:
        append("compile", line, out)


if __name__ == "__main__":
    main()
