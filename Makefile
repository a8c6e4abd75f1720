# `make train` trains on the embedded digits; `make test` checks everything that a change must keep.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-all clean

train: $(VENV)/.train
	$(BIN)/accelerate launch launch/train.py --config configs/digits.yaml

test: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

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
