# whisper-fast: every step leaves a stamp in .venv, so that a second `make run` or `make test` starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet --no-warn-script-location
PACKAGE := $(shell find whisper_fast pyx src -type f -not -name '*.pyc' -not -name '*.so' -not -path 'pyx/*.c')
BUILD := setup.py pyproject.toml MANIFEST.in
KERNELS = $(patsubst whisper_fast/%.pyi,whisper_fast.%,$(wildcard whisper_fast/_*.pyi))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test soak sanitize bench lint format clean

help:
	@echo 'make run     build, install into $(VENV) and start the server on http://127.0.0.1:8765'
	@echo 'make test    the same with the test dependencies, then the whole suite (ARGS="-k demo" narrows it)'
	@echo 'make soak    the tests that take minutes (ARGS="-k kills" narrows them)'
	@echo 'make sanitize the tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make bench   the benchmarks (ARGS="bench_import.py" narrows them)'
	@echo 'make lint    ruff, mypy --strict, cython-lint, stubtest'
	@echo 'make format  let ruff format and fix what it can'
	@echo 'make clean   remove everything that was built'

run: $(VENV)/installed $(VENV)/with-hnsw
	@$(BIN)/whisper-fast serve $(ARGS)

# From tests/ and without the folder on sys.path: what is tested is the installed package, not the source tree.
test: $(VENV)/installed $(VENV)/with-test $(VENV)/with-hnsw
	@.ci/packages test
	@cd tests && ../$(BIN)/python -P -m pytest $(ARGS)

soak: $(VENV)/installed $(VENV)/with-test
	@cd tests && ../$(BIN)/python -P -m pytest --soak -m 'soak or one_loop' $(ARGS)

# The kernels once more with AddressSanitizer and UndefinedBehaviorSanitizer (gcc), and their tests on that build. Both
# need to be there before Python is. Leaks are not asked for: the interpreter never frees all it has, and freed memory
# is kept apart for a while, so that memory in use says nothing either.
KERNEL_TESTS := test_arena.py test_assembly.py test_batcher.py test_buckets.py test_cache.py test_cache_hostile.py \
	test_cache_load.py test_cache_policy.py test_cache_resize.py test_eager.py test_embedder.py test_fair.py test_interpreter.py \
	test_lexical.py test_metrics.py test_preload.py test_recall.py test_segments.py \
	test_vector.py
sanitize: $(VENV)/installed $(VENV)/with-test
	@CFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer' \
		$(BIN)/python setup.py -q build --build-lib build/sanitized/lib --build-temp build/sanitized/objects
	@cd tests && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		PYTHONPATH=../build/sanitized/lib PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 ../$(BIN)/python -P -m pytest -p no:cacheprovider \
		$(or $(ARGS),$(KERNEL_TESTS) -k 'not nothing_leaks')

bench: $(VENV)/installed $(VENV)/with-test
	@cd benches && ../$(BIN)/python -P -m pytest --benchmark-enable -o python_files='bench_*.py' $(or $(ARGS),.)

lint: $(VENV)/installed $(VENV)/with-test $(VENV)/with-lint
	@echo 'ruff' && $(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@echo 'mypy --strict' && $(BIN)/mypy --no-error-summary
	@echo 'cython-lint' && PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint pyx
	@test -z '$(KERNELS)' || { echo 'stubtest' && $(BIN)/stubtest --mypy-config-file pyproject.toml $(KERNELS); }

format: $(VENV)/with-lint
	@$(BIN)/ruff check --quiet --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info pyx/*.c whisper_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made:
	@.ci/packages build '$(PYTHON)'
	@echo 'making $(VENV)'
	@'$(PYTHON)' -m venv --clear $(VENV) && touch $@

# One list of requirements, that of pyproject.toml: `build`, or the name of an extra.
REQUIREMENTS := import sys, tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb")); \
	lists = {"build": project["build-system"]["requires"], **project["project"]["optional-dependencies"]}; \
	print(*lists[sys.argv[1]], sep="\n")

# hnswlib has no wheels; without a C++ compiler the search stays exact. NO_NATIVE: what is built here may run elsewhere.
$(VENV)/with-hnsw: pyproject.toml $(VENV)/made
	@.ci/packages hnsw
	@echo 'installing hnswlib, for users with very many memories'
	@$(BIN)/python -c '$(REQUIREMENTS)' hnsw > $@.txt
	@HNSWLIB_NO_NATIVE=1 $(PIP) -r $@.txt || echo 'hnswlib cannot be built here: every search is exact'
	@touch $@

$(VENV)/with-%: pyproject.toml $(VENV)/made
	@echo 'installing what is needed to $*'
	@$(BIN)/python -c '$(REQUIREMENTS)' $* > $@.txt && $(PIP) -r $@.txt && touch $@

# Objects of the last build are kept, its copies of sources are not: a file that was removed must not live on in build/.
$(VENV)/installed: $(PACKAGE) $(BUILD) $(VENV)/with-build
	@echo 'building and installing whisper-fast'
	@if [ -d build ]; then find build -type f -not -name '*.o' -not -name '*.so' -delete; fi
	@$(PIP) --no-build-isolation . && touch $@
