# Every target sets itself up in its own virtual environment: `make demo` and `make test` work on a fresh machine.
# No GPU? `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu` saves gigabytes of CUDA.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEMO = gemma-demo-int8-128-256
PROMPT ?= Return the

.PHONY: demo test test-all test-real coverage lint wheel sanitize docs clean

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install -q -c constraints.txt -e ".[all,test]"
	touch $(STAMP)

# The bundled checkpoint to an int8 artifact, its proof, and text.
demo: $(STAMP)
	$(BIN)/gemma-deploy compile build_in/hf_gemma_int8.yaml
	$(BIN)/gemma-deploy parity --backend onnxruntime
	$(BIN)/gemma-deploy run workspace/$(DEMO) -p "$(PROMPT)"

test: $(STAMP)
	$(BIN)/python -m pytest

# Everything that needs no real checkpoint: what `make test` has, and what takes minutes.
test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not real"

# Minutes, and the real Gemma 3 270M (tests say where they look for it).
test-real: $(STAMP)
	$(BIN)/python -m pytest -m "slow or real"

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=85

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel, installed into an environment of its own, compiles, proves and runs the demo there.
wheel: $(STAMP)
	$(BIN)/python scripts/check_wheel.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

# The library of backend.type native under the compiler's sanitizers, a few minutes.
sanitize: $(STAMP)
	$(BIN)/python scripts/sanitize_native.py

# Tables in docs/ that follow from the code.
docs: $(STAMP)
	$(BIN)/python scripts/make_docs.py

clean:
	rm -rf $(VENV) build *.egg-info
