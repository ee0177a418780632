# Each target makes its own virtual environment in .venv/ on the first run and reuses it afterwards.
#
#   make demo       a real model answers, with joules beside each answer (ARGS="--max-tokens 64 --serve 60")
#   make test       everything that a machine without an accelerator can run (ARGS="tests/telemetry -k spans")
#   make check      lint, format, types, house plan and unit tests, without torch; under three minutes
#   make test-all   also slow tests, the second versions of our dependencies, and the benches
#   make accuracy   how right a request's joules are, on simulated servers
#   make accuracy-peers  the same of Zeus and CodeCarbon by their own code, with a picture
#   make format     let ruff write

.PHONY: demo test check test-all test-slow test-second bench accuracy accuracy-peers bench-vllm format docs clean

ARGS ?=
# The pure rooms: no engine, no real model, no server.
UNIT = --ignore=tests/instrumentation --ignore=tests/e2e --ignore=tests/faults

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

demo:
	@scripts/venv demo torch
	@.venv/demo/bin/melodi-otel demo $(ARGS)

test:
	@scripts/system-programs
	@scripts/venv test torch
	@scripts/venv peers torch
	@scripts/venv operate
	@scripts/venv vllm torch
	@.venv/test/bin/python -m pytest -m "not slow and not gpu" $(ARGS)

check:
	@scripts/venv check
	.venv/check/bin/ruff check .
	.venv/check/bin/ruff format --check .
	.venv/check/bin/pyright --pythonpath .venv/check/bin/python
	.venv/check/bin/python -m pytest -q $(UNIT) -m "not e2e and not slow and not gpu"

test-all: test test-slow test-second bench bench-vllm

test-slow:
	@scripts/system-programs chromium
	@scripts/venv test torch
	@.venv/test/bin/python -m pytest -m "slow and not gpu"; status=$$?; [ $$status = 0 ] || [ $$status = 5 ]

test-second:
	@scripts/venv second torch
	@.venv/second/bin/python -m pytest -m "not slow and not gpu" --ignore=tests/e2e/with_vllm
	@scripts/venv test torch
	@scripts/venv vllm-second torch
	@MELODI_VLLM_PYTHON=$(CURDIR)/.venv/vllm-second/bin/python \
		.venv/test/bin/python -m pytest -m "not slow and not gpu" tests/e2e/with_vllm

bench: accuracy accuracy-peers
	@scripts/venv test torch
	.venv/test/bin/python bench/cost.py
	.venv/test/bin/python bench/vllm.py hook
	@# 2: there is no GPU here to calibrate, which it says
	.venv/test/bin/python bench/calibrate_gpu.py || [ $$? = 2 ]

accuracy:
	@scripts/venv check
	.venv/check/bin/python bench/accuracy.py --out bench/results/accuracy

accuracy-peers:
	@scripts/venv rivals
	.venv/rivals/bin/python bench/peers.py --out bench/results/accuracy --picture docs/accuracy_peers.png

bench-vllm:
	@scripts/venv test torch
	@scripts/venv vllm torch
	.venv/test/bin/python bench/vllm.py serve

format:
	@scripts/venv check
	.venv/check/bin/ruff check --fix .
	.venv/check/bin/ruff format .

docs:
	@scripts/venv docs
	.venv/docs/bin/mkdocs build --strict

clean:
	rm -rf .venv/demo .venv/test .venv/check .venv/second .venv/peers .venv/operate .venv/docs .venv/vllm .venv/vllm-second .venv/rivals site dist
