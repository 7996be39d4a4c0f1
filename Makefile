# From a fresh Linux machine with Python >= 3.11: `make bench` measures, `make test` checks. Both set .venv up first.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: bench bench-gpu bench-thesis sanitize test test-slow test-gpu lint clean help

help:
	@echo "make bench      measure the shipped model before and after: report.json, report.md"
	@echo "make bench-gpu  every kernel benchmark that needs a CUDA device, about 20 minutes: benchmarks/results"
	@echo "make bench-thesis  the thesis on the shipped model, and on SPARSIFY_SMOLLM2 if set: minutes on a GPU, hours without"
	@echo "make sanitize   compute-sanitizer over a small suite of the kernel tests, on a CUDA device"
	@echo "make test       the tests that need neither a GPU nor minutes"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove the environment and what was built"

bench: $(READY)
	@$(BIN)/sparsify bench

bench-gpu: $(READY)
	@$(BIN)/python -m benchmarks.run cuda
	@$(BIN)/python -m benchmarks.crossover
	@$(BIN)/python -m benchmarks.graphs
	@$(BIN)/python -m benchmarks.small_grids
	@$(BIN)/python -m benchmarks.profile_call

bench-thesis: $(READY)
	@$(BIN)/python -m benchmarks.thesis all
	@if [ -n "$$SPARSIFY_SMOLLM2" ]; then $(BIN)/python -m benchmarks.thesis all --model "$$SPARSIFY_SMOLLM2"; fi

sanitize: $(READY)
	@$(BIN)/python -m benchmarks.sanitize

test: $(READY)
	@$(BIN)/python -m pytest -q

test-slow: $(READY)
	@$(BIN)/python -m pytest -q -m slow

test-gpu: $(READY)
	@$(BIN)/python -m pytest -q -m gpu

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

$(READY): pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
