"""A guest agent that answers what a test wants: nonsense, too much, or nothing. It listens where QEMU would."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

COMMANDS = ["guest-fsfreeze-freeze", "guest-fsfreeze-status", "guest-fsfreeze-thaw", "guest-set-time", "guest-get-time"]


class FakeAgent:
    """Given answers by command, serve one client after the other.

    A value is returned as JSON, `bytes` go out as they are, None is silence, a function is called for the answer.
    `flood`: write that for ever as soon as somebody connects. What was asked stands in `asked`.
    """

    def __init__(self, path: Path, answers: Mapping[str, Any] | None = None, *, flood: bytes = b"") -> None:
        self.asked: list[str] = []
        self._answers = {"guest-info": {"supported_commands": [{"name": c, "enabled": True} for c in COMMANDS]},
                         "guest-fsfreeze-status": self._status, "guest-fsfreeze-freeze": self._freeze,
                         "guest-fsfreeze-thaw": self._thaw, **(answers or {})}  # fmt: skip
        self._flood = flood
        self.frozen = 0
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for end in (self._server, self._client):
            with contextlib.suppress(OSError, AttributeError):
                end.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        self._server.close()
        self._thread.join(10)

    def answer(self, command: str, value: Any) -> None:
        """From now on it answers so."""
        self._answers[command] = value

    def _status(self) -> str:
        return "frozen" if self.frozen else "thawed"

    def _freeze(self) -> int:
        self.frozen = 2
        return 2

    def _thaw(self) -> int:
        count, self.frozen = self.frozen, 0
        return count

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._client, _ = self._server.accept()
                with self._client, contextlib.suppress(ConnectionError):
                    self._talk(self._client)

    def _talk(self, client: socket.socket) -> None:
        while self._flood:
            client.sendall(self._flood)
        with client.makefile("rb") as lines:
            for line in lines:
                question = json.loads(line.lstrip(b"\xff"))
                self._reply(client, question["execute"], question.get("arguments", {}))

    def _reply(self, client: socket.socket, command: str, arguments: Mapping[str, Any]) -> None:
        if command == "guest-sync-delimited" and command not in self._answers:
            client.sendall(b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n")
            return
        self.asked.append(command)
        answer = self._answers.get(command)
        if callable(answer):
            answer = answer()
        if isinstance(answer, bytes):
            client.sendall(answer)
        elif answer is not None:
            client.sendall(json.dumps({"return": answer}).encode() + b"\n")
