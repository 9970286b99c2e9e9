# Two commands do everything, on a machine with Python 3.11 or newer, a C compiler and make:
#
#   make evolve   set up, then evolve optimizers on real images (no network needed after set-up)
#   make test     set up, then run all tests; as root on Debian it installs Chromium for some of them
#
# make bench times one update, side by side with torch's optimizers, and measures its memory;
# make fuzz holds 100,000 random optimizers against the definition;
# make gpu runs all that needs a GPU, and says so (exit code 3) where there is none.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# what decides whether the installation is up to date
SOURCES := setup.py pyproject.toml requirements.txt $(wildcard csrc/*) \
	$(wildcard evokernels/compiler/*.py)

.PHONY: setup evolve test browser lint bench fuzz gpu clean

setup: $(VENV)/.done

$(VENV)/.done: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --editable .
	touch $@

evolve: setup
	$(RUN) bench/evolve.py --preset quick

# files side by side, each by one process, which makes its clusters, browsers and libraries once
test: setup lint browser
	$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Chromium, in which tests open reports: nothing to do where it is there already
browser:
	@{ command -v chromium || command -v chromium-browser; } >/dev/null \
		&& command -v chromedriver >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "installing Chromium, in which tests open reports" \
		&& apt-get -qq update >/dev/null \
		&& DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
			chromium chromium-driver fonts-dejavu-core >/dev/null 2>&1; } \
	|| echo "no Chromium: tests that open reports are skipped; install chromium and chromedriver"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	$(RUN) bench/microbench.py --plot bench/results/microbench.png
	$(RUN) bench/memory.py

fuzz: setup
	$(RUN) bench/fuzz.py --count 100000

gpu: setup
	$(RUN) bench/gpu.py

clean:
	rm -rf build *.egg-info evokernels/kernels/libevokernels.so $(VENV)
