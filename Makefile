# Two commands on a bare machine with python3 >= 3.11: `make run`, `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
# versions this was tested with; on another Python pip resolves from pyproject.toml
CONSTRAINTS := $(wildcard constraints-$(TAG).txt)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# two processes: tests that share one Ray, and all others; `make test PARALLEL=` runs them in one
PARALLEL ?= -n 2 --dist loadgroup

.PHONY: run test test-all lint bench pretrain clean

run: $(STAMP)
	$(BIN)/sapf run --preset digits --out $(OUT)

test: $(STAMP) lint
	$(BIN)/python -m pytest -q -m "not long" $(PARALLEL)

test-all: $(STAMP) lint
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check sapf_ray jobs tests
	$(BIN)/ruff format --check sapf_ray jobs tests
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m jobs.benchmark --out runs/bench

# weights of the bundled public models, from public glyphs only (about 25 minutes on 2 cores)
pretrain: $(STAMP)
	$(BIN)/python -m jobs.pretrain_public --out sapf_ray/models/bundled
	$(BIN)/python -m jobs.public_features

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
