VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# What pip installs exactly; `make CONSTRAINTS= VENV=.venv-new` takes the newest releases that the project allows.
CONSTRAINTS ?= constraints.txt
# Which build of PyTorch: the package index's, on Linux with 4 GB of CUDA, or e.g. TORCH=cpu, a folder of PyTorch's own index.
TORCH ?=
INDEX := $(TORCH:%=--extra-index-url https://download.pytorch.org/whl/%)
# Tests run side by side, each with one thread: together they are faster than one after another with two.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal

.PHONY: train predict test kernels interpreted compiled emulate lint types docs mutants kernel-mutants peers matrix dist gpu clean

train: $(VENV)/installed  ## Train a small detector on composed digits, or ARGS="--data ..."; weights, pictures and metrics go to runs/train.
	$(RUN) examples/train.py $(ARGS)

predict: $(VENV)/installed  ## Find what it learned in photos, ARGS="photo.jpg ..."; drawings go to runs/predict.
	$(RUN) examples/predict.py $(ARGS)

test: $(VENV)/installed  ## Run the tests on the eager backend.
	$(PYTEST) --ignore tests/kernels --ignore tests/emulator $(ARGS)

kernels: interpreted compiled  ## Run the Triton kernels without a GPU.

interpreted: $(VENV)/installed  ## Run the Triton kernels in Triton's interpreter.
	TRITON_INTERPRET=1 TRITON_YOLO_BACKEND=triton HYPOTHESIS_PROFILE=interpreter $(PYTEST) \
		--ignore tests/kernels/test_compile.py --ignore tests/kernels/test_launching.py \
		tests/test_stages.py tests/test_assigners.py tests/test_losses.py tests/test_obb.py tests/test_keypoints.py tests/test_masks.py \
		tests/test_extremes.py tests/kernels $(ARGS)

compiled: $(VENV)/installed  ## Compile the Triton kernels ahead of time, and run what comes out in an emulator.
	$(PYTEST) tests/kernels/test_compile.py tests/kernels/test_launching.py tests/emulator $(ARGS)

TARGET ?= cuda:90
emulate: $(VENV)/installed  ## Run the property tests on what Triton compiles for TARGET, in an emulator of its PTX; not in CI.
	EMULATE=$(TARGET) TRITON_YOLO_BACKEND=triton HYPOTHESIS_PROFILE=emulator $(PYTEST) \
		-k "not thousands_of_boxes and not infeasible_anchors_may_win" tests/test_stages.py tests/test_assigners.py tests/test_losses.py $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/installed
	$(RUN) -m mypy

docs: $(VENV)/installed  ## Make the API reference of the docstrings; it needs no network.
	$(RUN) docs/make_api.py docs/api

mutants: $(VENV)/installed  ## Plant mistakes and see the tests fail.
	$(PYTEST) -m mutants tests/test_mutants.py $(ARGS)

kernel-mutants: $(VENV)/installed  ## The same for the kernels, in Triton's interpreter; not in CI.
	TRITON_INTERPRET=1 TRITON_YOLO_BACKEND=triton HYPOTHESIS_PROFILE=interpreter $(PYTEST) -m mutants tests/kernels/test_mutants.py $(ARGS)

peers: $(VENV)/installed  ## Compare with other projects' losses as black boxes.
	$(RUN) -m pip install --quiet --no-deps $(CONSTRAINTS:%=-c %) -r tests/peers.txt
	$(PYTEST) -m peers $(ARGS)

matrix:  ## Run the tests on the versions of Python, torch and Triton in docs/versions.md, gigabytes each; not in CI.
	$(PYTHON) tests/tools/matrix.py $(ARGS)

dist: $(VENV)/installed  ## Build sdist and wheel, and try them in empty environments; not in CI.
	rm -rf build dist
	$(RUN) -m pip install --quiet build twine
	$(RUN) -m build --outdir dist
	$(RUN) -m twine check --strict dist/*
	$(RUN) tests/tools/install.py $(CONSTRAINTS:%=-c %) $(ARGS)

OUT ?= runs/gpu
gpu:  ## On a machine with a CUDA GPU, with a Python that has torch, triton and the extras test, examples and bench; ARGS=--rehearse without one.
	$(PYTHON) -m bench gpu --out $(OUT) $(ARGS)

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(INDEX) $(CONSTRAINTS:%=-c %) -e ".[test,examples,bench,docs]" ruff mypy
	touch $@

clean:
	rm -rf $(VENV) build dist docs/api *.egg-info
