#!/bin/bash
# Trains in an Apptainer image: the cluster's mpirun outside starts one container a rank.
#
#     examples/apptainer/train.sh                         # on this machine, 4 ranks
#     examples/apptainer/train.sh --mode bsp              # arguments go to psframe.train
#
# In a batch script of Slurm or PBS it is called the same way, with RANKS from the allocation.
# psframe's tests check this script's syntax and flags; they do not run it in a container.
#
# ---- change from here ...
IMAGE=${IMAGE:-psframe.sif}         # built from psframe.def beside this script
RANKS=${RANKS:-${SLURM_NTASKS:-4}}
SERVERS=1                           # ranks that hold the parameters
RUN_DIR=${RUN_DIR:-runs/apptainer-$(date +%Y%m%d-%H%M%S)}
MPIRUN=(mpirun -n "$RANKS")         # as root or on few cores see the README for flags
GPU=()                              # (--nv) for NVIDIA GPUs
# ---- ... to here
set -euo pipefail

# The working directory is bound, so that the run directory is outside of the image. mpirun's exit
# status is not the verdict: status.json is.
status=0
"${MPIRUN[@]}" apptainer exec "${GPU[@]}" --bind "$PWD" --pwd "$PWD" "$IMAGE" \
    python -m psframe.train --servers "$SERVERS" --run-dir "$RUN_DIR" "$@" || status=$?
cat "$RUN_DIR/status.json" || true
exit "$status"
