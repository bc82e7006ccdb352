# The README's commands. PYTHON is the interpreter that creates .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# test files run at the same time, as many as there are processors
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all test-cpus lint format docs

$(VENV)/.installed: requirements.txt setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(PY) cifar10/trainer.py --dataset digits --save-dir runs/demo --resume auto
	$(PY) cifar10/eval.py runs/demo

test: $(VENV)/.installed
	$(PY) -m pytest -q $(WORKERS)

test-all: $(VENV)/.installed
	$(PY) -m pytest -q $(WORKERS) -m "slow or not slow"

# the quick tests as several processors would run them; hours of one core, run it once before a release
test-cpus: $(VENV)/.installed
	$(PY) tests/cpus.py

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed
	$(PY) -m zensical build --strict -f docs-src/mkdocs.yml
	@echo "built: docs-src/site/index.html; to use its search: $(PY) -m http.server -d docs-src/site"
