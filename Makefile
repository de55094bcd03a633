# `make demo` and `make test` are all one needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long torture results families clients setup clean

demo: $(READY)  ## the whole job on the embedded model, and dense tuning beside it: a few minutes on two cores
	@echo "== dense tuning, and UpIT (dense model -> checkpoints -> mixture of experts), for the same number of tokens"
	$(BIN)/upcycle compare "dense: quickstart-dense" "UpIT: quickstart" --seeds 1 --out runs/demo
	$(BIN)/upcycle report runs/demo
	@echo "== the mixture of experts is in runs/demo/1-seed0/posttrain"

test: $(READY)  ## lint, types, tests
	@echo "== ruff, mypy, pytest"
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile
	@echo "== all checks passed"

test-long: $(READY)  ## what takes minutes more: four processes, sharded models
	$(BIN)/pytest -m long

torture: $(READY)  ## 1,000 damaged inputs and 200 kills against whole commands: half an hour; a line of figures each
	cd tests && ../$(BIN)/python fuzzing.py --cases 1000
	cd tests && ../$(BIN)/python torture.py --kills 200

results: $(READY)  ## the tables of docs/results.md from the cells in benchmarks/results
	$(BIN)/python benchmarks/results.py

families: $(READY)  ## the tables of docs/families.md from those in the code
	$(BIN)/python benchmarks/families.py

clients: $(READY)  ## load small MoEs of every family in vLLM, llama.cpp and mistral.rs: half an hour the first time
	@echo "== installing the clients into .clients (once; builds llama.cpp from source)"
	$(BIN)/python tests/clients/setup_clients.py
	@echo "== loading every family in every client"
	$(BIN)/pytest -m clients -s tests/clients

setup: $(READY)

# torch first and pinned: a looser requirement can pull gigabytes of CUDA packages
$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (once; downloads about 500 MB)"
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; give one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) .clients runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
