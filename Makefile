# `make demo` and `make test` are all one needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo notebook test test-long torture results families clients docs release-check lock setup clean

demo: $(READY)  ## the whole job on the embedded model, and dense tuning beside it: a few minutes on two cores
	@echo "== dense tuning, and UpIT (dense model -> checkpoints -> mixture of experts), for the same number of tokens"
	$(BIN)/upcycle compare "dense: quickstart-dense" "UpIT: quickstart" --seeds 1 --out runs/demo
	$(BIN)/upcycle report runs/demo
	@echo "== the mixture of experts is in runs/demo/1-seed0/posttrain"

notebook: $(READY)  ## docs/notebook.ipynb from top to bottom: a minute or two; with its pictures in runs/notebook.ipynb
	mkdir -p runs
	$(BIN)/jupyter execute --output ../runs/notebook.ipynb docs/notebook.ipynb
	@echo "== executed; the run is in docs/runs/notebook, the notebook with its output in runs/notebook.ipynb"

test: $(READY)  ## lint, types, tests
	@echo "== ruff, mypy, pytest"
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
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

# the reference is made from the code, which needs these packages and no torch
docs: .venv-docs/.ready  ## the documentation site, in site/; fails on a broken link
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "== the site is in site/; .venv-docs/bin/mkdocs serve shows it while you write"

.venv-docs/.ready: constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --constraint constraints.txt mkdocs-material numpy pydantic pyyaml rich typer xxhash
	@touch .venv-docs/.ready

# uv leaves torch out, whose build depends on the machine; the first lines, which say how to use the file, stay
lock: $(READY)  ## requirements.lock: every runtime dependency with its hashes
	$(BIN)/pip install --quiet uv
	echo torch >.lock-excludes
	(grep '^#' requirements.lock; $(BIN)/uv pip compile pyproject.toml --constraint constraints.txt --excludes .lock-excludes --quiet \
	    --generate-hashes --python-version 3.11 --python-platform linux --no-annotate --no-header) >.lock-new
	mv .lock-new requirements.lock
	rm .lock-excludes

# pip takes torch and the rest from its cache where it has them
release-check:  ## wheel and sdist, and a run of the wheel in a fresh environment: a few minutes
	@echo "== building"
	rm -rf dist .release
	$(PYTHON) -m venv .release/build
	.release/build/bin/pip install --quiet --constraint constraints.txt hatchling
	.release/build/bin/hatchling build
	@echo "== the sdist builds the same wheel"
	mkdir .release/sdist
	tar -xzf dist/*.tar.gz --strip-components 1 -C .release/sdist
	cd .release/sdist && ../build/bin/hatchling build -t wheel
	cmp dist/*.whl .release/sdist/dist/*.whl
	@echo "== installing the wheel into a fresh environment"
	$(PYTHON) -m venv .release/venv
	.release/venv/bin/pip install --quiet torch==2.13.0
	.release/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	.release/venv/bin/pip check
	@echo "== running it away from the checkout"
	cd .release && venv/bin/upcycle --help >help.txt && venv/bin/upcycle --version
	cd .release && venv/bin/upcycle run quickstart --run runs/small data.fraction=0.1 evaluate.models=ends evaluate.max_generated=20
	cd .release && venv/bin/upcycle export runs/small --to moe && venv/bin/upcycle report runs/small
	cd .release && venv/bin/python -c "from transformers import AutoModelForCausalLM as M; print(type(M.from_pretrained('moe')).__name__)"
	@echo "== ready: $$(ls dist)"

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
	rm -rf $(VENV) .venv-docs .release .clients site runs docs/runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
