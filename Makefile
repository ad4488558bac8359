# make demo    install into .venv, run a small real grid on two cores, print its table
# make test    install if needed, run the tests (no network, no GPU, no account)
# make results regenerate results/ and the verdicts in the READMEs from the committed records
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow results lint format clean

demo: $(INSTALLED)
	$(BIN)/python src/train.py experiment=demo
	$(BIN)/python src/report.py demo
	@echo "Run folders: runs/   the report, its table and curves: reports/demo.html .md .csv .png"

results: $(INSTALLED)
	$(BIN)/python src/report.py --runs results/runs --out results --format md,csv --ran --verdicts README.md results/README.md

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "depthlab needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf .venv runs reports src/*.egg-info
