# The commands of this project. ARGS passes on what follows: make train ARGS="steps=20"
MAKEFLAGS += --silent --no-print-directory
SHELL := bash
BIN := .venv/bin
ARGS ?=
# All pages anew, for a page that has not changed is not looked at; a warning is an error.
SITE = $(BIN)/python -m sphinx -c docs -d build/doctrees -E -q -n -W --keep-going . site
# Two processes, whole files each; ARGS="-n 0" gives one, for a debugger.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export PYTHON

.PHONY: help train env check test test-faults mutants lint format docs records audit clean
help:
	echo "make train   the shop experiment, on this machine's CPU    ARGS=\"steps=20\" passes options on"
	echo "make env     what is installed, and what this machine has"
	echo "make check   what a change must pass before it is sent: lint, types, pages, all tests without a run, one run with faults"
	echo "make test    all tests but the slow and GPU ones            ARGS=\"-k packing\""
	echo "make test-faults  what is killed, hung, damaged, repeated     ARGS=\"-k ledger\""
	echo "make mutants  are small faults in the core noticed?            ARGS=\"count=50 area=ledger\""
	echo "make lint    formatting, lint, types, import rules, and that the docs site builds"
	echo "make format  rewrite the code the way make lint wants it"
	echo "make docs    the pages as a site, in site/; a broken link fails"
	echo "make records what is written from the code, written anew: defaults, settings, memory of real sizes, recipes, pictures"
	echo "make audit   is anything known against the pinned packages (asks an advisory service)"
	echo "make clean   remove caches and builds (runs/ and .venv stay)"

train:
	scripts/install.sh runtime
	$(BIN)/opd train experiment=shop $(ARGS)

env:
	scripts/install.sh runtime
	$(BIN)/opd env $(ARGS)

# The folders without a whole run, and the one run of the others that is marked `campaign`.
check: lint
	$(PYTEST) -m "not slow and not gpu and not faults or campaign" tests/unit tests/conf tests/contract \
		tests/integration/faults/test_faults.py $(ARGS)

test:
	scripts/install.sh dev
	$(PYTEST) --durations 25 --durations-min 5 $(ARGS)

test-faults:
	scripts/install.sh dev
	$(PYTEST) -m faults $(ARGS)

# Not part of .ci/run: some ten seconds for each of 200 faults.
mutants:
	scripts/install.sh dev
	$(BIN)/python -m tests.mutants $(ARGS)

# All five always run, so that one call shows all there is to mend.
lint:
	scripts/install.sh dev
	failed=0; \
	$(BIN)/ruff format --check --output-format concise . || failed=1; \
	$(BIN)/ruff check --output-format concise . || failed=1; \
	$(BIN)/basedpyright --level error || failed=1; \
	$(BIN)/lint-imports --no-cache --no-logo || failed=1; \
	$(SITE) || failed=1; \
	exit $$failed

format:
	scripts/install.sh dev
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

docs:
	scripts/install.sh dev
	$(SITE)
	echo "site/index.html"

records:
	scripts/install.sh dev
	$(BIN)/python -m tests.records

# An environment of its own: what it needs is no part of the product.
audit:
	$(or $(PYTHON),python3.11) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/audit.lock
	build/audit/bin/python scripts/audit.py $(ARGS)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
