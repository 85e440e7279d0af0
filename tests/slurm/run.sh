#!/usr/bin/env bash
# Runs the Slurm examples on a Slurm of one node: tests/slurm/run.sh (make test-slurm).
#
# As a batch job with the Open MPI wheel's mpirun, with srun and the MPICH wheel, and with srun and a
# PMI that the library does not understand, which must be refused and not train four times over. Then
# the first two again, with the signal that Slurm sends before the time is up: they leave a checkpoint,
# queue again, and go on to the end; and once with SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${SLURM_CONF-}" ]; then
    status=0
    tests/slurm/one_node.sh "$0" || status=$?
    [ "$status" -eq 77 ] && exit 0 # it has said why
    exit "$status"
fi

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
limit_s=120

fail() {
    echo "tests/slurm: FAILED: $1" >&2
    cat "$logs/$1.out" >&2 || true
    exit 1
}

# Runs a batch script, waiting for its end, and sees that its run is completed and has learned.
batch() {
    local name=$1
    shift
    timeout "$limit_s" sbatch --wait --quiet --nodes=1 --ntasks-per-node=4 \
        --output="$logs/$name.out" --export=ALL,RUN_DIR="$logs/$name" "$@" || fail "$name"
    python3 - "$logs/$name/status.json" <<'PYTHON' || fail "$name"
import json
import sys

status = json.load(open(sys.argv[1]))
assert status["state"] == "completed", status
assert status["test_accuracy"] >= 0.97, status
PYTHON
    grep -q "test accuracy" "$logs/$name.out" || fail "$name"
    echo "tests/slurm: $name: $(grep -c '' "$logs/$name.out") lines, $(cat "$logs/$name/status.json")"
}

# Tries a command each second until it succeeds; false if it does not within the limit.
within_limit() {
    for _ in $(seq "$limit_s"); do
        "$@" && return 0
        timeout 1 tail -f /dev/null || true
    done
    return 1
}

is_over() { [ -z "$(squeue --noheader --job="$1" 2>/dev/null)" ]; }

# Submits a batch script that would train for hours, sends it SIGTERM as its --signal would (scancel's
# options are in $2), and sees that the run is interrupted and its status shown.
warned() {
    local name=$1 how=$2 job
    shift 2
    job=$(sbatch --parsable --nodes=1 --ntasks-per-node=4 --output="$logs/$name.out" \
        --export=ALL,RUN_DIR="$logs/$name" "$@" --epochs 1000000) || fail "$name"
    within_limit test -s "$logs/$name/metrics.jsonl" || fail "$name"
    scancel --signal=TERM $how "$job" || fail "$name"
    within_limit is_over "$job" || fail "$name"
    grep -q '"state": "interrupted"' "$logs/$name/status.json" || fail "$name"
    grep -q '"state": "interrupted"' "$logs/$name.out" || fail "$name"
    echo "tests/slurm: $name: $(cat "$logs/$name/status.json")"
}

# Submits a batch script, sends it SIGUSR1 as its --signal would (scancel's options are in $2), and
# sees that the job has queued again, gone on from its checkpoint, and come to the end.
requeued() {
    local name=$1 how=$2 job
    shift 2
    job=$(sbatch --parsable --nodes=1 --ntasks-per-node=4 --output="$logs/$name.out" \
        --export=ALL,RUN_DIR="$logs/$name" "$@" --epochs 300) || fail "$name"
    within_limit test -s "$logs/$name/metrics.jsonl" || fail "$name"
    scancel --signal=USR1 $how "$job" || fail "$name"
    within_limit grep -q '"reason": "Interrupted: SIGUSR1' "$logs/$name.out" || fail "$name"
    # Slurm lets a job that queued again wait for a while, which nobody here needs.
    within_limit is_pending "$job" || fail "$name"
    scontrol update "JobId=$job" StartTime=now || fail "$name"
    within_limit is_over "$job" || fail "$name"
    grep -q '"state": "completed"' "$logs/$name/status.json" || fail "$name"
    [ "$(grep -c '"epoch"' "$logs/$name/metrics.jsonl")" -eq 300 ] || fail "$name"
    echo "tests/slurm: $name: $(cat "$logs/$name/status.json")"
}

is_pending() { squeue --noheader --format=%T --job="$1" | grep -q PENDING; }

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
VENV=$PWD/.venv batch mpirun examples/slurm/train.sbatch --epochs 15
VENV=$PWD/.venv-mpich PMI=pmi2 batch srun examples/slurm/train-srun.sbatch --epochs 15

VENV=$PWD/.venv warned mpirun-warned --batch examples/slurm/train.sbatch
VENV=$PWD/.venv requeued mpirun-requeued --batch examples/slurm/train.sbatch
VENV=$PWD/.venv-mpich PMI=pmi2 requeued srun-requeued "" examples/slurm/train-srun.sbatch

# The Open MPI wheel does not speak PMI-2: each of the four tasks is alone.
name=wrong-pmi
if timeout "$limit_s" srun --quiet --mpi=pmi2 -n 4 .venv/bin/python -m psframe.train \
    --run-dir "$logs/$name" >"$logs/$name.out" 2>&1; then
    fail "$name"
fi
grep -q "do not belong together" "$logs/$name.out" || fail "$name"
grep -q "srun --mpi=pmix" "$logs/$name.out" || fail "$name"
[ ! -e "$logs/$name/status.json" ] || fail "$name"
echo "tests/slurm: $name: refused: $(grep -m 1 'belong together' "$logs/$name.out" | cut -c 1-100)..."
echo "tests/slurm: all passed"
