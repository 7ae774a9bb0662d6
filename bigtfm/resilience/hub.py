"""How the supervisors of a job's ranks talk: rank 0's listens, the others connect; JSON lines over TCP.

Where it listens, and a random token, reach the others through the process group that their trainers have
just formed. Who does not know the token is not listened to.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import selectors
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bigtfm.resilience.lines import Lines

SILENT = (
    10.0  # seconds without a word after which a supervisor counts as gone; they say something every second
)
_PARTING = 3.0  # seconds
_STRANGERS = 64  # connections that have not shown the token yet


@dataclass
class Peer:
    """A supervisor on the other end of a connection."""

    lines: Lines
    heard: float
    rank: int = -1  # -1: it has not said who it is
    pid: int = 0
    host: str = ""

    def gone(self, now: float) -> bool:
        return self.lines.closed or now - self.heard > SILENT

    def kill(self) -> None:
        """Ends a supervisor of this machine that does not answer: stopped, it would stay for ever."""
        if not self.lines.closed and self.host == host() and self.pid:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Hub:
    """Rank 0's end.

    Raises:
        OSError: it can't listen.
    """

    def __init__(self, address: str) -> None:
        self._door = _listen(address)
        self._token = secrets.token_hex(16)
        self.address = [address, self._door.getsockname()[1], self._token]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._peers: list[Peer] = []

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._selector.fileno()

    @property
    def peers(self) -> list[Peer]:
        """Those that have said who they are."""
        return [peer for peer in self._peers if peer.rank >= 0]

    def read(self) -> list[tuple[int, dict[str, Any]]]:
        """(rank, message), as they came."""
        messages = []
        for key, _ in self._selector.select(0):
            if key.fileobj is self._door:
                self._let_in()
                continue
            peer: Peer = key.data
            if peer not in self._peers:  # has just made room for another
                continue
            for message in peer.lines.read():
                peer.heard = time.monotonic()
                if peer.rank >= 0:
                    messages.append((peer.rank, message))
                elif not self._greet(peer, message):
                    peer.lines.closed = True
                    break
            if peer.lines.closed:
                self._selector.unregister(peer.lines.connection)
                peer.lines.connection.close()
                if peer.rank < 0:
                    self._peers.remove(peer)
        return messages

    def tell(self, **message: Any) -> None:
        """Sends a message to all."""
        for peer in self.peers:
            if not peer.lines.closed:
                peer.lines.send(**message)

    def woke(self, now: float) -> None:
        """This process was stopped: that it heard nothing meanwhile says nothing of the others."""
        for peer in self._peers:
            peer.heard = now

    def close(self) -> None:
        """Waits a moment for the others to go: closed earlier, a connection could lose what was said last."""
        until = time.monotonic() + _PARTING
        while time.monotonic() < until and not all(peer.lines.closed for peer in self.peers):
            self._selector.select(0.1)
            self.read()
        self._selector.close()
        for closing in (self._door, *(peer.lines.connection for peer in self._peers)):
            closing.close()

    def _let_in(self) -> None:
        with suppress(OSError):
            connection, _ = self._door.accept()
            strangers = [peer for peer in self._peers if peer.rank < 0]
            if len(strangers) >= _STRANGERS:  # the oldest has had its time to show the token
                self._selector.unregister(strangers[0].lines.connection)
                strangers[0].lines.connection.close()
                self._peers.remove(strangers[0])
            peer = Peer(Lines(connection), time.monotonic())
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _greet(self, peer: Peer, hello: dict[str, Any]) -> bool:
        token, rank, pid = hello.get("token"), hello.get("rank"), hello.get("pid")
        known = isinstance(token, str) and secrets.compare_digest(
            token.encode(errors="replace"), self._token.encode()
        )
        if not known or not isinstance(rank, int) or not isinstance(pid, int):
            return False
        peer.rank, peer.pid, peer.host = rank, pid, str(hello.get("host"))
        return True


def join(address: list[Any], rank: int) -> Peer:
    """The connection of another rank's supervisor to the hub.

    Raises:
        OSError: it can't be reached.
    """
    place, port, token = address
    lines = Lines(socket.create_connection((place, port), timeout=5.0))
    lines.send(token=token, rank=rank, pid=os.getpid(), host=host())
    return Peer(lines, time.monotonic(), rank=0)


def host() -> str:
    """This machine, as no other is called."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()} {file.read().strip()} {_namespace()}"
    return socket.gethostname()


def _namespace() -> str:
    """Process ids mean the same only within it."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _listen(address: str) -> socket.socket:
    """On the loopback alone where all ranks are on this machine."""
    found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
    family, place = found[0], str(found[4][0])
    if not ipaddress.ip_address(place).is_loopback:
        place = "::" if family == socket.AF_INET6 else ""
    return socket.create_server((place, 0), family=family, backlog=1024)
