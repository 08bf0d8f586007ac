#!/usr/bin/env bash
# A throw-away SLURM of one node on this machine's loopback, all of it in one folder:
#   start.sh FOLDER [GPUS]     FOLDER/env is then the file to source; GPUS are stand-ins, devices that do nothing
# Needs root and Debian's slurm-wlm and munge; stop.sh FOLDER ends it. There is no accounting, as on small clusters.
set -euo pipefail

folder=$(mkdir -p "$1" && cd "$1" && pwd)
gpus=${2:-0}
host=$(hostname -s)
cpus=$(nproc)
(( cpus >= 4 )) || cpus=4      # claimed, so that four jobs run side by side

chmod 755 "$folder"            # munged trusts no socket in a closed folder
install -d -m 700 "$folder/state" "$folder/spool"
install -d -m 755 "$folder/munge" "$folder/log"
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 600 "$folder/munge/key"

read -r controller_port node_port < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(one.getsockname()[1] for one in held))')

gres_types="" gres=""
if (( gpus )); then
  gres_types="GresTypes=gpu" gres="Gres=gpu:$gpus"
  for number in $(seq 0 $((gpus - 1))); do
    mknod "$folder/gpu$number" c 1 3
    echo "NodeName=$host Name=gpu File=$folder/gpu$number" >> "$folder/gres.conf"
  done
fi

cat > "$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$folder/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
JobRequeue=1
DefMemPerCPU=512
$gres_types
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus $(slurmd -C | grep -o 'RealMemory=[0-9]*') $gres State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
echo "export SLURM_CONF=$folder/slurm.conf" > "$folder/env"
export SLURM_CONF=$folder/slurm.conf

daemon() {  # daemon NAME ARGUMENT...: in a session of its own, its process number in NAME.process
  "$@" < /dev/null >> "$folder/log/$1.out" 2>&1 &
  echo $! > "$folder/$1.process"
}

until_true() {  # until_true SECONDS COMMAND...
  local tries=$(($1 * 10)); shift
  until "$@" > /dev/null 2>&1; do
    (( tries-- )) || { echo "no answer to '$*' from the SLURM in $folder:" >&2; tail -n 3 "$folder"/log/* >&2; exit 1; }
    sleep 0.1
  done
}

set -m  # each daemon in a process group of its own: Ctrl-C in a test must not reach it
daemon munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
  --pid-file="$folder/munge/pid" --log-file="$folder/log/munged" --seed-file="$folder/munge/seed"
until_true 10 munge --no-input --socket="$folder/munge/socket"
daemon slurmctld -D -i -f "$SLURM_CONF"
until_true 20 scontrol ping
daemon slurmd -D -N "$host" -f "$SLURM_CONF"
until_true 30 sh -c '[ "$(sinfo --noheader --format=%T)" = idle ]'
