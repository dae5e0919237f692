# One command each; the first of them sets up .venv with the exact versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
OUT    ?= bench/results

.PHONY: help setup demo demo-long demo-probes bench-train bench-data bench-pytest test native native-sanitize null-cuda ptxas lint format bench clean

help:
	@echo "make demo       synthesise speech, fit the mixture, pretrain, evaluate, report (3 to 5 minutes)"
	@echo "make demo-long  the same with a training four times as long"
	@echo "make demo-probes  recognition, moods and slots on spoken commands, after make demo (10 minutes)"
	@echo "make test       all tests"
	@echo "make native     builds the native module again"
	@echo "make native-sanitize  its C++ under sanitizers"
	@echo "make null-cuda  what the package does on a GPU, where there is none: tests, host time of a step"
	@echo "make ptxas      registers, spills and shared memory of the CUDA kernels (needs nvcc)"
	@echo "make lint       style and format checks"
	@echo "make bench      measurements beside peers (half an hour or more)"
	@echo "make bench-train  the training step beside the published recipe in plain PyTorch (minutes)"
	@echo "make bench-data   how fast audio is fed, from flac and from a packed corpus (minutes)"
	@echo "make bench-pytest  the ops under pytest-benchmark, printed only"
	@echo "                all of these but bench-pytest, and ptxas and null-cuda, append JSON lines to bench/results,"
	@echo "                which git tracks; to another folder: OUT=folder make bench"
	@echo "make setup      only the virtual environment in $(VENV)"

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "setting up $(VENV) (about 5 GB with PyTorch)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	@$(BIN)/gmm-jepa synthesize --out $(DEMO)/speech
	@$(BIN)/gmm-jepa run --audio $(DEMO)/speech/train.jsonl --heldout-audio $(DEMO)/speech/test.jsonl \
		--out $(DEMO)/run --preset cpu

demo-long: setup
	@$(BIN)/gmm-jepa synthesize --out $(DEMO)/speech
	@$(BIN)/gmm-jepa run --audio $(DEMO)/speech/train.jsonl --heldout-audio $(DEMO)/speech/test.jsonl \
		--out $(DEMO)/run-long --preset cpu-long

# Three downstream tasks of the demo's encoder on commands of its own, each with its controls.
demo-probes: setup
	@test -d $(DEMO)/run/checkpoints || $(MAKE) demo
	@$(BIN)/gmm-jepa synthesize --out $(DEMO)/commands --content commands --minutes 20 --test-minutes 1
	@for task in "asr --label-key transcript" "er" "sf"; do \
		$(BIN)/gmm-jepa probe $$task --upstream $(DEMO)/run --data $(DEMO)/commands/train.jsonl \
			--out $(DEMO)/probes/$${task%% *} || exit 1; \
	done

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# After a change in csrc/.
native: setup
	@GMM_JEPA_NATIVE=1 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -e .

# The C++ alone, under AddressSanitizer and UndefinedBehaviorSanitizer, with every instruction set.
native-sanitize:
	@$(PYTHON) csrc/sanitize/build.py build/sanitize
	@build/sanitize/main

# Tests marked gpu with values from the CPU, but those of what torch compiles and of waits, which would
# see neither (1 minute); then what the host does for a training step of a device that takes no time
# (4 minutes), appended to host_time.jsonl in OUT. See bench/null_cuda.
null-cuda: setup
	@GMM_JEPA_UNPROVEN_KERNELS=1 $(BIN)/python -m bench.null_cuda --values \
		python -m pytest -n 2 -m gpu tests/train tests/ops -k "not compile and not waits"
	@for how in "" "--compile" "--compile --cuda-graphs"; do \
		GMM_JEPA_UNPROVEN_KERNELS=1 $(BIN)/python -m bench.null_cuda \
			python -m bench.host_time $$how --out "$(OUT)" || exit 1; \
	done

# The CUDA kernels for sm_90a, without a GPU; appended to ptxas.jsonl in OUT.
ptxas:
	@$(PYTHON) -m bench.ptxas --out "$(OUT)"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# On one thread of a busy machine: the small shape 3 minutes, em_vs_sklearn 2.5, native 5; of the
# paper's shape 7 of 24 ops took 6 minutes, and the others take longer. On CPUs each op takes about
# --seconds, its check, warm-ups and settling on top, and never less than seven runs of each side.
# Quick: python -m bench.ops --shapes small --out FOLDER
bench: setup
	@$(BIN)/python -m bench.ops --shapes small paper --seconds 1 --out "$(OUT)"
	@$(BIN)/python -m bench.em_vs_sklearn --out "$(OUT)"
	@$(BIN)/python -m bench.native --out "$(OUT)"

bench-train: setup
	@$(BIN)/python -m bench.train --preset cpu --precision fp32 bf16 --out "$(OUT)"
	@$(BIN)/python -m bench.train --preset paper --rows 4 --seconds 4 --precision fp32 bf16 --repeats 7 \
		--out "$(OUT)"

bench-data: setup
	@$(BIN)/python -m bench.feed --out "$(OUT)"

bench-pytest: setup
	@$(BIN)/python -m pytest bench --benchmark-only

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
