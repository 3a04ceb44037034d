# Everything happens in a virtual environment of its own; `make demo` on a bare machine needs Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo install test test-slow test-gpu check format clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[all]'
	touch $@

# From nothing to pictures: engines for this CPU and for RTX cards, and a grid of pictures in build/demo.png.
demo: install
	$(BIN)/sdc export --model tiny --precision int8 --target cpu,rtx --out build/tiny-int8
	$(BIN)/sdc inspect build/tiny-int8
	$(BIN)/python scripts/picture_grid.py build/tiny-int8 --out build/demo.png

# A worker that dies ends the run with the name of its test; if it were replaced, loadfile would wait for ever.
test: install
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --max-worker-restart 0

# Minutes and gigabytes: weights of SD 1.5's size, other architectures, automatic precisions, sanitizers.
test-slow: install
	$(BIN)/pytest -m slow -o faulthandler_timeout=3600

test-gpu: install
	$(BIN)/pytest -m gpu -o faulthandler_timeout=3600

# mypy does not see through the editable install, so it gets a folder in which sdc is what its name says.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/sdc && ln -sfn $(CURDIR)/engines $(CURDIR)/passes $(CURDIR)/compiler build/types/sdc/
	MYPYPATH=build/types $(BIN)/mypy -p sdc.engines -p sdc.passes -p sdc.compiler
	$(BIN)/pytest tests/test_layering.py tests/test_packaging.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
