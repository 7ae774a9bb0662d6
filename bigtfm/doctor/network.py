"""How ranks will meet: names, addresses, ports; each tried with two real sockets."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from time import perf_counter

from bigtfm.config.launch import RENDEZVOUS, Launch
from bigtfm.config.problems import ConfigProblem
from bigtfm.doctor.findings import Finding, error, ok, warning

DEEPSPEED_PORT = 29500  # the launcher's, unless --master_port says otherwise
SECONDS = 3.0  # for a connection
SLOW_NAMES = 1.0  # seconds


def check_names(host: str) -> list[Finding]:
    """Two sockets that meet on loopback, and at the address of this machine's name, as gloo's ranks do."""
    found = []
    problem = _meet("127.0.0.1")
    if problem:
        found.append(error("loopback", f"127.0.0.1: {problem}", "bring it up: ip link set lo up"))
    else:
        found.append(ok("loopback", "two sockets meet at 127.0.0.1"))
    began = perf_counter()
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0])
    except OSError as failure:
        fix = f"add a line '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface"
        return [*found, error("host name", f"{host} has no address ({failure.strerror})", fix)]
    seconds = perf_counter() - began
    if problem := _meet(address):
        fix = f"correct {host}'s address (/etc/hosts), or set GLOO_SOCKET_IFNAME to a network interface"
        found.append(warning("host name", f"{host} is {address}, where no socket can listen: {problem}", fix))
    elif seconds > SLOW_NAMES:
        text = f"{host} is {address}, known after {seconds:.1f} s"
        found.append(warning("host name", text, "add it to /etc/hosts, or mend the name server"))
    else:
        found.append(ok("host name", f"two sockets meet at {host} ({address})"))
    return found


def _meet(address: str) -> str | None:
    """Why a socket that listens there can't be reached; None: it can."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.settimeout(SECONDS)
            listening.bind((address, 0))
            listening.listen(1)
            with socket.create_connection(listening.getsockname()[:2], SECONDS) as there:
                here, _ = listening.accept()
                with here:
                    here.settimeout(SECONDS)
                    there.sendall(b"ping")
                    return None if here.recv(4) == b"ping" else "what is sent does not arrive"
    except OSError as failure:
        return failure.strerror or str(failure)


def check_rendezvous(environ: Mapping[str, str]) -> list[Finding]:
    """RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT of the environment; or the launcher's port."""
    given = [name for name in RENDEZVOUS if name in environ]
    if not given:
        if _taken("", DEEPSPEED_PORT):
            text = f"port {DEEPSPEED_PORT}, which `deepspeed` takes unless told otherwise, is in use"
            return [warning("ports", text, "pass another one: deepspeed --master_port N")]
        return (
            [ok("ports", f"{DEEPSPEED_PORT} is free, and so are others")] if _free_port() else [_no_ports()]
        )
    if set(given) <= {"MASTER_ADDR", "MASTER_PORT"}:
        address, port = (
            environ.get("MASTER_ADDR", "127.0.0.1"),
            environ.get("MASTER_PORT", str(DEEPSPEED_PORT)),
        )
    else:
        try:
            Launch.from_environment(environ, 0)
        except ConfigProblem as problem:
            return [error("rendezvous", problem.what, problem.fix)]
        address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    return [_master(address, port)]


def _master(address: str, port: str) -> Finding:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return error("rendezvous", f"MASTER_PORT={port} is no port", "set it to a number from 1 to 65535")
    try:
        socket.getaddrinfo(address, None)
    except OSError as failure:
        fix = "set it to the name or address of rank 0's machine"
        return error("rendezvous", f"MASTER_ADDR={address} has no address ({failure.strerror})", fix)
    place = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    if _meet(address):
        return ok("rendezvous", f"{place}: another machine, not asked")
    if _taken(address, int(port)):
        return error(
            "rendezvous", f"{place}: the port is in use", "set MASTER_PORT to a free one, or end its owner"
        )
    return ok("rendezvous", f"{place}: here, and free")


def _taken(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return True
    return False


def _free_port() -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", 0))
        except OSError:
            return False
    return True


def _no_ports() -> Finding:
    return error("ports", "no port is free", "end programs that hold connections open: ss -s")


def check_interfaces(environ: Mapping[str, str]) -> list[Finding]:
    """GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name interfaces that are there."""
    there = [name for _, name in socket.if_nameindex()]
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environ.get(variable, "")
        if not wanted:
            continue
        exact = wanted.startswith("=") or variable.startswith("GLOO")
        names = wanted.lstrip("=^").split(",")
        lacking = [n for n in names if not any(n == t if exact else t.startswith(n) for t in there)]
        if lacking and not wanted.startswith("^"):
            text = f"{variable}={wanted}: no interface {', '.join(lacking)}"
            found.append(error("interfaces", text, f"set it to one of {', '.join(there)}, or unset it"))
        else:
            found.append(ok("interfaces", f"{variable}={wanted}"))
    return found
