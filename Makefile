# Two commands are enough on a machine with python3 and make:  make demo   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# PyTorch's threads in each process. On a machine with few cores one thread is often faster than two.
THREADS ?= 1
export OMP_NUM_THREADS = $(THREADS)
# Notebooks, or files of tests, that run side by side.
JOBS    ?= 2

.PHONY: help install hooks demo test test-without-lavis style format types words sync notebooks pytest coverage mutants lock \
        prepare outputs lab browser gpu wheel docs clean

help:            ## print this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/installed   ## make .venv with everything that settings.ini names

$(VENV)/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,track,faiss]"
	touch $@

hooks: install   ## let git merge notebooks cell by cell with nbdev
	git config --local merge.nbdev-merge.name "merge notebooks cell by cell"
	git config --local merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"

demo: install    ## draw a data set, train from nothing, print the table, write the report
	$(BIN)/cala-demo $(ARGS)

test: install style words types sync notebooks pytest mutants   ## everything that CI runs, except the browser

style: install   ## ruff and the rules of CONTRIBUTING.md, on notebooks, plain modules, tests and tools
	$(BIN)/python .ci/style.py

format: install  ## let ruff correct what it can, and lay out notebooks and Python files
	$(BIN)/python .ci/style.py --fix

types: install   ## basedpyright on the package
	$(BIN)/basedpyright --pythonpath $(BIN)/python

words: install   ## words and names that have a better one, in prose and in code
	$(BIN)/python .ci/words.py --strict

sync: install    ## notebooks, package and README.md agree; outputs are of one run; lock files are within the ranges
	$(BIN)/python .ci/sync.py
	$(BIN)/python .ci/outputs.py
	$(BIN)/python .ci/lock.py --check

notebooks: install   ## run every notebook in a new process; fails also if no notebook was found
	JOBS=$(JOBS) $(BIN)/python .ci/cover.py notebooks > $(VENV)/nbdev_test.log 2>&1 || { cat $(VENV)/nbdev_test.log; exit 1; }
	@cat $(VENV)/nbdev_test.log
	@grep -q "Success." $(VENV)/nbdev_test.log || { echo "nbdev_test found no notebook"; exit 1; }

pytest: install  ## what notebooks should not hold: whole commands, parity, crashes, several processes
	PYTHONPATH=.ci:$(PYTHONPATH) $(BIN)/python -m pytest -n $(JOBS) -p cover --cov --cov-append --cov-report=

coverage:        ## what notebooks and tests of the last run left out: files below 80%, and the total
	@$(BIN)/python .ci/cover.py report

mutants: install ## lines of losses, ranking and schedule made wrong: do the tests notice?
	$(BIN)/python .ci/mutate.py

lock: install    ## after the tests have passed: write the exact versions of this environment, for this Python
	$(BIN)/python .ci/lock.py

# The newest Python found. LAVIS stops at 3.11, so this is the project without LAVIS and with the newest versions of everything else.
NEWEST := $(firstword $(foreach v,3.14 3.13 3.12,$(shell python$(v) -c 1 2>/dev/null && command -v python$(v) || ls $(HOME)/.pyenv/versions/$(v).*/bin/python 2>/dev/null | tail -n 1)))
test-without-lavis:  ## notebooks and pytest on the newest Python, in an environment of its own
	@test -n "$(NEWEST)" || { echo "no Python 3.12 or newer found"; exit 1; }
	$(MAKE) PYTHON=$(NEWEST) VENV=.venv-newest notebooks pytest

prepare: install ## after a change of a notebook: clean, export, render README.md
	$(BIN)/python .ci/sync.py --write

outputs: install ## run the notebooks whose outputs are not of one run, and keep the outputs (NOTEBOOKS="nbs/index.ipynb" for some)
	JOBS=$(JOBS) $(BIN)/python .ci/outputs.py --run $(NOTEBOOKS)

lab: install     ## read the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

browser: install ## open the tutorials in a real JupyterLab: run every cell, move every widget, pictures go to _browser (NOTEBOOKS="first_run attention_atlas" for some)
	@$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[browser]"
	$(BIN)/python .ci/browser.py $(NOTEBOOKS)

gpu: install     ## on a machine with a GPU: tests, times and memory beside the limits of the GPU, in 8 minutes (DRY=1: on the CPU, small)
	$(BIN)/python -m cala.scripts.benchmark --gpu $(if $(DRY),--dry) --output $(or $(OUTPUT),gpu)

# Versions of Python in which `make wheel` installs the wheel: one with LAVIS, one without.
PYTHONS ?= 3.10 3.13
wheel: install   ## build sdist and wheel, install the wheel in clean environments, and run the commands there (12 GB; BORROW=1: two minutes)
	$(BIN)/python .ci/wheel.py $(if $(BORROW),--borrow,--python $(PYTHONS)) --output dist

docs: install    ## make the site into _docs: notebooks with their outputs, names, search; nothing is run
	@$(BIN)/python -c "import furo, myst_nb, ziamath" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python .ci/docs.py

clean:           ## remove what the commands made
	rm -rf $(VENV) runs demo _docs jupyter_execute _proc _browser
