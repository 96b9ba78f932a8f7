# make train   train the default agent, show what steering it does, and write a playground
# make test    lint, import rules, structure, types and tests with coverage: what CI runs
# make lowest  tests with every dependency at its lower bound
# make audit   known vulnerabilities of the installed dependencies
# make bench   how fast it is here, as ratios
# make peers   how fast PPO trains next to SB3's and to rejax (JAX), which get an environment of their own
# make third-party   other people's environments, in an environment of their own (15 minutes)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lowest audit bench peers third-party clean

train: .venv/.installed
	$(BIN)/python train.py

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/structure.py
	$(BIN)/mypy
	$(BIN)/python -m pytest --cov --numprocesses 2 --dist loadfile

lowest: .venv/.installed-dev
	$(BIN)/python benchmarks/lowest.py

audit: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable --progress-spinner off

bench: .venv/.installed
	$(BIN)/python benchmarks/speed.py

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

peers: .venv/.installed .venv-peers/.installed
	$(BIN)/python benchmarks/peers.py

# jax, rejax and navix alone: what is ours runs in .venv, where everyone has it
.venv-peers/.installed: benchmarks/peers.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $< \
		&& touch $@ || echo "the peers cannot be installed here"

third-party: .venv-third-party/.installed
	.venv-third-party/bin/python benchmarks/third_party.py

.venv-third-party/.installed: pyproject.toml benchmarks/third_party.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	sed 's/ *#.*//' benchmarks/third_party.txt | grep . | while read -r package; do \
		$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$$package" < /dev/null \
			|| echo "cannot be installed here: $$package"; \
	done
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-peers .venv-third-party build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
