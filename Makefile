# Each target works on a fresh clone: it creates the environment if it is missing, and updates it if pyproject.toml is
# newer. `make train ARGS="task.steps=200 name=longer"` passes overrides.
PYTHON ?= python3
ARGS ?=
# Index of torch's wheels. Without NVIDIA's driver, that for CPUs: a tenth of the download. Empty: the package index.
TORCH_INDEX ?= $(shell $(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || \
	echo https://download.pytorch.org/whl/cpu)
INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --no-compile
# pip would compile with one core. Files in packages for other versions of Python are not compiled, as with pip; nor are
# those that few runs import: 7,700 of 17,100, before one does.
SELDOM := /(tests|testing|pip|openai|fontTools|debugpy|mypy|mypyc|transformers/models)/
COMPILE := .venv/bin/python -m compileall -qq -j 0 -x '$(SELDOM)' .venv/lib || true

# Tests with deadlines of seconds or comparisons of times run alone. All others spend most of their time waiting, so
# they run two at a time, files with slow tests first.
ALONE := tests/bench/test_bench.py $(wildcard tests/comm/test_watchdog*.py) \
	$(addprefix tests/comm/test_,lane.py transport.py) \
	$(addprefix tests/train/test_,decoding_idle.py failure.py) $(addprefix tests/launch/test_,local.py start.py) \
	tests/score/test_sleepers.py
LONG_ALONE := $(addprefix tests/,bench/test_chaos.py attacks/test_network.py test_stopping.py) \
	$(addprefix tests/cluster/test_,balance.py exchange.py failures.py overlap.py) tests/planner/measured/test_sleeping_run.py
# Files with long tests, so that not all are imported for them.
LONG = $(filter-out $(LONG_ALONE) $(LONG_ALONE:%=%/%),$(sort $(shell grep -rl --include='test_*.py' mark.long tests)))
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: board faults wheel train post life test test-fast test-long test-exhaustive cluster-test triton-table gpu-test gpu-day gpu-bench \
	failures bench chaos any-to-any docker docker-cpu docker-check docker-pins docker-test docs harness-test titan-test

train: .venv/installed
	.venv/bin/python -m launch.train experiment=quickstart $(ARGS)

# DeepSeek-V3's and R1's post-training on generated problems, small and offline; an interrupted one continues.
post: .venv/installed
	.venv/bin/python -m launch.workflow workflow=post $(ARGS)

# From text to answers: pre-training, fine-tuning, reinforcement learning, distillation, evaluation and export, offline.
life: .venv/installed
	.venv/bin/python -m launch.workflow workflow=life $(ARGS)

# The schedules alone, for other trainers: dist/dualpipe_schedules-VERSION-py3-none-any.whl.
wheel: .venv/installed-dev
	.venv/bin/python -m dualpipe.wheel.build $(ARGS)

# mypy runs next to the tests, which mostly wait; its output follows theirs.
test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy >.venv/mypy.log 2>&1 & types=$$!; trap 'kill $$types; exit 130' INT TERM; \
	$(PYTEST) $(TWO) -m 'not long and not exhaustive' --durations=20 $(ALONE:%=--ignore=%); tests=$$?; \
	wait $$types; typed=$$?; cat .venv/mypy.log; test $$tests$$typed = 00
	$(PYTEST) -m 'not long and not exhaustive' --durations=20 $(ALONE)

# Long tests: chaos, preemption, attacks on a run, Slurm, network namespaces, images, suites over plugins, a dry run of
# `gpu-day`, documentation blocks.
test-long: .venv/installed-dev
	$(PYTEST) $(TWO) -m 'long and not exhaustive' --durations=20 $(LONG)
	$(PYTEST) -m 'long and not exhaustive' --durations=20 $(LONG_ALONE)

# All parameters of tests of which `make test` and `make test-long` run a sample that covers every kind.
test-exhaustive: .venv/installed-dev
	$(PYTEST) $(TWO) -m exhaustive --durations=20

# Tests of less than a second, without those that need a quiet machine: two minutes on two cores.
test-fast: .venv/installed-dev
	$(PYTEST) $(TWO) -m 'not slow and not long and not exhaustive' -x -q $(ALONE:%=--ignore=%)

# Ranks in network namespaces with rate-limited links, and jobs on a real Slurm. Needs Linux and root, and for the jobs
# slurm-wlm and munge; tests that cannot run are skipped with the reason.
cluster-test: .venv/installed-dev
	$(PYTEST) tests/cluster tests/slurm

# Step time, CPU time and interpreter overhead, compared with torch's pipelines. Takes minutes; needs an idle machine.
bench: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m bench $(ARGS)

# Kills, stops or disconnects a rank in every phase of a step, and prints a table of how each run ends. Takes minutes.
failures: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m tests.cluster.failures $(ARGS)

# Injects a hundred seeded faults, each into a run that must end with unchanged results, and prints a table. Each takes
# half a minute on two cores.
chaos: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m bench.chaos $(ARGS)

# Puts deliberate faults into a copy of the sources, and prints which test of `make test` finds each.
faults: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m bench.faults $(ARGS)

# Resumes a run in every layout from every other layout's checkpoint: all ordered pairs of 12. Takes about 10 minutes.
any-to-any: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m tests.train.any_to_any $(ARGS)

# Compares registers, spills and shared memory of every kernel under the oldest and the newest supported Triton with
# recorded tables; ARGS=--all: under each. Needs no GPU. The first run downloads the versions into .cache/triton.
# ARGS=--write records the tables of all.
triton-table: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.kernels.triton_versions $(ARGS)

# Compares kernels with their references on a CUDA device; skipped with the reason if there is none.
gpu-test: .venv/installed-dev
	.venv/bin/python -m pytest tests/gpu -q -rs

# First checks on a GPU, in three parts of at most ten minutes: make gpu-day PART=1. Without a GPU, a dry run.
PART ?= 1

gpu-day: .venv/installed-dev
	PART=$(PART) PYTHON=.venv/bin/python bash bench/gpu/day.sh

# Compares the time of every kernel on a CUDA device with its lower bound, torch and targets. Without a GPU, exits with 2.
gpu-bench: .venv/installed-dev
	.venv/bin/python -m bench.gpu.bench $(ARGS)

# Builds images with docker or a compatible ENGINE: `make docker ARGS="--build-arg BASE_IMAGE=..."`.
ENGINE ?= docker

docker:
	$(ENGINE) build -f docker/Dockerfile -t dualpipe-trainer:cuda $(ARGS) .

docker-cpu:
	$(ENGINE) build -f docker/Dockerfile.cpu -t dualpipe-trainer:cpu $(ARGS) .

# Checks an image by two steps of `make train` inside it: `make docker-check TAG=cuda`.
TAG ?= cpu

docker-check:
	$(ENGINE) run --rm --init dualpipe-trainer:$(TAG) python -m launch.train experiment=quickstart task.steps=2 $(ARGS)

# Writes the package versions of the images from this tested environment.
docker-pins: .venv/installed-dev
	.venv/bin/python -m tests.docker.pins > docker/requirements.new
	mv docker/requirements.new docker/requirements.txt

# Builds both complete images with buildah on a Debian base and trains inside them. Takes minutes. Needs a network,
# Linux and root.
docker-test: .venv/installed-dev
	DOCKER_WHOLE=1 $(PYTEST) tests/docker -rsP

# Scores of all kinds of schedules and of the entries in bench/entries (docs/board.md).
board: .venv/installed
	.venv/bin/python -m bench.board $(ARGS)

# The documentation as a site in site/, with API pages from docstrings. Warnings are errors.
docs: .venv/installed
	$(INSTALL) -e '.[docs]'
	$(COMPILE)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# Compares the adapter to lm-evaluation-harness with the package's own model. The first run installs 620 MB of packages.
harness-test: .venv/installed-dev
	$(INSTALL) -e '.[lm-eval]' accelerate
	$(PYTEST) tests/evaluation/test_harness.py tests/evaluation/test_benchmarks.py

# Trains torchtitan's debug model on four CPU ranks in our orders, with its own trainer. It is not part of the other tests,
# as it downloads torchtitan (60 MB) into its own environment, which sees the packages of the project's. Takes minutes.
TITAN := .cache/titan

titan-test: .venv/installed-dev
	test -x $(TITAN)/bin/python || .venv/bin/python -m venv --without-pip $(TITAN)
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(TITAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	.venv/bin/python -m pip --python $(TITAN)/bin/python install --disable-pip-version-check --no-deps --ignore-installed \
		-r bench/titan.txt
	OMP_NUM_THREADS=1 $(TITAN)/bin/python -m bench.titan

# What running needs. torch alone comes from its index, so that no other package can come from there.
.venv/installed: pyproject.toml
	@test -x .venv/bin/pip || $(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
		v in "3.11 3.12 3.13".split() or sys.exit("error: PYTHON: must be Python 3.11 to 3.13, " \
		"$(PYTHON) is " + v + "; nearest valid: make PYTHON=python3.12 $(or $(firstword $(MAKECMDGOALS)),train)")'
	@test -x .venv/bin/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: PYTHON: must have venv and ensurepip, $(PYTHON) has not; nearest valid:" \
			"sudo apt install $(notdir $(PYTHON))-venv" >&2; exit 2; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	@echo "downloads $(if $(TORCH_INDEX),288 MB (1.0 GB on disk),2.9 GB with CUDA) into .venv"
	@test -z "$(TORCH_INDEX)" || \
		$(INSTALL) --retries 1 --timeout 15 --no-deps --index-url "$(TORCH_INDEX)" \
			"$$(grep -om1 'torch>=[^"]*' pyproject.toml)" || \
		echo "torch is not in $(TORCH_INDEX); it comes from the package index"
	$(INSTALL) -e .
	$(COMPILE)
	touch $@

# What tests need besides.
.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	$(COMPILE)
	touch $@
