"""A proxy between a libvirtd, or diskchain, and the monitor of a QEMU: sees each command, and can do something as soon as
it was sent.

With it a daemon is killed at an exact place: after QEMU got a command, before the daemon saw the answer.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class MonitorTap:
    """Takes the place of QEMU's socket while no daemon runs; `close` gives it back."""

    def __init__(self, path: Path) -> None:
        self._path, self._real = path, path.with_name("m")  # the name of a socket is short
        path.rename(self._real)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._word = b""
        self._action: Callable[[], None] = lambda: None
        self._muted, self._answered = False, threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def once(self, command: str, action: Callable[[], None]) -> None:
        """After the next `command` was passed on, do that; the answer to it is thrown away."""
        self._action = action
        self._word = b'"execute":"' + command.encode() + b'"'

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client, socket.socket(socket.AF_UNIX) as qemu:
                try:
                    qemu.connect(str(self._real))
                except OSError:  # that QEMU is gone; so says the end of the connection
                    continue
                back = threading.Thread(target=self._copy_back, args=(qemu, client), daemon=True)
                back.start()
                with suppress(OSError):
                    self._forward(client, qemu)
                with suppress(OSError):
                    qemu.shutdown(socket.SHUT_RDWR)
                back.join()

    def _forward(self, client: socket.socket, qemu: socket.socket) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(client, 1 << 20, 16)
            if not data:
                return
            wanted = bool(self._word) and self._word in data
            if wanted:
                self._word, self._muted = b"", True
                self._answered.clear()
            socket.send_fds(qemu, [data], fds)
            for fd in fds:
                socket.close(fd)
            if wanted:
                self._answered.wait(30)
                self._action()
                self._muted = False
                return

    def _copy_back(self, qemu: socket.socket, client: socket.socket) -> None:
        line = b""
        with suppress(OSError):
            while data := qemu.recv(1 << 20):
                *whole, line = (line + data).split(b"\n")
                if any(not json.loads(said).keys().isdisjoint({"return", "error"}) for said in whole):  # not an event
                    self._answered.set()
                if not self._muted:
                    client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Put QEMU's own socket back, unless it went with QEMU."""
        self._listening.close()
        with suppress(FileNotFoundError):
            self._path.unlink()
            self._real.rename(self._path)
