VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# Tests run side by side, each with one thread: together they are faster than one after another with two.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS)

.PHONY: train test kernels emulate lint types mutants kernel-mutants peers gpu clean

train: $(VENV)/installed  ## Train a small detector on composed digits; pictures and metrics go to runs/train.
	$(RUN) examples/train.py $(ARGS)

test: $(VENV)/installed  ## Run the tests on the eager backend.
	$(PYTEST) --ignore tests/kernels --ignore tests/emulator $(ARGS)

kernels: $(VENV)/installed  ## Run the Triton kernels in the interpreter, and compile them ahead of time.
	TRITON_INTERPRET=1 TRITON_YOLO_BACKEND=triton HYPOTHESIS_PROFILE=interpreter $(PYTEST) \
		--ignore tests/kernels/test_compile.py --ignore tests/kernels/test_launching.py \
		tests/test_stages.py tests/test_assigners.py tests/test_losses.py tests/kernels $(ARGS)
	$(PYTEST) tests/kernels/test_compile.py tests/kernels/test_launching.py tests/emulator $(ARGS)

TARGET ?= cuda:90
emulate: $(VENV)/installed  ## Run the property tests on what Triton compiles for TARGET, in an emulator of its PTX; not in CI.
	EMULATE=$(TARGET) TRITON_YOLO_BACKEND=triton HYPOTHESIS_PROFILE=emulator $(PYTEST) \
		-k "not five_thousand and not infeasible_anchors_may_win" tests/test_stages.py tests/test_assigners.py tests/test_losses.py $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/installed
	$(RUN) -m mypy

mutants: $(VENV)/installed  ## Plant mistakes and see the tests fail.
	$(PYTEST) -m mutants tests/test_mutants.py $(ARGS)

kernel-mutants: $(VENV)/installed  ## The same for the kernels, in Triton's interpreter; not in CI.
	TRITON_INTERPRET=1 TRITON_YOLO_BACKEND=triton HYPOTHESIS_PROFILE=interpreter $(PYTEST) -m mutants tests/kernels/test_mutants.py $(ARGS)

peers: $(VENV)/installed  ## Compare with other projects' losses as black boxes.
	$(RUN) -m pip install --quiet --no-deps -c constraints.txt -r tests/peers.txt
	$(RUN) -m pytest -m peers $(ARGS)

OUT ?= runs/gpu
gpu:  ## On a machine with a CUDA GPU, with a Python that has torch, triton and the extras test, examples and bench; ARGS=--rehearse without one.
	$(PYTHON) -m bench gpu --out $(OUT) $(ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[test,examples,bench]" ruff mypy
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
