# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A TCP relay in front of one engine that misbehaves when told to, for the failover drill.

It lives in the drill's own process, so nothing of it stays on the host. It looks into HTTP/1.1 only
as far as it must: requests with a body (POST, completions) are disturbed, health checks (GET) pass.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
from urllib.parse import urlsplit

from ._http import Endpoint

PASS = "pass"
STORM503 = "storm503"
SLOW = "slow"
RESET = "reset"

SLOW_SECONDS = 0.5  # before each piece of an answer
RESET_EVENTS = 3  # of a stream come through before the reset: the first one carries no token
CONNECT_SECONDS = 5.0
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
    b"Connection: close\r\n\r\n{}"
)
_RESET_ON_CLOSE = b"\x01\0\0\0\0\0\0\0"  # struct linger: on, 0 s
_HEAD_END = b"\r\n\r\n"


class Relay:
    """Forwards ``127.0.0.1:port`` to an engine. ``mode`` may change at any time; thread-safe.

    With port 0 the kernel chooses one at start().
    """

    def __init__(self, engine: Endpoint, port: int = 0, slow_seconds: float = SLOW_SECONDS) -> None:
        parts = urlsplit(engine.url)
        self._upstream = (str(parts.hostname), parts.port or 80)
        self.port = port
        self._slow_seconds = slow_seconds
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        self.mode = PASS

    def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self._listener,), name="relay", daemon=True).start()

    def close(self) -> None:
        """Stop listening; connections end within a second."""
        self._closing.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):  # closed already
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                client, _address = listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), name="relayed", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # An end that breaks is what relays are there to pass on: the other end is closed, too.
        with contextlib.suppress(OSError), client, socket.create_connection(self._upstream, CONNECT_SECONDS) as engine:
            for end in (client, engine):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._forward(client, engine)

    def _forward(self, client: socket.socket, engine: socket.socket) -> None:
        completion = False  # whether the request under way is one to disturb
        answer = b""
        while not self._closing.is_set():
            ready = select.select([client, engine], [], [], 0.5)[0]
            if client in ready:
                data = client.recv(65536)
                if not data:
                    return
                if re.match(rb"[A-Z]+ /", data):
                    completion, answer = data.startswith(b"POST "), b""
                if completion and self.mode == STORM503:
                    _read_rest(client, data)
                    client.sendall(REFUSAL)
                    return
                engine.sendall(data)
            if engine in ready:
                data = engine.recv(65536)
                if not data:
                    return
                if completion and self.mode == SLOW:
                    self._closing.wait(self._slow_seconds)
                if completion and self.mode == RESET:
                    end = cut_position(answer + data)
                    if end is not None:
                        client.sendall(data[: max(end - len(answer), 0)])
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                        return
                    answer += data
                client.sendall(data)


def cut_position(answer: bytes) -> int | None:
    """Where to break an answer off: after some events of a stream, in half of another body; None for not yet."""
    head, end, body = answer.partition(_HEAD_END)
    if not end or not body:
        return None
    begin = len(head) + len(end)
    if b"text/event-stream" not in head.lower():
        return begin + len(body) // 2
    events = [match.end() for match in re.finditer(rb"\n\n", body)]
    return begin + events[RESET_EVENTS - 1] if len(events) >= RESET_EVENTS else None


def _read_rest(client: socket.socket, data: bytes) -> None:
    """Take in the whole request: closing with unread data would reset the connection before its answer is read."""
    while _HEAD_END not in data:
        more = client.recv(65536)
        if not more:
            return
        data += more
    head, _end, body = data.partition(_HEAD_END)
    length = re.search(rb"content-length: *(\d+)", head.lower())
    left = int(length.group(1)) - len(body) if length else 0
    while left > 0:
        more = client.recv(65536)
        if not more:
            return
        left -= len(more)
