# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Where the gateway looks for one engine: asked of the HAProxy that runs, and changed there, over its admin socket.

A change is of the running process alone: a reload reads the configuration again. See HAProxy's management guide,
section 9.3.
"""

from __future__ import annotations

import socket

from ._engine_process import EngineError

ADMIN_SOCKET = "/run/vllm-gateway/admin.sock"
SECONDS = 5.0  # for one answer

#: Address (without brackets) and port.
Place = tuple[str, int]


class ServerAddress:
    """The address of the server with this name, in whichever backend it is. All methods raise EngineError."""

    def __init__(self, server: str, path: str = ADMIN_SOCKET) -> None:
        self._server = server
        self._path = path

    def look(self) -> Place:
        """Where the gateway looks now."""
        return self._find()[1]

    def move(self, place: Place) -> None:
        """Have it look there from now on. What is under way stays where it is."""
        backend, _ = self._find()
        answer = self._ask(f"set server {backend}/{self._server} addr {place[0]} port {place[1]}")
        found = self.look()
        if found != place:
            raise EngineError(
                f"wanted the gateway to look for {self._server} at {place[0]} port {place[1]}, "
                f"found it at {found[0]} port {found[1]}: {' '.join(answer.split())}"
            )

    def _find(self) -> tuple[str, Place]:
        """Its backend, and the address."""
        _version, header, *rows = [*self._ask("show servers state").splitlines(), "", ""]
        names = header.lstrip("# ").split()
        for row in rows:
            values = dict(zip(names, row.split()))
            if values.get("srv_name") == self._server:
                return values["be_name"], (values["srv_addr"], int(values["srv_port"]))
        raise EngineError(f"wanted a server {self._server} of the gateway behind {self._path}, found none of that name")

    def _ask(self, command: str) -> str:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(SECONDS)
                connection.connect(self._path)
                connection.sendall(f"{command}\n".encode())
                with connection.makefile("rb") as answer:
                    return answer.read().decode("utf-8", "replace")
        except OSError as error:
            raise EngineError(
                f"wanted the gateway's admin socket {self._path}, found {error.strerror or error}; "
                f"set gateway_socket, and run the task as root"
            ) from error
