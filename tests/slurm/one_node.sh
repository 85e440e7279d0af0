#!/usr/bin/env bash
# Starts a Slurm of one node, runs a command in it, and takes it down again:
#
#     tests/slurm/one_node.sh COMMAND [ARGUMENTS]
#
# It needs root and Debian's packages slurm-wlm and munge; without them it says so, and ends with
# status 77 ("skipped"). All its files are in a temporary folder; every wait has a bound.
set -euo pipefail

skip() {
    echo "tests/slurm: skipped: $*" >&2
    exit 77
}

[ "$(id -u)" -eq 0 ] || skip "a Slurm of one's own needs root"
export PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch srun scontrol; do
    command -v "$program" >/dev/null || skip "there is no $program; apt install slurm-wlm munge"
done
[ $# -gt 0 ] || { sed -n '2,8p' "$0" >&2; exit 2; }

folder=$(mktemp -d)
chmod 755 "$folder"
host=$(hostname -s)
pids=()

take_down() {
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    for pid in "${pids[@]}"; do # slurmd waits for its steps; not for ever
        timeout 10 tail --pid="$pid" -f /dev/null || kill -9 "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}
trap take_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

mkdir "$folder"/{state,spool,munge}
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chmod 400 "$folder/munge/key"
chmod 700 "$folder/munge"
cat >"$folder/slurm.conf" <<CONF
ClusterName=psframe
# Never twice the same: MPICH names its shared memory after job and step, and a killed one leaves it.
FirstJobId=$(($(date +%s) % 60000000 + 1))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" \
    >"$folder/munged.out" 2>&1 &
pids+=($!)
slurmctld -D >"$folder/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D >"$folder/slurmd.out" 2>&1 &
pids+=($!)

# Until the node is idle: scontrol asks again, each question with a bound of its own.
ready=no
for _ in $(seq 60); do
    if timeout 5 scontrol show node "$host" 2>/dev/null | grep -q "State=IDLE"; then
        ready=yes
        break
    fi
    for pid in "${pids[@]}"; do
        kill -0 "$pid" 2>/dev/null || { echo "tests/slurm: a daemon has ended:" >&2; tail -n 20 "$folder"/*.out "$folder"/*.log "$folder/munge/log" >&2; exit 1; }
    done
    timeout 1 tail --pid="${pids[1]}" -f /dev/null || true # a second, or the controller's end
done
[ "$ready" = yes ] || { echo "tests/slurm: the node did not come up in a minute" >&2; tail -n 20 "$folder"/*.log >&2; exit 1; }

status=0
"$@" || status=$?
[ "$status" -eq 0 ] || tail -n 20 "$folder"/slurm*.log >&2
exit "$status"
