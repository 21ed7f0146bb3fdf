# setup: a virtual environment in .venv    demo: a coordinator and three hospitals on this machine
# test: the tests    check: format, lint, types, tests    bench: the benchmarks, each against its target
# bench-faults: the fault table against real processes (20 minutes)    soak: 200 rounds under kills and partitions (long)
# wheels: a folder to install from without a network, with the digest of each file
PYTHON ?= python3
BIN := .venv/bin

# the tests of real processes measure time and use all cores themselves: one after the other
unit = $(BIN)/python -m pytest -m "not process" -n auto --dist loadfile
processes = $(BIN)/python -m pytest -m process -n 2 --dist loadfile

.PHONY: setup demo test check bench bench-faults soak wheels clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/fedsim demo

# small networks; more threads only get in each other's way
test check: export OMP_NUM_THREADS ?= 1

test: setup
	$(unit)
	$(processes)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(unit)
	$(processes)

bench: setup
	$(BIN)/python -m simulations.bench.pipeline
	$(BIN)/python -m simulations.bench.plan
	$(BIN)/python -m simulations.bench.overhead
	$(BIN)/python -m simulations.bench.server_memory
	$(BIN)/python -m simulations.bench.robust_memory
	$(BIN)/python -m simulations.bench.secagg
	$(BIN)/python -m simulations.bench.deployed_round
	$(BIN)/python -m simulations.bench.gate
	$(BIN)/python -m simulations.bench.audit
	$(BIN)/python -m simulations.bench.predict
	$(BIN)/python -m simulations.bench.drift

bench-faults: setup
	$(BIN)/python -m simulations.bench.faults

soak: setup
	$(BIN)/python -m simulations.bench.soak --sites 8 --rounds 200

wheels: setup
	PYTHON=$(BIN)/python deploy/wheels.sh wheels

clean:
	rm -rf .venv build *.egg-info
