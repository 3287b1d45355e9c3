# Two commands for a fresh machine: `make demo` and `make test`. The environment is .venv in this
# folder, made once and brought up to date when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST_ARGS ?=
COMPAT ?= compat
BROWSER ?= browser
BROWSER_ARGS ?=

ifneq ($(MAKECMDGOALS),clean)
FOUND := $(shell $(PYTHON) -c 'import sys; print("ok" if sys.version_info >= (3, 10) else "Python %d.%d" % sys.version_info[:2])' 2>/dev/null || echo nothing that runs)
ifneq ($(FOUND),ok)
$(error `$(PYTHON)` is $(FOUND); wanted Python 3.10 or later; name one, e.g. `make PYTHON=python3.12`)
endif
endif

.PHONY: demo test compat browser lint notebook screenshots clean
.DELETE_ON_ERROR:

demo: $(VENV)/.notebooks ## train on real data, headless, and leave a page of it
	@$(RUN) notebooks/demo.py

test: $(VENV)/.dev ## install what the tests need and run them
	@$(RUN) -m pytest $(PYTEST_ARGS)

compat: $(VENV)/.dev ## the notebook's tests on Colab's and Kaggle's older Jupyter stacks
	@$(RUN) -m nox -s '$(COMPAT)'

browser: $(VENV)/.dev ## the panel in JupyterLab, Notebook 7 and the classic notebook, in Chromium
	@$(RUN) -m nox -s $(patsubst %,'%',$(BROWSER)) -- $(BROWSER_ARGS)

lint: $(VENV)/.dev ## what CI checks besides the tests
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m pyright --pythonpath $(RUN)

notebook: $(VENV)/.dev ## run NOTEBOOK (left out: the quickstart) again and keep its outputs
	@$(RUN) notebooks/demo.py $(NOTEBOOK) --keep

screenshots: $(VENV)/.dev ## train in JupyterLab and keep the README's pictures of the panel
	@$(RUN) -m notebooks.screenshots

clean:
	rm -rf $(VENV) build dist .nox

# pip says what it is doing: the first time it downloads PyTorch, some gigabytes.
$(VENV)/.notebooks $(VENV)/.dev: $(VENV)/.%: pyproject.toml
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -e '.[$*]'
	@touch $@
