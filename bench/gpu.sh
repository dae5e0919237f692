#!/usr/bin/env bash
# Everything for a CUDA machine in one call, under 8 minutes, without network:
#
#     bash bench/gpu.sh
#
# prints the environment, runs the GPU tests (the first failure stops the script and shows the
# numbers that differ), lets compute-sanitizer look at a tiny case where it is installed, and
# prints the table of ops with floors and peers. JSON lines go to ${OUT:-bench/results}.
#
# It has not been run on a GPU yet.
#
# Needs: Python 3.10 or later with torch (CUDA), triton, torchaudio, numpy, scipy, scikit-learn and
# pytest. Nothing is installed and nothing outside the repository is written but temporary links.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${OUT:-$repository/bench/results}"
shapes="${SHAPES:-paper small large}"
mkdir -p "$out"

# The package as it would be installed: gmm_jepa with kernels/ inside it.
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
mkdir "$site/gmm_jepa"
ln -s "$repository"/gmm_jepa/* "$site/gmm_jepa/"
ln -s "$repository/kernels" "$site/gmm_jepa/kernels"
export PYTHONPATH="$site:$repository" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR="$site/triton"
unset TRITON_INTERPRET
cd "$site"

echo "== environment"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
"$python" - <<'PYTHON'
import platform

import numpy
import torch
import triton

import gmm_jepa
import gmm_jepa.kernels

assert torch.cuda.is_available(), "no CUDA device"
print("python", platform.python_version(), "numpy", numpy.__version__)
print("torch", torch.__version__, "triton", triton.__version__, "on", torch.cuda.get_device_name())
print("compute capability", torch.cuda.get_device_capability())
print("gmm_jepa", gmm_jepa.__file__, "kernels", gmm_jepa.kernels.__file__)
PYTHON

echo "== correctness on the GPU"
# Most of the time is compilation, one kernel for each shape: several processes where xdist is there.
processes=""
if "$python" -c "import xdist" 2> /dev/null; then
    processes="-n $(($(nproc) < 8 ? $(nproc) : 8))"
fi
# shellcheck disable=SC2086  # one option of two words, or none
timeout 270 "$python" -m pytest -c "$repository/pyproject.toml" --rootdir "$repository" \
    -o "pythonpath=$site" -p no:cacheprovider -m gpu -x --tb=short --durations=5 $processes \
    "$repository/tests/kernels"

echo "== compute-sanitizer on a tiny case"
if command -v compute-sanitizer > /dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 45 compute-sanitizer --tool memcheck \
        --error-exitcode 1 "$python" -m bench.tiny || {
        code=$?
        [ "$code" -eq 124 ] || exit "$code"
        echo "stopped after 45 s"
    }
else
    echo "not installed"
fi

echo "== ops, floors and peers"
# shellcheck disable=SC2086  # several shapes are several words
timeout 150 "$python" -m bench.ops --device cuda --shapes $shapes --seconds 1 --out "$out" || {
    code=$?
    [ "$code" -eq 124 ] || exit "$code"
    echo "stopped after 150 s; what was measured is above"
}
echo "== results in $out"
