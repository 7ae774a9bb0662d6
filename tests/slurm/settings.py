"""slurm.conf and its like for a cluster on one machine; its times are as short as Slurm 22.05 allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOME = "/mnt"  # in the cluster's own mount namespace a tmpfs: sockets have short paths, and it goes with it
CONTROLLER = "head"
NETWORK = "10.213.0."
# cred_expire: how long a requeued job waits before it starts again. Default 120 s, at least 3.
MUNGE = f"socket={HOME}/munge/socket,cred_expire=5"

_SLURM_CONF = f"""
ClusterName=test
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo={MUNGE}
StateSaveLocation={HOME}/state
SlurmdSpoolDir={HOME}/spool/%n
SlurmctldPidFile={HOME}/slurmctld.pid
SlurmdPidFile={HOME}/slurmd.%n.pid
SlurmctldLogFile={HOME}/log/slurmctld
SlurmdLogFile={HOME}/log/slurmd.%n
SlurmctldDebug=verbose
SlurmdDebug=verbose
PlugStackConfig={HOME}/plugstack.conf
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_max_time=30
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=6
KillWait=3
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
MinJobAge=3600
InactiveLimit=0
CompleteWait=0
JobRequeue=1
UnkillableStepTimeout=30
"""


@dataclass(frozen=True)
class Settings:
    """A cluster of `nodes` machines with `gpus` GPUs and `cpus` cores each.

    own_network: each has an interface and an address of its own, which can be cut; else all share loopback.
    grace: seconds between the warning and the end of a job of partition `low` that partition `high` preempts.
    """

    nodes: int = 2
    gpus: int = 2
    cpus: int = 4
    own_network: bool = False
    grace: int = 0

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def head_address(self) -> str:
        return f"{NETWORK}254" if self.own_network else "127.0.0.1"

    def address(self, name: str) -> str:
        return f"{NETWORK}{self.names.index(name) + 1}" if self.own_network else "127.0.0.1"

    def files(self, host: str, ports: Sequence[int]) -> dict[str, str]:
        """Name -> content. host: this machine's name; ports: free ones, of the controller and each node."""
        conf = [_SLURM_CONF, f"SlurmctldHost={host}({self.head_address})", f"SlurmctldPort={ports[0]}"]
        gres, hosts = ["AutoDetect=off"], ["127.0.0.1 localhost", f"{self.head_address} {host} {CONTROLLER}"]
        for name, port in zip(self.names, ports[1:], strict=True):
            conf.append(
                f"NodeName={name} NodeHostname={name} NodeAddr={self.address(name)} Port={port} "
                f"CPUs={self.cpus} RealMemory=4000 Gres=gpu:{self.gpus}"
            )
            gres.append(f"NodeName={name} Name=gpu File={HOME}/gpu/{name}-[0-{self.gpus - 1}]")
            hosts.append(f"{self.address(name)} {name}")
        low = f"PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace}"
        conf += [
            f"PartitionName=low Nodes=ALL Default=YES {low}",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
        ]
        return {
            "slurm.conf": "\n".join(conf) + "\n",
            "gres.conf": "\n".join(gres) + "\n",
            "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n",  # read at the start, not used
            "plugstack.conf": "",
            "hosts": "\n".join(hosts) + "\n",
        }
