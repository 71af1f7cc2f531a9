PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev

# glibc gives freed memory back to the system, and a training step asks for the same blocks again
# at once: at miniature size that costs a quarter of the time. `burnish` sets this itself; here it
# also reaches the processes that tests start.
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 1073741824

.PHONY: demo test pretended browser check format

demo: $(INSTALLED)  ## run the miniature end to end and leave its report
	$(BIN)/burnish run miniature

# Two workers with one thread each: torch takes all cores for every process otherwise.
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: $(INSTALLED_DEV) browser  ## all tests that need no GPU
	$(BIN)/pytest -n 2 --dist worksteal $(TESTS)

# A GPU that is not there, for those who have none and a C++ compiler: it finds what is on the wrong
# device, and how much memory a real one would have to have.
PRETENDED := tests/gpu/pretended
pretended: export OMP_NUM_THREADS := 1
pretended: export MKL_NUM_THREADS := 1
pretended: $(VENV)/pretended.so  ## the tests that need a GPU, on a pretended one
	PYTHONPATH=$(PRETENDED)$${PYTHONPATH:+:$$PYTHONPATH} BURNISH_PRETENDED_GPU=$(abspath $<) $(BIN)/$(or $(RUN),pytest -n 2 tests/gpu)

$(VENV)/pretended.so: $(wildcard $(PRETENDED)/*.cpp $(PRETENDED)/*.h) $(INSTALLED_DEV)
	$(BIN)/python $(PRETENDED)/build.py $@

# The voting page is driven in a real browser, which no Python package brings along.
browser:
	@command -v chromedriver >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && apt-get update -q && apt-get install -qy --no-install-recommends chromium chromium-driver; } \
	  || echo "No chromium and chromedriver: the tests in a browser are skipped. Install both to run them."

check: $(INSTALLED_DEV)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED_DEV)  ## format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# The stamps make the installation run again only when the dependencies changed.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@ $(INSTALLED)
