# make demo: environment, three minutes of training, scores, report.  make test: all tests, from nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test ecosystem notebooks docs docs-test links check soak bench gpu clean

# torch first and alone: asked for together with other packages, pip may choose a build with CUDA.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[study,cpu-fast,serve,dev]'
	touch $@

demo: .venv/installed
	$(BIN)/resnet-bk train --config configs/demo.yaml --resume true

# Triton needs no GPU to be tested: its interpreter runs the kernels on the CPU, its compiler compiles them for a card
# that is not there.
.venv/triton: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]'
	touch $@

test: .venv/triton
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Examples with trainers and tools of others.
.venv/ecosystem: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ecosystem]'
	touch $@

ecosystem: .venv/ecosystem
	$(BIN)/python -m pytest -m ecosystem tests/ecosystem

# Runs the notebooks in full and writes them with their outputs.
notebooks: .venv/ecosystem
	$(BIN)/jupytext --to ipynb notebooks/*.py
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# The site, docs/_build/html/index.html, without a warning; then every code block of its pages.
docs: .venv/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	$(MAKE) docs-test

docs-test: .venv/docs
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m docs tests/docs

# Links to other sites; needs a network.
links: .venv/docs
	$(BIN)/sphinx-build --quiet --builder linkcheck docs docs/_build/links

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_model.py -k import

soak: .venv/installed
	mkdir -p runs
	RESNET_BK_SOAK_TABLE=$${RESNET_BK_SOAK_TABLE:-runs/soak.md} $(BIN)/python -m pytest -m soak

bench: .venv/installed
	cd benchmarks && for name in ops decode mixers energies recall memory learning tinyshakespeare multiscale length depth sparsity experts together fronts peers; do ../$(BIN)/python $$name.py || exit; done

# All of it on one GPU, ten minutes, in the environment at hand: PYTHON is used as it is where it has torch and
# transformers, so that the torch that fits the card stays. Elsewhere in the environment of `make demo`.
gpu:
	@python=$$($(PYTHON) -c 'import sys, torch, transformers, safetensors, yaml; print(sys.executable)' 2>/dev/null) || \
	{ $(MAKE) .venv/installed && python=$(CURDIR)/$(BIN)/python; } && \
	cd benchmarks && PYTHONPATH=$(CURDIR)/src $$python gpu.py --out ../runs/gpu.md

clean:
	rm -rf .venv
