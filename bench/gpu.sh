#!/usr/bin/env bash
# Everything for a CUDA machine in one call, about eight minutes, without network:
#
#     bash bench/gpu.sh
#
# prints the environment, builds the native module into a temporary folder, runs the GPU tests (all
# of them; the logs of failures go to failed_tests.log of the results), prints the table of EM by the
# native CUDA kernels, measures a training step, compiled and eager, trains for a short while with a
# profile, prints the tables of ops and of the front end's layers with floors and peers, and lets
# compute-sanitizer look at a tiny case where it is installed. JSON lines and the profile go to
# ${OUT:-bench/results}. A part that fails does not stop the others: the exit code is 1 at the end.
# CORPUS=folder takes a packed corpus for that training instead of synthetic audio. PARTS="em train"
# leaves out all but the named parts (tests em train run ops layers sanitizer). Kernels that have not
# run on a GPU yet take part; EM and the compiled training step are measured without them, too (that
# step's lines go to a folder "proven" of the results). GMM_JEPA_UNPROVEN_KERNELS=0 leaves them out
# altogether. TUNE=1 sweeps the mixture kernels' tiles after all that, which takes longer than the
# rest.
#
# Most of the time is compilation, on the CPU. The tests compile a kernel for each shape, and the
# compiled training steps are compiled beside them, so that their measurements later, with nothing
# beside them, find all in the cache. Compiled code is cached in TRITON_CACHE_DIR and
# TORCHINDUCTOR_CACHE_DIR where those are set, and otherwise for this run alone.
#
# A rehearsal where there is no GPU (bench/null_cuda; PATIENCE multiplies the limits), where whatever
# looks at values fails (tests, em, run, a few ops):
# PATIENCE=6 PARTS="train ops layers" OUT=folder python -m bench.null_cuda bash bench/gpu.sh
#
# Its parts ran on one H200 with 16 cores: environment, native build (20 s), tests (75 s), sanitizer
# (clean, then without EM), ops and EM by the screen of mma. The training steps and the short
# training have not run under these limits, nor any of it in this order.
#
# Needs: Python 3.10 or later with torch (CUDA), triton, torchaudio, numpy, scipy, scikit-learn,
# pytest; for the native module setuptools, pybind11, a compiler, and nvcc for its CUDA part.
# Nothing is installed and nothing outside the repository is written but temporary links.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${OUT:-$repository/bench/results}"
shapes="${SHAPES:-paper small large}"
parts="${PARTS:-tests em train run ops layers sanitizer}"
wanted() { [[ " $parts " == *" $1 "* ]]; }
mkdir -p "$out"

# The package as it would be installed: gmm_jepa with kernels/ inside it.
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
mkdir "$site/gmm_jepa"
ln -s "$repository"/gmm_jepa/* "$site/gmm_jepa/"
ln -s "$repository/kernels" "$site/gmm_jepa/kernels"
export PYTHONPATH="$site:$repository${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$site/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$site/inductor}"
export GMM_JEPA_UNPROVEN_KERNELS="${GMM_JEPA_UNPROVEN_KERNELS:-1}"
unset TRITON_INTERPRET
cd "$site"
unproven() { [ "$GMM_JEPA_UNPROVEN_KERNELS" = 1 ]; }

# Each part has its own limit, in seconds: native module 40, tests 150, EM 20 + 20, training steps
# 60 + 60 + 55 + 55, short training 40, ops 55, layers 45, sanitizer 50. That is 650 at most and about
# 450 where nothing is cut off; what matters most comes first.
patience="${PATIENCE:-1}"
failed=0
limited() { # seconds, command...: a part that is cut off is no failure, what it printed stands
    local seconds="$(($1 * patience))" code=0
    shift
    timeout "$seconds" "$@" || code=$?
    [ "$code" -ne 124 ] || { echo "stopped after $seconds s"; return 0; }
    return "$code"
}

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

echo "== native module"
# The same setup.py as an installation's; nvcc, where found, adds the CUDA part.
if (cd "$repository" && timeout "$((40 * patience))" "$python" setup.py --quiet build_ext \
    --build-lib "$site/native" --build-temp "$site/objects" > "$site/native.log" 2>&1); then
    ln -sf "$site"/native/gmm_jepa/_native*.so "$site/gmm_jepa/" 2> /dev/null || true
else
    tail -5 "$site/native.log"
fi
"$python" -c "from gmm_jepa.ops import native; print(native.status())"

# A process for each file, and for the large files one for each part of their tests.
run_tests() { # name, then what pytest is to run
    local log="$site/$1.log" code=0
    shift
    timeout "$((150 * patience))" "$python" -m pytest -c "$repository/pyproject.toml" \
        --rootdir "$repository" \
        -o "pythonpath=$site" -o addopts="-q --strict-markers --import-mode=importlib" \
        -p no:cacheprovider -m gpu --tb=short --show-capture=no --durations=2 "$@" > "$log" 2>&1 || code=$?
    # 5: no test selected
    if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then
        { echo "== $*"; cat "$log"; } >> "$out/failed_tests.log"
        echo "FAILED (code $code): $*; all of it in $out/failed_tests.log"
        tail -60 "$log"
        return 1
    fi
    echo "$(tail -1 "$log")  ${*#"$repository"/tests/}"
}
jobs=()
start() {
    run_tests "$@" &
    jobs+=("$!")
}
test_all() {
    local kernels="$repository/tests/kernels" em="$repository/tests/native/test_cuda_em.py"
    local job file code=0
    start kl "$kernels/test_masked_losses.py" -k "test_kl and not given and not ensemble"
    start kl_ensemble "$kernels/test_masked_losses.py" -k "ensemble"
    start kl_given "$kernels/test_masked_losses.py" -k "test_kl and given"
    start losses "$kernels/test_masked_losses.py" -k "not test_kl"
    start posterior "$kernels/test_gmm_posterior.py" -k "test_posterior"
    start log_posterior "$kernels/test_gmm_posterior.py" -k "test_log_posterior"
    start likelihood "$kernels/test_gmm_posterior.py" -k "test_log_likelihood"
    start mixture "$kernels/test_gmm_posterior.py" \
        -k "not test_posterior and not test_log_posterior and not test_log_likelihood"
    # Apart: an illegal access of the screen by warpgroups' products spoils all that follows in its
    # own process.
    GMM_JEPA_UNPROVEN_KERNELS=0 start cuda_em "$em" -k "not wgmma"
    ! unproven || start cuda_em_wgmma "$em" -k wgmma
    for file in "$repository"/tests/kernels/test_*.py "$repository"/tests/{ops,native,train}/test_*.py; do
        case "$file" in
            */kernels/test_masked_losses.py | */kernels/test_gmm_posterior.py) ;;
            "$em") ;;
            *) ! grep -q "gpu" "$file" || start "$(echo "${file#"$repository"/}" | tr / _)" "$file" ;;
        esac
    done
    for job in "${jobs[@]}"; do
        wait "$job" || code=1
    done
    return "$code"
}

step() { # switch of the unproven kernels, seconds, arguments of bench.train
    GMM_JEPA_UNPROVEN_KERNELS="$1" limited "$2" "$python" -m bench.train --device cuda \
        --preset paper --precision bf16 --out "$out" "${@:3}"
}
compile_ahead() { # both compiled steps, beside the tests, for the cache alone
    local switch
    for switch in 0 1; do
        if [ "$switch" = 0 ] || unproven; then
            step "$switch" 150 --compile --skip-proof --repeats 1 --out "$site/ahead" \
                > "$site/ahead_$switch.log" 2>&1 &
        fi
    done
}

if wanted train; then
    compile_ahead
fi
if wanted tests; then
    echo "== correctness on the GPU"
    OMP_NUM_THREADS=1 test_all || failed=1
fi
wait # for what was compiled ahead

if wanted em; then
    echo "== EM: the native CUDA kernels beside torch and Triton"
    GMM_JEPA_UNPROVEN_KERNELS=0 limited 20 "$python" -m bench.cuda_em --out "$out" || failed=1
    if unproven; then
        echo "with the screen by warpgroups' products"
        limited 20 "$python" -m bench.cuda_em --out "$out" || failed=1
    fi
fi

if wanted train; then
    echo "== a training step, compiled and eager, beside the plain one"
    # The float32 proof is the eager run's, or another network would have to be compiled.
    if unproven; then
        echo "compiled, without kernels that have not run on a GPU yet"
        step 0 60 --compile --skip-proof --repeats 3 --out "$out/proven" || failed=1
    fi
    now="$GMM_JEPA_UNPROVEN_KERNELS"
    step "$now" 60 --compile --skip-proof --repeats 3 || failed=1
    step "$now" 55 --compile --cuda-graphs --skip-proof --repeats 3 || failed=1
    step "$now" 55 --repeats 3 || failed=1
fi

if wanted run; then
    echo "== a short real training, with a profile"
    # shellcheck disable=SC2086  # no corpus is no argument
    limited 40 "$python" -m bench.short_run --seconds 15 --precision bf16 --out "$out" \
        ${CORPUS:+--corpus "$CORPUS"} || failed=1
    head -20 "$out/profile/ops.txt" 2> /dev/null || true
fi

if wanted ops; then
    echo "== ops, floors and peers"
    # shellcheck disable=SC2086  # several shapes are several words
    limited 55 "$python" -m bench.ops --device cuda --shapes $shapes --seconds 0.3 --out "$out" ||
        failed=1
fi

if wanted layers; then
    echo "== layers of the front end beside their composed forms"
    limited 45 "$python" -m bench.ops --device cuda --shapes paper --seconds 0.3 --out "$out" \
        --only residual_unit snake density_attention strided_conv || failed=1
fi

if wanted sanitizer; then
    echo "== compute-sanitizer on a tiny case"
    if command -v compute-sanitizer > /dev/null; then
        # Cut off it has shown nothing.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$((50 * patience))" \
            compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m bench.tiny || failed=1
    else
        echo "not installed"
    fi
fi

if [ "${TUNE:-0}" = 1 ]; then
    echo "== tiles of the mixture kernels"
    "$python" -m bench.ops --device cuda --shapes paper --tune --out "$out"
fi
echo "== results in $out"
exit "$failed"
