# `make train` trains on the embedded digits; `make test` checks everything that a change must keep.
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch launch/train.py
PYTEST := $(BIN)/python -m pytest

.PHONY: train mnist check test test-all test-slurm test-gpu lint clean

# 100 labels of 5,000 digits: the semi-supervised GAN, then the same D on the labels alone.
train: $(VENV)/.train
	$(LAUNCH) --config digits
	$(LAUNCH) --config digits_supervised
	$(BIN)/sgan-dist compare runs/digits runs/digits_supervised

# MNIST with 100 labels, four ways, about 20 minutes each on 2 cores. The images come from IDX=DIR,
# from $SGAN_DATA/mnist, or from the usual download. ARGS go to every run.
mnist: $(VENV)/.train
	$(LAUNCH) --config mnist_supervised $(SOURCE) $(ARGS)
	$(LAUNCH) --config mnist_tutorial $(SOURCE) $(ARGS)
	$(LAUNCH) --config mnist_improved_gan --train.steps=12000 $(SOURCE) $(ARGS)
	$(LAUNCH) --config mnist $(SOURCE) $(ARGS)

SOURCE := $(if $(IDX),--data.source=idx:$(IDX))

# Format, lint, types, import contract, and the tests that start no process: about a minute.
check: lint
	$(PYTEST) -n 2 --dist loadfile -m "not process and not slow and not slurm and not gpu"

# The above and the tests with real processes, but for those that take long.
test: lint
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not slurm and not gpu"

# The rest: longer proofs.
test-all: $(VENV)/.dev
	$(PYTEST) -n 2 --dist loadfile -m slow

# Jobs on a two-node cluster that is started here; needs root and, on Debian, what .ci/slurm installs.
test-slurm: $(VENV)/.dev
	$(PYTEST) -rs -m slurm tests/slurm

# On a machine with a CUDA GPU and a torch with CUDA.
test-gpu: $(VENV)/.dev
	$(PYTEST) -m gpu tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile

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
