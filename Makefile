# Two commands are enough on a machine with python3 and make:  make demo   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# One torch thread a process: on a small shared machine two often lose to one. Set it to suit yours.
THREADS ?= 1
export OMP_NUM_THREADS = $(THREADS)
# Test processes side by side, for notebooks and for pytest.
JOBS    ?= 2

.PHONY: help install demo test test-without-lavis sync notebooks pytest coverage mutants lock prepare lab browser docs clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/installed   ## .venv with everything in settings.ini

$(VENV)/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,track,faiss]"
	touch $@

demo: install    ## draw a world, train from nothing, print the table, write the report
	$(BIN)/cala-demo $(ARGS)

test: install sync notebooks pytest mutants   ## everything CI runs but the browser

sync: install    ## notebooks, package and README say the same; lock files keep to the ranges
	$(BIN)/python .ci/sync.py
	$(BIN)/python .ci/lock.py --check

notebooks: install   ## every notebook from a fresh kernel; a run that matched nothing fails
	JOBS=$(JOBS) $(BIN)/python .ci/cover.py notebooks > $(VENV)/nbdev_test.log 2>&1 || { cat $(VENV)/nbdev_test.log; exit 1; }
	@cat $(VENV)/nbdev_test.log
	@grep -q "Success." $(VENV)/nbdev_test.log || { echo "nbdev_test matched no notebook"; exit 1; }

pytest: install  ## what notebooks should not hold: commands, parity, crashes, ranks
	PYTHONPATH=.ci:$(PYTHONPATH) $(BIN)/python -m pytest -n $(JOBS) -p cover --cov --cov-append --cov-report=

coverage:        ## what notebooks and tests of the last run left out: files under 80%, and the total
	@$(BIN)/python .ci/cover.py report

mutants: install ## ten lines of losses, ranking and schedule made wrong: do the tests notice?
	$(BIN)/python .ci/mutate.py

lock: install    ## after the tests have passed: exact versions of this environment, for this Python
	$(BIN)/python .ci/lock.py

# The newest Python found. LAVIS stops at 3.11, so this is the project without it, on the newest of everything else.
NEWEST := $(firstword $(foreach v,3.14 3.13 3.12,$(shell python$(v) -c 1 2>/dev/null && command -v python$(v) || ls $(HOME)/.pyenv/versions/$(v).*/bin/python 2>/dev/null | tail -n 1)))
test-without-lavis:  ## notebooks and pytest on the newest Python, in an environment of its own
	@test -n "$(NEWEST)" || { echo "no Python 3.12 or newer found"; exit 1; }
	$(MAKE) PYTHON=$(NEWEST) VENV=.venv-newest notebooks pytest

prepare: install ## after editing a notebook: clean, export, render README
	$(BIN)/python .ci/sync.py --write

lab: install     ## read the notebooks
	$(BIN)/jupyter lab nbs

browser: install ## the tutorials in a real JupyterLab: every cell run, every widget moved, pictures in _browser (NOTEBOOKS="first_run attention_atlas" for some)
	@$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[browser]"
	$(BIN)/python .ci/browser.py $(NOTEBOOKS)

docs: install    ## every notebook as HTML with its outputs, in _docs
	$(BIN)/python .ci/docs.py

clean:           ## remove what the commands made
	rm -rf $(VENV) runs demo _docs _proc _browser
