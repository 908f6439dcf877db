#!/usr/bin/env bash
# A real SLURM on this machine, for the tests: virtual nodes on loopback, no systemd, no accounting.
#
#   cluster.sh start DIR    installs SLURM and munge where they are missing (as root), starts, and prints the
#                           path of slurm.conf; status 3 where neither SLURM nor root is there
#   cluster.sh stop DIR     ends what start began, by its pid files, and removes DIR
#
# DIR is a short absolute path: unix sockets lie below it. Nodes node1 to node3 claim 8 cores each; partition
# main gives way to partition urgent, 5 seconds after its jobs were asked to save.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
NODES=3 CPUS=8 PORT=${SLURM_TEST_PORT:-17817}

say() { echo "cluster: $*" >&2; }
fail() {
  say "$*"
  tail -n 8 "$D"/log/*.log >&2 || true
  exit 1
}
until_true() { # SECONDS COMMAND…
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $end ] || fail "timed out: $*"; sleep 0.2; done
}
runs() { # PID NAME: that process is that program, and not one that only waits to be reaped
  local status; status=$(cat "/proc/$1/status" 2>/dev/null) || return 1
  [[ $status == Name:*"$2"$'\n'* && $status != *State:*[ZX]' ('* ]]
}

install() {
  local need=()
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v srun >/dev/null || need+=(slurm-wlm)
  command -v munged >/dev/null || need+=(munge)
  [ ${#need[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "no ${need[*]} here, and no right to install them"; exit 3; }
  say "installing ${need[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -q && apt-get install -q -y --no-install-recommends "${need[@]}"; } >"$D/log/apt.log" 2>&1 ||
    { tail -n 5 "$D/log/apt.log" >&2; say "could not install ${need[*]}"; exit 3; }
}

configure() {
  local me; me=$(id -un)
  (umask 077; head -c 128 /dev/urandom >"$D/munge.key")
  cat >"$D/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/munge.sock,cred_expire=5
SlurmctldPort=$PORT
SlurmctldPidFile=$D/pid/slurmctld
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdPidFile=$D/pid/slurmd.%n
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmdSpoolDir=$D/spool/%n
StateSaveLocation=$D/state
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
MinJobAge=3600
FirstJobId=$(($(date +%s) % 60000000 + 1000))
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
CONF
  # each daemon on the address of the host's name alone: right only where that is the loopback
  [ "$(getent ahostsv4 "$(hostname)" | awk '{print $1; exit}')" != 127.0.0.1 ] ||
    echo "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" >>"$D/slurm.conf"
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=node$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT + 100 + i)) CPUs=$CPUS RealMemory=1000000" >>"$D/slurm.conf"
  done
  cat >>"$D/slurm.conf" <<CONF
PartitionName=main   Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL Default=NO  PriorityTier=10 PreemptMode=OFF     MaxTime=INFINITE State=UP
CONF
}

start() {
  mkdir -p "$D"/{log,pid,spool,state}
  chmod 755 "$D" "$D"/*/
  install
  configure
  export SLURM_CONF=$D/slurm.conf
  munged --key-file="$D/munge.key" --socket="$D/munge.sock" --force --pid-file="$D/pid/munged" \
    --log-file="$D/log/munged.log" --seed-file="$D/state/munged.seed" 2>>"$D/log/munged.log"
  until_true 10 sh -c "munge -n -S $D/munge.sock | unmunge -S $D/munge.sock"
  local names; names=$(seq -s' ' -f 'node%g' 1 $NODES)
  if ! getent hosts node1 >/dev/null; then
    [ -w /etc/hosts ] || { say "node1 does not resolve and /etc/hosts cannot be written"; exit 3; }
    [ -z "$(tail -c1 /etc/hosts)" ] || echo >>/etc/hosts
    echo "127.0.0.1 $names # dinov2-tests" >>/etc/hosts
  fi
  slurmctld 2>>"$D/log/slurmctld.log"
  until_true 20 sh -c 'scontrol ping | grep -q UP'
  for name in $names; do slurmd -N "$name" 2>>"$D/log/slurmd.$name.log"; done
  until_true 30 sh -c '! sinfo -h -N -p main -o %T | grep -qv idle'
  echo "$D/slurm.conf"
}

stop() {
  export SLURM_CONF=$D/slurm.conf
  scancel -u "$(id -un)" 2>/dev/null || true
  for _ in $(seq 50); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
  for name in slurmd.node1 slurmd.node2 slurmd.node3 slurmctld munged; do
    local pid; pid=$(cat "$D/pid/$name" 2>/dev/null) || continue
    runs "$pid" "${name%%.*}" && kill -TERM "$pid"
    for _ in $(seq 50); do runs "$pid" "${name%%.*}" || break; sleep 0.1; done
    runs "$pid" "${name%%.*}" && kill -KILL "$pid"
  done
  if [ -w /etc/hosts ] && grep -q '# dinov2-tests$' /etc/hosts; then
    local kept; kept=$(grep -v '# dinov2-tests$' /etc/hosts); printf '%s\n' "$kept" >/etc/hosts
  fi
  rm -rf "${D:?}"
}

D=$2
[[ $D = /* && ${#D} -le 60 ]] || { say "DIR must be a short absolute path"; exit 2; }
case $1 in start | stop) "$1" ;; *) say "start or stop, not $1"; exit 2 ;; esac
