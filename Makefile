PYTHON ?= python
# this checkout, whatever is installed
export PYTHONPATH := src:.

.PHONY: fix check test docs oldest golden mutations

fix:  ## format and fix what can be fixed
	$(PYTHON) -m ruff format src tests benchmarks docs examples
	$(PYTHON) -m ruff check --fix src tests benchmarks docs examples

check:  ## what CI runs before the tests
	$(PYTHON) -m ruff format --check src tests benchmarks docs examples
	$(PYTHON) -m ruff check src tests benchmarks docs examples
	$(PYTHON) -m mypy

test:  ## the whole suite
	$(PYTHON) -m pytest

docs:  ## the site, in build/site; a warning is an error (pip install -e '.[docs]')
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

oldest:  ## the whole suite on the lowest versions that pyproject.toml allows, in an environment of its own (build/oldest)
	$(PYTHON) -m venv --clear build/oldest
	$(PYTHON) tests/oldest.py > build/oldest.txt
	build/oldest/bin/python -m pip install --upgrade pip
	build/oldest/bin/python -m pip install -r build/oldest.txt
	build/oldest/bin/python -m pip install --no-deps -e .
	build/oldest/bin/python -m pytest -o filterwarnings=default  # what old packages warn of newer ones is not ours

golden:  ## rewrite the golden steps and corruptions, and show what changed
	$(PYTHON) -m tests.golden_steps --write
	$(PYTHON) -m tests.golden_corruptions --write
	git --no-pager diff --stat -- tests/golden

mutations:  ## mutate the code, one mutation at a time: each must make its test fail
	$(PYTHON) -m tests.mutate
