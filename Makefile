# Every target sets up what it needs (.ci/setup), system packages included, and is quick where that is done.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export PYTHON
# The tests start Python a thousand times: each time it would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
# Most tests wait more than they compute: one at a time more than there are CPUs.
AT_ONCE := -n $(shell expr $$(nproc) + 1)
QUICK := $(AT_ONCE) -m "not vm and not slow"
# The tests of a file share guests, and so does one process. Files in this order: the long ones are not the last.
GUESTS := $(AT_ONCE) --dist loadfile --no-loadscope-reorder -m "vm or slow" \
	$(shell grep -lrE 'mark\.(vm|slow)\b' tests --include='test_*.py' | sort -r)
# What depends on the Python version: asyncio's contract, its loops, anyio. The rest runs on one.
ACROSS := -n $(shell nproc) -m "not vm and not slow and not control" tests/conformance tests/anyio_face \
	tests/aio/test_streams.py tests/aio/test_datagram.py tests/aio/test_cpython.py tests/aio/test_cpython_loop.py \
	tests/aio/test_extension.py tests/aio/test_loop.py tests/aio/test_protocols.py tests/aio/test_shm_loop.py

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 14

.PHONY: setup
setup: ## install everything the other targets need
	@.ci/setup test

.PHONY: demo
demo: ## a server and a client of this host: echo, a file, a table beside TCP
	@.ci/setup demo
	@$(BIN)/shmsock demo

.PHONY: demo-vm
demo-vm: ## the same between two QEMU guests
	@.ci/setup vm
	@$(BIN)/shmsock demo-vm

.PHONY: bench
bench: ## every measure beside TCP and others, into benchmarks/: a quarter of an hour
	@.ci/setup demo
	@.ci/setup venv .venv $(BIN)/python bench
	@mkdir -p benchmarks
	@$(BIN)/shmsock bench --all --marks --json benchmarks/results.json --text benchmarks/results.txt --plot benchmarks/plot.svg

.PHONY: bench-vm
bench-vm: ## two guests: ivshmem, doorbells and dax beside virtio-net, as a page: a quarter of an hour
	@.ci/setup vm
	@.ci/setup venv .venv $(BIN)/python bench
	@mkdir -p build
	@$(BIN)/shmsock bench --vm --all --doorbells --dax --html build/bench-vm.html

.PHONY: instructions
instructions: ## instructions per operation of the core; fails where they have become more
	@.ci/setup bench
	@$(BIN)/python -m shmsock.bench.instructions

.PHONY: test
test: lint ## everything: checks, all Python versions there are, real guests
	@$(BIN)/python -m pytest -q $(QUICK)
	@.ci/both '.ci/matrix $(ACROSS)' '$(BIN)/python -m pytest $(GUESTS)'
	@$(BIN)/python -m release.check tested

.PHONY: scale
scale: setup ## 10,000 connections twenty times in a row, 30,000, and 16 processes with 600 each
	@SHMSOCK_SCALE_ROUNDS=20 $(BIN)/python -m pytest -q -m slow tests/aio/test_scale.py

HOURS := 3
.PHONY: soak
soak: setup ## HOURS=3 of hundreds of connections among processes that die; a report with plots in build/soak
	@.ci/setup venv .venv $(BIN)/python bench
	@$(BIN)/python -m tests.soak --hours $(HOURS) --report build/soak

MINUTES := 10
.PHONY: hostile
hostile: setup ## MINUTES=10 beside a peer that lies in its own section, and 10 beside one that writes everywhere
	@$(BIN)/python -m tests.soak --seconds $$(($(MINUTES) * 60)) --lies own
	@$(BIN)/python -m tests.soak --seconds $$(($(MINUTES) * 60)) --lies everywhere

.PHONY: apps
apps: setup ## libraries and servers as they are: the long forms of their tests, and a table beside TCP
	@SHMSOCK_LONG=1 $(BIN)/python -m pytest -q $(AT_ONCE) tests/integrations tests/forward/test_apps.py
	@$(BIN)/python -m tests.integrations.rates

.PHONY: guests
guests: setup ## the tests in guests at length: pip in one without a network, all of streams over dax, redis-benchmark
	@SHMSOCK_LONG=1 $(BIN)/python -m pytest -q $(GUESTS)

.PHONY: fuzz
fuzz: setup ## the core over memory that lies: so many MILLIONS of calls, by random inputs, and SECONDS by libFuzzer's
	@$(BIN)/python -m tests.native.hostile fuzz $(or $(MILLIONS),100)
	@$(BIN)/python -m tests.native.hostile libfuzzer $(or $(SECONDS),120)

.PHONY: fuzz-coverage
fuzz-coverage: setup ## the lines of the core that the fuzzer does not reach
	@$(BIN)/python -m tests.native.hostile coverage $(or $(MILLIONS),20)

.PHONY: races
races: setup ## the core as threads under ThreadSanitizer, with pauses between any two steps: SECONDS of each kind
	@$(BIN)/python -m tests.native.hostile races $(or $(SECONDS),60)

.PHONY: test-quick
test-quick: setup ## the tests without guests, on one Python
	@$(BIN)/python -m pytest -q $(QUICK)

.PHONY: wheels
wheels: setup ## the sdist, and a wheel for each Python and platform, checked, into dist/: minutes
	@$(BIN)/python -m release.wheels

.PHONY: test-wheels
test-wheels: setup ## install what dist/ has in bare roots, musl's and arm64's too, and in a guest; needs root
	@$(BIN)/python -m release.tried
	@SHMSOCK_LONG=1 $(BIN)/python -m pytest -q $(AT_ONCE) --dist loadfile tests/release tests/vm/test_wheels.py

.PHONY: release
release: ## check that this tree can be released, and build it into dist/; publishes nothing
	@$(BIN)/python -m release.check before
	@$(MAKE) --no-print-directory docs wheels test-wheels
	@$(BIN)/python -m release.check after

.PHONY: lint
lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

.PHONY: check
check: lint ## ruff, mypy, pyright on the public face, and the C core with every compiler's warnings as errors
	@$(BIN)/python -m pytest -q tests/native/test_build.py tests/test_house.py tests/test_types.py

.PHONY: docs
docs: setup ## write the generated parts of the documents, and the site: build/site/index.html
	@$(BIN)/python -m tests.test_docs
	@$(BIN)/python -m tests.commands.test_help
	@$(BIN)/python -m tests.test_site

.PHONY: format
format: setup ## let ruff lay out the Python files
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

.PHONY: clean
clean: ## remove what was built, and the environments
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f shmsock/native/*.so
	find shmsock tests examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
