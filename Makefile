# No target needs preparation: each makes its virtual environment, and updates it when the requirements change.
#   make demo       SFT, GDSD, evaluation and export of the tiny model, into runs/demo
#                   make demo FAMILY=sdar   the same in the format of another model family, into runs/demo_sdar
#   make compare    six methods with three seeds each on the tiny model, table and figure into runs/compare
#   make test       the fast tests              make test PYTEST_ARGS=tests/telemetry/test_metrics.py   a part of them
#   make test-slow  the tests that need PyTorch and PEFT, or minutes
#   make test-multi only those slow tests that use meshes of eight devices or jobs of several processes
#   make test-plan  compiles a program of real size for TPUs that this machine lacks; part of test-slow
#   make plan-table the table of docs/pods_plan.md: compiles the rows that its JSON file lacks
#   make lint       ruff; make format rewrites as ruff does; make types checks the types of the public surface
#   make docs       the site in build/docs/index.html, with its notebook executed; a warning is an error
#   make venv-tpu   the environment for TPU hosts (.venv-tpu);  make venv-gpu  the one for NVIDIA GPUs (.venv-gpu)
#   make clean      removes environments and caches, never runs/
# PYTHON=... chooses the interpreter; the default is the first below that is new enough.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
PYTEST_ARGS ?=
FAMILY ?= llada
DEMO_SUFFIX = $(patsubst %,_%,$(filter-out llada,$(FAMILY)))

.PHONY: demo compare test test-slow test-multi test-plan plan-table lint format types docs clean venv venv-tpu venv-gpu

demo: .venv/.installed
	.venv/bin/python -m gdsd_jax.demo --config configs/tiny_sudoku.py:$(FAMILY) --workdir runs/demo$(DEMO_SUFFIX)

compare: .venv/.installed
	.venv/bin/python -m gdsd_jax.compare --config configs/compare_tiny.py --workdir runs/compare --methods gdsd,gdsd_tlc,espo,diffu_grpo,wd1,spg --seeds 3

# Most of the fast tests run a program once or twice, so most of their time is compilation.
test: .venv/.installed
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The tests against recorded numbers of other code run a second time with optimised programs, as users run them.
OPTIMISED = tests/denoiser/test_denoiser.py tests/diffusion/test_scoring.py tests/test_models2_golden.py \
	tests/training/test_update.py

test-slow: .venv-slow/.installed
	.venv-slow/bin/python -m pytest -m "slow and not libtpu" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	.venv-slow/bin/python -m pytest -m "not slow" -n 2 --dist loadfile $(OPTIMISED)
	$(MAKE) test-plan types docs

test-plan: .venv-tpu/.installed
	.venv-tpu/bin/python -m pytest -m libtpu tests/planning/test_plan.py

plan-table: .venv-tpu/.installed
	.venv-tpu/bin/python -m gdsd_jax.planning.pods docs/pods_plan.json docs/pods_plan.md

test-multi: .venv/.installed
	.venv/bin/python -m pytest -m slow tests/runtime/test_multi.py $(PYTEST_ARGS)

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: .venv-docs/.installed
	.venv-docs/bin/python -m mypy

docs: .venv-docs/.installed
	.venv-docs/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

venv: .venv/.installed
venv-tpu: .venv-tpu/.installed
venv-gpu: .venv-gpu/.installed

clean:
	rm -rf .venv .venv-slow .venv-docs .venv-tpu .venv-gpu .jax_cache .pytest_cache .ruff_cache .hypothesis .mypy_cache build *.egg-info docs/notebook.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: requirements.txt
	$(call install,.venv,requirements.txt)

.venv-slow/.installed: requirements.txt requirements-torch.txt requirements-lm-eval.txt
	$(call install,.venv-slow,requirements-torch.txt)

.venv-docs/.installed: requirements.txt requirements-docs.txt
	$(call install,.venv-docs,requirements-docs.txt)

.venv-tpu/.installed: requirements.txt requirements-tpu.txt
	$(call install,.venv-tpu,requirements-tpu.txt)

.venv-gpu/.installed: requirements.txt requirements-gpu.txt
	$(call install,.venv-gpu,requirements-gpu.txt)

# The stamp is written last, so that an interrupted installation starts again. An environment of an older Python is replaced.
define install
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed and none was found: name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v "$(PYTHON)" >/dev/null || { echo "PYTHON=$(PYTHON) is not a program on this machine" >&2; exit 1; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1): name a newer one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(1)/bin/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || "$(PYTHON)" -m venv --clear $(1)
	$(1)/bin/python -m pip install -r $(2)
	@touch $@
endef
