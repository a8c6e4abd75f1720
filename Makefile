# `make train` trains on the embedded digits; `make test` checks everything that a change must keep.
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch launch/train.py

.PHONY: train mnist test test-all test-slurm clean

train: $(VENV)/.train
	$(LAUNCH) --config configs/digits.yaml

# MNIST with 100 labels, four ways, about 20 minutes each on 2 cores. The images come from IDX=DIR,
# from $SGAN_DATA/mnist, or from the usual download. ARGS go to every run.
mnist: $(VENV)/.train
	$(LAUNCH) --config configs/mnist_supervised.yaml $(SOURCE) $(ARGS)
	$(LAUNCH) --config configs/mnist_book.yaml $(SOURCE) $(ARGS)
	$(LAUNCH) --config configs/mnist_improved_gan.yaml --train.steps=12000 $(SOURCE) $(ARGS)
	$(LAUNCH) --config configs/mnist.yaml $(SOURCE) $(ARGS)

SOURCE := $(if $(IDX),--data.source=idx:$(IDX))

test: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not slurm"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# Jobs on a two-node cluster that is started here; needs root and, on Debian, what .ci/slurm installs.
test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -rs -m slurm tests/slurm

# An installed environment is stamped by the extras it holds, and made again when its list changes.
$(VENV)/.train: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[digits]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[digits,dev]'
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
