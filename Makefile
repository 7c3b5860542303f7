# Works with GNU make 3.81. `make repro PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cpu`
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
STAMP := $(VENV)/.installed
# make 3.81 looks a command up in its own PATH, not in the exported one, unless a shell of another name
# than its default runs it.
SHELL := /bin/bash
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: install git repro test faults families check style bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on PATH, Python 3.11 or newer expected; run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: Python %d.%d found, 3.11 or newer expected; run make PYTHON=python3.12" % v[:2])' || exit 2
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once)"
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

git:
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "error: no .git here, and DVC needs one; git clone the project, or run git init" >&2; exit 2; }

repro: git $(STAMP)
	dvc repro
	@echo "report: $(CURDIR)/data/reports/index.html"

# Two processes of tests, each of one thread. In the order of the files, whose longest are not the last.
test: check
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu"

# Every fault many times, the slow ones too; the table of faults comes last.
faults: $(STAMP)
	python -m pytest tests/faults --faults many -m "not gpu" -q -o faulthandler_timeout=0

# Every model family of transformers through its life in miniature, and the page of what came of it.
families: $(STAMP)
	python -m tests.families.scan --page

check: $(STAMP)
	ruff check .
	ruff format --check .
	pyright
	lint-imports

style: $(STAMP)
	ruff check --fix .
	ruff format .

# About ten minutes on two cores. The files it writes are committed: run it on an idle machine.
bench: $(STAMP)
	python -m benchmarks.capture --quick --results benchmarks/results
	python -m benchmarks.train --quick --results benchmarks/results
	python -m benchmarks.plot
	python -m benchmarks.tables

clean:
	rm -rf build .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info data/work
