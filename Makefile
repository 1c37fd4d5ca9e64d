# Everything this project does, by name. Each target does its own set-up on a machine that has python3, pip and make;
# the second time the set-up costs nothing.

PYTHON ?= python3
VENV   ?= .venv
# make pytest TESTS=tests/unit ARGS="-k retry"   make test WORKERS= (one process: slower, reports tidier)
TESTS  ?= tests
ARGS   ?=
WORKERS ?= 2
ROW    ?=

PY    := $(VENV)/bin/python
READY := $(VENV)/ready
# Peers of the benchmark live in environments of their own: requirements/bench-NAME.txt -> .venvs/bench-NAME
PEERS := $(patsubst requirements/%.txt,.venvs/%/ready,$(wildcard requirements/bench-*.txt))
LOCK   = UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 .tools/bin/uv pip compile --quiet --universal --python-version 3.10 \
         --generate-hashes --no-emit-index-url --no-emit-find-links --no-header

# `make test` checks before it tests, also under `make -j`.
.NOTPARALLEL:
.PHONY: help demo test check pytest test-pythons sim chaos bench format coverage lock setup clean

help: ## what you can ask for (this list)
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-20s %s\n' "$$target" "$$text"; done

demo: $(READY) ## an order workflow whose worker is killed in the middle of a step, and goes on
	$(PY) examples/demo.py

test: check pytest ## everything that must be green: check, then all tests

check: $(READY) ## lint, format, types, and who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/unit/test_layers.py

pytest: $(READY) ## the tests alone; TESTS=, ARGS= and WORKERS= choose
	$(if $(WORKERS),PYTHONHASHSEED=0) $(PY) -m pytest -q $(if $(WORKERS),-n $(WORKERS) --dist worksteal) $(TESTS) $(ARGS)

test-pythons: $(READY) ## the tests on every Python from 3.10 to 3.14 that is found here
	@failed=; passed=; \
	for found in $$(scripts/pythons.sh | tr ' ' =); do \
		echo "== Python $${found%%=*}"; \
		if $(MAKE) --no-print-directory pytest VENV=.venvs/$${found%%=*} PYTHON="$${found#*=}"; \
		then passed="$$passed $${found%%=*}"; else failed="$$failed $${found%%=*}"; fi; \
	done; \
	echo "== passed:$${passed:- none}; failed:$${failed:- none}"; test -z "$$failed" && test -n "$$passed"

sim: $(READY) ## 5,000 simulated universes, or UNIVERSES=, from SEED= on
	$(PY) -W ignore -m perdure sim --seed $(or $(SEED),0) --universes $(or $(UNIVERSES),5000)

chaos: $(READY) ## real faults on every store found, 15 minutes; LONG=1, ONLY=name, STORE=, SEED= choose
	$(PY) -m chaos.run $(if $(LONG),--long) $(addprefix --only ,$(ONLY)) $(if $(STORE),--store $(STORE)) \
		$(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(READY) $(PEERS) ## this engine beside its floors and its peers; ROW=name for one row
	$(PY) bench/run.py $(if $(ROW),--row $(ROW))

format: $(READY) ## lay out the code and mend what the linter can mend
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

coverage: $(READY) ## which lines the tests never reach
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q $(TESTS) $(ARGS)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

lock: $(READY) ## write requirements/*.txt anew from pyproject.toml; UPGRADE=1 takes the newest of everything
	$(LOCK) $(if $(UPGRADE),--upgrade) --group tools -o requirements/tools.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) --group dev --extra cli --extra postgres pyproject.toml -o requirements/dev.txt
	@for peer in $(wildcard requirements/bench-*.in); do $(LOCK) $(if $(UPGRADE),--upgrade) $$peer -o $${peer%.in}.txt; done

setup: $(READY) ## only the set-up

$(READY): requirements/tools.txt requirements/dev.txt pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV) $(PYTHON)

.venvs/bench-%/ready: requirements/bench-%.txt requirements/tools.txt scripts/setup.sh
	@scripts/setup.sh .venvs/bench-$* $(PYTHON) requirements/bench-$*.txt

clean: ## remove what set-up and tests made
	rm -rf .tools .venv .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
