#!/usr/bin/env bash
# SLURM on this one machine, to try workflow/profiles/slurm where there is no cluster:
#
#   apt-get install -y slurm-wlm munge
#   scripts/slurm_here.sh start FOLDER && source FOLDER/env.sh
#   snakemake --workflow-profile workflow/profiles/slurm --cores 1 --slurm-status-command squeue
#   scripts/slurm_here.sh stop FOLDER
#
# All of it lies in FOLDER. It listens on loopback, with a key and ports of its own, so a SLURM that
# is installed here already goes on undisturbed.
set -euo pipefail
[[ $# == 2 && $1 =~ ^(start|stop)$ ]] || { echo "usage: $0 start|stop FOLDER" >&2; exit 2; }
mkdir -p "$2"/{state,spool,bin}
here=$(cd "$2" && pwd) me=$(id -un) node=$(hostname -s)
export SLURM_CONF=$here/slurm.conf PATH=$PATH:/usr/sbin

stop() {
    timeout 10 scancel --full --signal=KILL --user="$me" 2>/dev/null || true
    for name in slurmd slurmctld munged; do
        pid=$(cat "$here/$name.pid" 2>/dev/null) && kill "$pid" 2>/dev/null || continue
        for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
    done
}
if [[ $1 == stop ]]; then stop; exit; fi

# The node claims two GPUs and more memory than it has. SLURM only counts them, and so takes the
# profile's requests as they are.
echo "Name=gpu File=/dev/null,/dev/zero" >"$here/gres.conf"
printf '%s\n' >"$SLURM_CONF" \
    ClusterName=here SlurmctldHost="$node(127.0.0.1)" SlurmctldPort=16817 SlurmdPort=16818 \
    SlurmUser="$me" SlurmdUser="$me" AuthType=auth/munge AuthInfo=socket="$here/munge.socket" \
    StateSaveLocation="$here/state" SlurmdSpoolDir="$here/spool" \
    SlurmctldPidFile="$here/slurmctld.pid" SlurmdPidFile="$here/slurmd.pid" \
    SlurmctldLogFile="$here/slurmctld.log" SlurmdLogFile="$here/slurmd.log" \
    ProctrackType=proctrack/linuxproc TaskPlugin=task/none GresTypes=gpu \
    SelectType=select/cons_tres SelectTypeParameters=CR_Core SlurmdParameters=config_overrides \
    "NodeName=$node NodeAddr=127.0.0.1 CPUs=2 RealMemory=64000 Gres=gpu:2" \
    "PartitionName=here Nodes=ALL Default=YES MaxTime=INFINITE"
# Snakemake takes most SLURM_ variables from a job, so its srun must find slurm.conf without them.
srun=$(command -v srun)
printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$srun" >"$here/bin/srun"
chmod +x "$here/bin/srun"
echo "export SLURM_CONF=$SLURM_CONF PATH=$here/bin:\$PATH" >"$here/env.sh"

trap 'tail -n 20 "$here"/*.log >&2; stop' ERR
(umask 077 && head -c 128 /dev/urandom >"$here/munge.key")
munged --force --key-file="$here/munge.key" --socket="$here/munge.socket" \
    --pid-file="$here/munged.pid" --log-file="$here/munged.log" --seed-file="$here/munged.seed"
slurmctld
slurmd
for _ in {1..60}; do [[ $(sinfo -h -o %t) == idle ]] && break; sleep 0.5; done
[[ $(sinfo -h -o %t) == idle ]]
echo "next: source $here/env.sh; to stop it: $0 stop $here"
