"""A real Slurm cluster on this machine, for as long as a `with` lasts: slurmctld, munged and a slurmd a node.

    with cluster(Settings(nodes=2, gpus=2)) as slurm:
        job = slurm.sbatch("train.sbatch")
        slurm.wait_for(job, "COMPLETED", seconds=60)

All of it lives in pid and mount namespaces of its own, and each node in further ones (unshare(1)): killing
the first process of a node is a power loss, and nothing outlives this process, even if it is killed itself.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

from slurm.settings import HOME, NETWORK, Settings

PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "unshare", "nsenter", "ip")
_PR_SET_PDEATHSIG = 1
_POLL = 0.05  # seconds
_libc = ctypes.CDLL(None)

# $1: whether the cluster has a network of its own. A shell as the first process buries orphans.
_HEAD = f"""
mount --make-rprivate /
mount -t tmpfs -o mode=755 cluster {HOME}
if [ "$1" ]; then
  ip link set lo up; ip link add br0 type bridge; ip addr add {NETWORK}254/24 dev br0; ip link set br0 up
fi
echo ready
while read -r _; do :; done
"""
# $1: the node's name, $2: as above. Its slurmd starts, also again, with a line on stdin.
_NODE = f"""
mount --make-rprivate /
hostname "$1"
mount -t tmpfs -o mode=1777 shm /dev/shm
ip link set lo up
echo ready
while read -r _; do slurmd -D -N "$1" -f {HOME}/slurm.conf < /dev/null >> {HOME}/log/$1.out 2>&1 || :; done
"""


def missing() -> str | None:
    """Why there can be no cluster here; None: there can."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root (namespaces)"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if not any(Path(p, name).exists() for p in path.split(":"))]
    return f"{', '.join(lacking)} not installed: make slurm-packages" if lacking else None


@dataclass(frozen=True)
class Node:
    """Its first process as seen from here, and the process that holds it."""

    holder: subprocess.Popen[str]
    first: int

    def power_on(self) -> None:
        """Starts slurmd, or starts it again after its end."""
        assert self.holder.stdin is not None
        print(file=self.holder.stdin, flush=True)

    @property
    def slurmd(self) -> int | None:
        """Its process; None: it has none now."""
        return next((pid for pid in children(self.first) if _name(pid) == "slurmd"), None)


@contextmanager
def cluster(settings: Settings | None = None) -> Iterator[Cluster]:
    """A cluster that is up: every node idle.

    Raises:
        TimeoutError, RuntimeError: it doesn't come up; with the end of the controller's log.
    """
    slurm = Cluster(settings or Settings())
    with ExitStack() as stack:
        stack.callback(slurm.stop)
        slurm.start()
        yield slurm


@dataclass
class Cluster:
    settings: Settings
    nodes: dict[str, Node] = field(default_factory=dict)  # those with power
    _head: Node | None = None
    _controller: subprocess.Popen[str] | None = None
    _others: list[subprocess.Popen[str]] = field(default_factory=list)  # to be waited for at the end

    # --- its life

    def start(self) -> None:
        self._head = self._boot([], _HEAD, "head", self._network)
        ports = _free_ports(1 + self.settings.nodes)
        for folder in ("munge", "state", "spool", "log", "gpu"):
            (self.files / folder).mkdir()
        for name, content in self.settings.files(_this_host(), ports).items():
            (self.files / name).write_text(content)
        for name in self.settings.names:
            (self.files / "spool" / name).mkdir()
            for gpu in range(
                self.settings.gpus
            ):  # slurmd sets CUDA_VISIBLE_DEVICES for character devices only
                os.mknod(self.files / "gpu" / f"{name}-{gpu}", 0o20666, os.makedev(1, 3))
        self._run("mount", "--bind", f"{HOME}/hosts", "/etc/hosts")
        self._start_munge()
        self.start_controller()
        for name in self.settings.names:
            self.start_node(name)
        self.wait_for_nodes("idle")

    def stop(self) -> None:
        """Kills the head's first process: the kernel ends everything in its namespace."""
        holders = [node.holder for node in self.nodes.values()] + self._others
        if self._head is not None:
            os.kill(self._head.first, signal.SIGKILL)
            holders.append(self._head.holder)
        if self._controller is not None:
            holders.append(self._controller)
        for process in holders:  # they only wait for what is gone; one that is stopped would not notice
            process.kill()
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def start_controller(self) -> None:
        """slurmctld, which goes on with the jobs that an earlier one has left."""
        self._controller = self._spawn("slurmctld", "-D", "-f", f"{HOME}/slurm.conf")
        self._until(lambda: "is UP" in self._run("scontrol", "ping", check=False), 15, "slurmctld")

    def stop_controller(self) -> None:
        """As for a restart: it writes its state down. (A SIGKILL loses the jobs of the last seconds.)"""
        assert self._controller is not None
        (daemon,) = children(self._controller.pid)
        os.kill(daemon, signal.SIGTERM)
        self._controller.wait()

    def start_node(self, name: str) -> None:
        """Switches a node on."""
        node = self._boot(self._inside, _NODE, name, self._network)
        if self.settings.own_network:
            self._plug_in(name, node.first)
        self.nodes[name] = node
        node.power_on()

    def kill_node(self, name: str) -> None:
        """A power loss: slurmd, batch script and tasks are gone at once."""
        node = self.nodes.pop(name)
        os.kill(node.first, signal.SIGKILL)
        node.holder.wait(10)  # the first process of a namespace is gone when all of it is
        self._others.append(node.holder)

    def kill_slurmd(self, name: str) -> None:
        """The daemon alone; tasks go on. `nodes[name].power_on()` starts it again."""
        daemon = self.nodes[name].slurmd
        assert daemon is not None, f"{name} has no slurmd"
        os.kill(daemon, signal.SIGKILL)

    def cable(self, name: str, *, plugged: bool) -> None:
        """Pulls a node's network cable, or plugs it in again; needs own_network."""
        assert self.settings.own_network
        self._run("ip", "link", "set", f"v-{name}", "up" if plugged else "down")

    # --- its users

    @property
    def files(self) -> Path:
        """The cluster's HOME as seen from here."""
        assert self._head is not None
        return Path(f"/proc/{self._head.first}/root{HOME}")

    def run(self, *command: str, cwd: Path, environ: Mapping[str, str] | None = None) -> str:
        """A command of a user's on the head node; its output. Raises RuntimeError when it fails."""
        return self._run(*command, cwd=cwd, environ=environ)

    def sbatch(self, *args: str, cwd: Path, environ: Mapping[str, str] | None = None) -> str:
        """Submits; the job's number."""
        return self.run("sbatch", "--parsable", *args, cwd=cwd, environ=environ).strip().split(";")[0]

    def scontrol(self, *args: str) -> str:
        return self._run("scontrol", *args)

    def scancel(self, *args: str) -> None:
        self._run("scancel", *args)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says; empty while the controller does not answer."""
        said = self._run("scontrol", "-o", "show", "job", number, check=False)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_for(
        self, number: str, *states: str, seconds: float, restarts: int | None = None
    ) -> dict[str, str]:
        """Until the job is in one of the states, and has been restarted so often; what is said of it then."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.job(number))
            return found.get("JobState") in states and restarts in (None, int(found.get("Restarts", 0)))

        self._until(there, seconds, f"job {number} in {'/'.join(states)}", lambda: str(found))
        return found

    def node_states(self) -> dict[str, str]:
        said = self._run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t", check=False)
        return dict(line.split() for line in said.splitlines())

    def wait_for_nodes(self, *states: str, names: list[str] | None = None, seconds: float = 30) -> None:
        """Until all (or those named) are in one of the states, as sinfo writes them: idle, down* ..."""
        wanted = names or self.settings.names
        self._until(
            lambda: all(self.node_states().get(name) in states for name in wanted),
            seconds,
            f"nodes {wanted} {'/'.join(states)}",
            lambda: str(self.node_states()),
        )

    def log(self, name: str = "slurmctld", lines: int = 30) -> str:
        """The end of a daemon's log: slurmctld, or slurmd.n1."""
        path = self.files / "log" / name
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    # --- how

    @property
    def _network(self) -> str:
        return "own" if self.settings.own_network else ""

    @property
    def _inside(self) -> list[str]:
        """What goes before a command that is to run on the head node."""
        assert self._head is not None
        return ["nsenter", "-t", str(self._head.first), "-m", "-p", *(["-n"] if self._network else [])]

    def _environ(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Without what a job that this test itself may run in has set."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        path = f"{mine.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
        return mine | {"PATH": path, "SLURM_CONF": f"{HOME}/slurm.conf"} | dict(more or {})

    def _boot(self, inside: list[str], script: str, name: str, network: str) -> Node:
        """The first process of new namespaces, once it has said that it is ready."""
        own = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        own += ["--uts", "--ipc"] if inside else []
        command = [*inside, "unshare", *own, *(["--net"] if network else []), "sh", "-ec", script, "sh"]
        arguments = [name, network] if inside else [network]
        holder = subprocess.Popen(
            command + arguments, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, env=self._environ(),
            cwd="/", start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != "ready\n":
            holder.kill()
            raise RuntimeError(f"{name} does not start (a container without CAP_SYS_ADMIN?): {said}")
        first = holder.pid
        for _ in range(2 if inside else 1):  # nsenter, unshare, and then the first process
            (first,) = children(first)
        return Node(holder, first)

    def _plug_in(self, name: str, first: int) -> None:
        self._run("ip", "link", "del", f"v-{name}", check=False)  # that of its last life
        head = self._inside
        wire = ["nsenter", *head[1:3], "-n", "ip", "link"]  # not -p: the node is named by its number out here
        subprocess.run(
            [*wire, "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(first)],
            check=True,
        )
        subprocess.run([*wire, "set", f"v-{name}", "master", "br0", "up"], check=True)
        address = f"ip addr add {self.settings.address(name)}/24 dev eth0; ip link set eth0 up"
        subprocess.run(["nsenter", "-t", str(first), "-n", "sh", "-ec", address], check=True)

    def _start_munge(self) -> None:
        folder = f"{HOME}/munge"
        key = self.files / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        places = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "seed-file": "seed",
            "log-file": "log",
        }
        options = [f"--{option}={folder}/{name}" for option, name in places.items()]
        self._others.append(self._spawn("munged", "-F", "-f", *options))
        self._until((self.files / "munge" / "socket").exists, 10, "munged")

    def _spawn(self, name: str, *args: str) -> subprocess.Popen[str]:
        """A daemon on the head node."""
        with (self.files / "log" / f"{name}.out").open("a") as out:
            return subprocess.Popen(
                [*self._inside, name, *args], stdin=DEVNULL, stdout=out, stderr=out, text=True,
                env=self._environ(), cwd="/", start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _run(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> str:
        done = subprocess.run(
            [*self._inside, f"--wd={cwd or '/'}", *command],
            env=self._environ(environ), stdin=DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def _until(
        self, there: Callable[[], bool], seconds: float, what: str, seen: Callable[[], str] = str
    ) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}. {seen()}\n{self.log()}")
            time.sleep(_POLL)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _this_host() -> str:
    return socket.gethostname().split(".")[0]


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
