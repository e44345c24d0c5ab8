# Each target is complete by itself on a fresh clone: the environment is made when missing and mended when
# pyproject.toml is newer. `make train ARGS="task.steps=200 name=longer"` passes overrides.
PYTHON ?= python3
ARGS ?=

# Tests that hold ranks to deadlines of seconds or compare times have the machine to themselves; all others, which wait
# for most of their time, run two at a time, the files with slow tests first.
ALONE := tests/bench $(wildcard tests/comm/test_watchdog*.py) \
	$(addprefix tests/comm/test_,groups.py lane.py transport.py) \
	$(addprefix tests/train/test_,failure.py failure_order.py probe.py corpus.py) tests/launch/test_local.py
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test test-fast test-long cluster-test triton-table gpu-test gpu-day gpu-bench failures bench chaos \
	any-to-any docker docker-cpu docker-check docker-pins docker-test

train: .venv/installed
	.venv/bin/python -m launch.train experiment=quickstart $(ARGS)

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PYTEST) $(TWO) -m 'not long' --durations=20 $(ALONE:%=--ignore=%)
	$(PYTEST) -m 'not long' --durations=20 $(ALONE)

# Chaos, preemption, Slurm, network namespaces, images, the day on a GPU as a dry run and the documentation's blocks.
test-long: .venv/installed
	$(PYTEST) -m long --durations=20

# The quick ones.
test-fast: .venv/installed
	$(PYTEST) $(TWO) -m 'not slow and not long' -x -q --durations=20

# Ranks in network namespaces joined by rate-limited links, and jobs of a real Slurm: needs Linux and root, and for the
# jobs slurm-wlm and munge; is skipped with its reason elsewhere.
cluster-test: .venv/installed
	$(PYTEST) tests/cluster tests/slurm

# Step time, CPU time and the interpreter's cost, beside torch's pipelines; a few minutes, best on a quiet machine.
bench: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m tests.bench $(ARGS)

# A rank killed, stopped or cut off in every phase of a step: how each run ends, as a table; a few minutes.
failures: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m tests.cluster.failures $(ARGS)

# A hundred seeded faults, each in a run that must end as if nothing had been, as a table; half a minute each on two cores.
chaos: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m tests.chaos $(ARGS)

# A run goes on under every layout from every other's checkpoint: all ordered pairs of 12, as a table; some 10 minutes.
any-to-any: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m tests.train.any_to_any $(ARGS)

# Registers, spills and shared memory of every kernel under each supported Triton, compared with what is recorded; no GPU.
# Versions are downloaded into .cache/triton on the first run. ARGS=--write records the tables.
triton-table: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.kernels.triton_versions $(ARGS)

# Kernels against their references on a CUDA device; skipped, with the reason, where there is none.
gpu-test: .venv/installed
	.venv/bin/python -m pytest tests/gpu -q -rs

# The first hours on a GPU, in three parts of at most ten minutes: make gpu-day PART=1. Without a GPU it is a dry run.
PART ?= 1

gpu-day: .venv/installed
	PART=$(PART) PYTHON=.venv/bin/python bash tests/gpu/day.sh

# Time of every kernel on a CUDA device beside its floor, torch and the targets; one line and code 2 where there is none.
gpu-bench: .venv/installed
	.venv/bin/python -m tests.gpu.bench $(ARGS)

# Images, with docker or another ENGINE that takes its arguments; `make docker ARGS="--build-arg BASE_IMAGE=..."`.
ENGINE ?= docker

docker:
	$(ENGINE) build -f docker/Dockerfile -t dualpipe-trainer:cuda $(ARGS) .

docker-cpu:
	$(ENGINE) build -f docker/Dockerfile.cpu -t dualpipe-trainer:cpu $(ARGS) .

# Whether an image is healthy: the job of `make train` inside it, two steps of it; `make docker-check TAG=cuda`.
TAG ?= cpu

docker-check:
	$(ENGINE) run --rm --init dualpipe-trainer:$(TAG) python -m launch.train experiment=quickstart task.steps=2 $(ARGS)

# The versions that images install, from those that are tested here.
docker-pins: .venv/installed
	.venv/bin/python -m tests.docker.pins > docker/requirements.new
	mv docker/requirements.new docker/requirements.txt

# Both images, whole, built by buildah on a Debian base and the job run inside: minutes, a network, Linux and root.
docker-test: .venv/installed
	DOCKER_WHOLE=1 $(PYTEST) tests/docker -rsP

.venv/installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
