#!/usr/bin/env bash
# A SLURM cluster of one node, this machine, for as long as a command runs: tests/slurm/cluster.sh COMMAND...
#
# It has four CPUs and two GPUs, whatever this machine has, as SLURM only counts them, and forgets a job five minutes
# after its end. It runs as whoever calls, in one temporary folder, and nothing of it stays. Where SLURM is missing,
# Debian's packages are installed: as root in a container, or wherever PERMASK_REQUIRE_SLURM=1 asks for them (elsewhere
# they would start services). The status is 77 where that cannot be.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

present() { type munged slurmctld slurmd sbatch >/dev/null 2>&1; }

install() {
    local sudo=
    [ "$(id -u)" -eq 0 ] || sudo="sudo -n"
    export DEBIAN_FRONTEND=noninteractive
    command -v apt-get && $sudo apt-get update -qq &&
        $sudo apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}

free_port() {
    local port
    while port=$((10000 + RANDOM % 20000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo $port
}

if ! present && { [ ! -d /run/systemd/system ] || [ "${PERMASK_REQUIRE_SLURM:-}" = 1 ]; }; then
    install >/dev/null || true
fi
if ! present; then
    echo "no SLURM here, and none that may be installed: apt-get install slurm-wlm munge" >&2
    exit 77
fi

state=$(mktemp -d)
export SLURM_CONF=$state/slurm.conf  # from here on no command means another cluster
stop() {
    trap - EXIT
    trap '' HUP INT PIPE TERM  # to the end, even if nobody listens any more
    # Jobs outlive the daemons that started them, so they go first.
    if scancel --partition=main 2>/dev/null; then
        for _ in $(seq 50); do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    # The command, the node, its controller, and last what signs their messages.
    for process in "${running[@]}"; do kill "$process" 2>/dev/null && wait "$process" || true; done
    rm -rf "$state"
}
running=()
trap stop EXIT
trap 'exit 143' HUP INT TERM

chmod 755 "$state"
mkdir "$state/slurmctld" "$state/slurmd"
head -c 128 /dev/urandom >"$state/munge.key"
chmod 600 "$state/munge.key"
munged --foreground --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munge.pid" \
    --seed-file="$state/munge.seed" >"$state/munge.log" 2>&1 &
running=($! "${running[@]}")

host=${HOSTNAME%%.*}
# A job that is queued again waits until its credentials have expired, and then for the scheduler: seconds, not minutes.
cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/slurmd
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE
END
printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$state/gres.conf"
# Snakemake's plugin starts srun without the environment variable that says where this cluster's settings are.
mkdir "$state/bin"
printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$(type -P srun)" >"$state/bin/srun"
chmod +x "$state/bin/srun"
PATH=$state/bin:$PATH
slurmctld -D >/dev/null 2>&1 &
running=($! "${running[@]}")
slurmd -D >/dev/null 2>&1 &
running=($! "${running[@]}")

idle() { [ "$(timeout 2 sinfo --noheader --format=%t 2>/dev/null)" = idle ]; }
until idle; do
    if [ $SECONDS -gt 60 ] || [ "$(jobs -rp | wc -l)" -lt ${#running[@]} ]; then
        tail -n 20 "$state"/*.log >&2
        echo "SLURM did not start: expected an idle node in 60 seconds" >&2
        exit 1
    fi
    sleep 0.2
done
"$@" <&0 &  # a shell in wait hears at once that it is to end
running=($! "${running[@]}")
wait $!
