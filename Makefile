# Every target sets up what it needs in $(VENV); nothing else has to be installed first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bits lint bench accelerator coverage clean

demo: $(VENV)/.demo  ## the main job: train a small GPT with AdamW, SOAP and KL-Shampoo
	$(BIN)/python -m examples.train_gpt --optimizers adamw soap klshampoo

test: $(VENV)/.test  ## all tests, two files at a time
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

bits: $(VENV)/.test  ## what must be equal bit by bit, once more, with all math threads
	$(BIN)/python -m pytest -k "bits and not KL" tests/contract tests/parity tests/runtime tests/distributed

lint: $(VENV)/.lint  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench  ## step time of our optimizers and their peers
	$(BIN)/python -m benchmarks.step_time --json runs/step_time.json

accelerator: $(VENV)/.accelerator  ## all that only a GPU can show, in eight minutes
	$(BIN)/python -m benchmarks.accelerator

coverage: $(VENV)/.test  ## tests with line coverage of asteria/
	$(BIN)/python -m pytest --cov=asteria --cov-report=term-missing

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, renewed when the packages it names may have changed.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
