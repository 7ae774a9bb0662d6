"""JSON objects, one a line, over a socket between processes of a job. Nothing is unpickled."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

LONGEST = 4 * 2**20  # bytes of a line; the stacks of a rank need a few thousand
_PATIENCE = 2.0  # seconds for a reader that does not read


class Lines:
    """Reading never waits. `closed`: the other end is gone, or sends what is not ours."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.closed = False
        self._rest = b""
        connection.setblocking(False)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        """A peer that is gone does not take it: `closed` says so."""
        try:
            self.connection.settimeout(_PATIENCE)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
            self.connection.setblocking(False)
        except OSError:
            self.closed = True

    def read(self) -> list[dict[str, Any]]:
        """The messages that have come whole."""
        messages: list[dict[str, Any]] = []
        try:
            while received := self.connection.recv(65536):
                self._rest += received
                if len(self._rest) > LONGEST:
                    break
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *whole, self._rest = self._rest.split(b"\n")
        for line in whole:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            messages.append(message)
        return messages

    def close(self) -> None:
        """Once the other end has closed, too: what was sent last could be lost otherwise."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_PATIENCE)
            while not self.closed and self.connection.recv(65536):
                pass
        self.closed = True
        self.connection.close()
