# Everything runs from .venv, which is made once and again when pyproject.toml or constraints.txt change.
# Nothing needs to be activated.
#
#   make demo [IMAGES=DIR]    a messy pool of pictures -> curated shards -> backbone -> numbers -> one page
#   make install              .venv alone; PYTHON=python3.12 makes it with another interpreter (3.11 to 3.13)
#   make test                 all quick tests, 15 minutes at most on 2 cores; make test-long has the others
#   make test-slurm           the longer tests on a real SLURM, which the tests install (as root) and start
#   make bench [PEER=PYTHON]  training step, data and start against a plain form, and lightly-train where PEER has it,
#                             to docs/benchmarks/speed.md
#   make bench-curation       speed and recall of curation's engines, to docs/benchmarks/curation.md; an hour
#   make bench-evals          speed and memory of evaluation's, to docs/benchmarks/evals.md; a few minutes
#   make bench-training       our training against lightly-train's DINOv2, to docs/benchmarks/training.json; DATA= a
#                             folder with train/ and val/, LIGHTLY= the Python of an environment with lightly-train
#                             (without it ours alone); 20 CPU minutes a run, three seeds
#   make lint types contract  ruff, pyright, import-linter;  make format mends what ruff can
#   make gpu                  tests marked gpu, and the demo with its training on the GPU; GPU_PYTHON=python3
#                             takes an interpreter that already holds a CUDA torch and the dependencies

PYTHON ?= python3
GPU_PYTHON ?= .venv/bin/python
# one's own pictures get a folder of their own: a folder belongs to its settings
OUTPUT ?= $(if $(IMAGES),demo-output-$(notdir $(abspath $(IMAGES:~/%=$(HOME)/%))),demo-output)
quoted = '$(subst ','\'',$(1))'
PIP = .venv/bin/python -m pip --disable-pip-version-check install --use-pep517 --constraint constraints.txt

# pyright and its node come in wheels; without this it would ask a registry whether there is a newer one
export PYRIGHT_PYTHON_IGNORE_WARNINGS = on

.DEFAULT_GOAL := help
.PHONY: bench bench-curation bench-evals bench-training help install demo test test-long test-slurm lint format types contract gpu clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 to 3.13, or name one: make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "$$($(PYTHON) --version) does not serve: Python 3.11 to 3.13 is needed; name one: make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: install its venv package (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "Installing torch, then the rest; this takes a few minutes the first time."
	$(PIP) torch torchvision
	$(PIP) --quiet --editable '.[cpu,demo]'
	@touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) --quiet --editable '.[cpu,demo,test]'
	@touch $@

demo: .venv/.installed
	.venv/bin/python -m demo output=$(call quoted,$(OUTPUT)) $(if $(IMAGES),images=$(call quoted,$(IMAGES:~/%=$(HOME)/%)))

test: .venv/.installed-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -m 'not gpu and not long and not slurm' -n 2 --no-loadscope-reorder

test-long: .venv/.installed-test
	.venv/bin/python -m pytest -q -m 'long and not gpu'

test-slurm: .venv/.installed-test
	.venv/bin/python -m pytest -q -m slurm

bench: .venv/.installed-test
	PEER=$(call quoted,$(PEER)) .venv/bin/python -m tests.benchmarks.speed
	.venv/bin/python -m tests.benchmarks.readme

bench-curation: .venv/.installed-test
	.venv/bin/python -m tests.benchmarks.curation

bench-evals: .venv/.installed-test
	.venv/bin/python -m tests.benchmarks.evals

bench-training: .venv/.installed-test
	.venv/bin/python -m tests.benchmarks.contest data=$(call quoted,$(DATA)) output=contest-output $(if $(LIGHTLY),lightly=$(call quoted,$(LIGHTLY)))

lint: .venv/.installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format: .venv/.installed-test
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

types: .venv/.installed-test
	.venv/bin/pyright --pythonpath .venv/bin/python

contract: .venv/.installed-test
	.venv/bin/lint-imports

# only the default interpreter is ours to install into
gpu: $(if $(filter .venv/bin/python,$(GPU_PYTHON)),.venv/.installed-test)
	$(GPU_PYTHON) -m pytest -q -m gpu
	$(GPU_PYTHON) -m demo output=gpu-output

clean:
	rm -rf .venv demo-output* gpu-output contest-output .pytest_cache .ruff_cache .import_linter_cache .hypothesis
