# Every target sets up .venv by itself and does nothing twice.
#
#     make demo           a five-shot story with the built-in model: out/lantern.mp4, out/lantern.png
#     make serve          the director's console in the browser, with the built-in model
#     make test           the tests                                    (make test ARGS="-k session")
#     make test-slow      the long ones: many kills, fuzzing, whole recipes
#     make check          ruff and mypy
#     make train-smoke    the whole training recipe at a tiny size, in runs/smoke
#
# make PYTHON=/path/to/python3 chooses the Python (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow check train-smoke

help:
	@sed -n '3,10s/^# *//p' Makefile

demo: $(VENV)/installed
	@mkdir -p out
	$(BIN)/shotstream generate examples/lantern.yaml -o out/lantern.mp4 --sheet out/lantern.png
	@echo "video: $(CURDIR)/out/lantern.mp4"
	@echo "sheet: $(CURDIR)/out/lantern.png"

serve: $(VENV)/installed
	$(BIN)/shotstream serve $(ARGS)

# One thread: the networks of the tests are tiny, and more would only wait for each other.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test: $(VENV)/installed-test $(VENV)/browser
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/installed-test $(VENV)/browser
	$(PYTEST) -m slow $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/mypy

train-smoke: $(VENV)/installed
	$(BIN)/shotstream train all --preset storybook-smoke --out runs/smoke

# Set-up. A stamp is written when a step has succeeded, and is older than what it depends on when it must be repeated.

$(VENV)/created:
	@for python in $(PYTHONS); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$($$python -V)"; \
			$$python -m venv $(VENV) && touch $@; \
			exit $$?; \
		fi; \
	done; \
	echo "shotstream needs Python 3.11 or newer, and none of these is: $(PYTHONS)." >&2; \
	echo "Install one (https://www.python.org/downloads), or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	@echo "Installing into $(VENV). To download: about 0.3 GB with the CPU build of torch, up to 3 GB on Linux with"
	@echo "the CUDA build. To get the CPU build, stop and start again with"
	@echo "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make ..."
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV). To download: about 30 MB."
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

# The console's tests drive a real browser: $CHROMIUM, one on the PATH, the system's package, or Playwright's own.
# Without any they are skipped, except in continuous integration (CI=true), where they fail.
$(VENV)/browser: $(VENV)/installed-test
	@if command -v $${CHROMIUM:-chromium} chromium google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium for the console's tests (about 100 MB)."; \
		apt-get update -q && apt-get install -y -q --no-install-recommends chromium; \
	else $(BIN)/python -m playwright install chromium || echo "no browser: the console's tests will be skipped"; fi
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	@echo "Installing what the checks need into $(VENV). To download: about 30 MB."
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
