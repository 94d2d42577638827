# `make help` lists what there is. Every target sets itself up in .venv first, with python3 or another:
# `make demo VENV_PYTHON=python3.12`. To use an interpreter that has everything already, and no
# network, name it: `make test PYTHON=python3`. With another torch than constraints.txt has, in an
# environment of its own: `make test TORCH=2.11.0`, the oldest that is supported, which on Linux comes
# with CUDA.
VENV = .venv$(TORCH:%=-torch-%)
VENV_PYTHON ?= python3
PYTHON ?= $(VENV)/bin/python
READY = $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/ready)

.PHONY: help demo test test-tools test-slow test-gpu lint chaos bench bench-gpu bench-7b docs clean

help:   ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

demo: $(READY)   ## the whole recipe on an invented village, judged before and after: 4 to 12 minutes
	$(PYTHON) demo.py

# without the GPU, if there is one: its tensors would meet those that the tests make; in two
# processes, by files, whose fixtures serve many tests
test: lint   ## everything that a user can meet without a GPU, but for tests of minutes
	CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest -q -n 2 --dist loadfile \
	    -m "not gpu and not slow and not tools"

test-tools: $(READY)   ## benchmarks, every kernel compiled for three chips, 19 parsers fuzzed, the exercises
	CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest -q -m "tools and not gpu and not slow"

test-slow: $(READY)   ## 70 B on 512 simulated ranks, another transformers, Inductor
	CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest -q -m "slow and not gpu"

test-gpu: $(READY)   ## what needs one GPU: kernels, attention, a step in which the host never waits
	$(PYTHON) -m pytest -q -m gpu --continue-on-collection-errors

lint: $(READY)   ## ruff
	$(PYTHON) -m ruff format --check -q .
	$(PYTHON) -m ruff check -q .

chaos: $(READY)   ## break runs: kills, full disks, cut cables, hostile files; 15 minutes
	$(PYTHON) -m benchmarks.chaos
	$(PYTHON) -m benchmarks.two_nodes --restarts 1
	$(PYTHON) -m benchmarks.fuzz --seconds 60

bench: $(READY)   ## each kernel beside its peers and the hardware's limit, on what there is
	$(PYTHON) -m kernels.bench

bench-gpu: $(READY)   ## everything to measure on one GPU, under 10 minutes, into benchmarks/h200
	$(PYTHON) -m benchmarks.gpu

bench-7b: $(READY)   ## DPO at 7B beside a control and TRL, on one H200: under 10 minutes
	$(PYTHON) -m benchmarks.dpo_7b

docs: $(READY)   ## code, output and figures in the pages, made anew from the source
	$(PYTHON) docs/include.py
	$(PYTHON) docs/figures.py

clean:   ## remove .venv and runs
	rm -rf .venv .venv-torch-* runs

# torch comes first and alone, so that nothing else picks a different build of it; the interpreter
# of an older torch's Triton needs an older numpy
$(VENV)/ready: setup.py constraints.txt
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "$(VENV_PYTHON) is older than Python 3.11; give a newer one, as in VENV_PYTHON=python3.12")'
	$(VENV_PYTHON) -m venv $(VENV)
	grep -v $(if $(TORCH),'^torch==\|^triton==\|^numpy==','^$$') constraints.txt > $(VENV)/constraints.txt
	$(if $(TORCH),echo 'numpy<2.4' >> $(VENV)/constraints.txt)
	$(VENV)/bin/python -m pip install -q "$(if $(TORCH),torch==$(TORCH),$$(grep '^torch==' constraints.txt))"
	$(VENV)/bin/python -m pip install -q -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@
