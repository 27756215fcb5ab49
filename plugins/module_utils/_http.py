"""One HTTP request under one total deadline, with the standard library alone.

The deadline covers everything a request does after the name look-up (connecting, sending, waiting,
reading): every receive gets only what is left of it, so a server that drips a byte now and then
cannot stretch it. Every way to fail has its own exception, and each names the endpoint, what was
wanted and what was found.

All times are seconds. Proxy environment variables are not read: the endpoints are local services.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MESSAGE_LIMIT = 300  # characters of a server's message that are worth repeating
REMEDIES = {
    401: "; check the API key",
    403: "; check the API key",
    404: "; check the URL and the model name",
    429: "; the server is overloaded: send less or wait",
    503: "; the engine is dead, still loading or its queue is full",
}


@dataclass(frozen=True)
class Endpoint:
    """One server. ``url`` is its base, such as ``http://127.0.0.1:8001``, without ``/v1``.

    Raises ValueError for a URL or a key that cannot work; the message never repeats the key.
    """

    name: str
    url: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        url = self.url.rstrip("/")
        object.__setattr__(self, "url", url)
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")  # what the look-up will do; raises ValueError
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"endpoint {self.name}: wanted a URL such as http://127.0.0.1:8001, found {url!r}")
        if parts.path.endswith("/v1"):
            raise ValueError(f"endpoint {self.name}: wanted the base URL, found {url!r}; leave out the /v1")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise ValueError(
                f"endpoint {self.name}: wanted an API key of printable ASCII characters, "
                f"found one that is empty or has spaces, newlines or other characters in it"
            )

    def __str__(self) -> str:
        return f"{self.name} ({self.url})"


class EndpointError(Exception):
    """A request that did not end well.

    ``kind`` is a short constant for grouping, ``status`` the HTTP status (or the code inside a
    stream's error) if there was one, and ``chunks`` how many pieces with tokens had arrived: above
    zero the user has seen output.
    """

    kind = "error"

    def __init__(self, message: str, status: int | None = None, chunks: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.chunks = chunks


class ConnectFailed(EndpointError):
    """No connection, or it was closed before the first byte of an answer."""

    kind = "connect"


class HttpStatus(EndpointError):
    """An answer other than 200."""

    kind = "http"


class DeadlineExceeded(EndpointError):
    """The total deadline passed, wherever the call was."""

    kind = "deadline"


class ResponseCut(EndpointError):
    """The answer began and ended before it was complete."""

    kind = "cut"


class ResponseFailed(EndpointError):
    """An HTTP 200 that is no answer: an error inside, an aborted request, no token, no JSON."""

    kind = "failed"


def endpoints_of(items: Iterable[Mapping[str, Any]], api_key: str | None) -> list[Endpoint]:
    """Endpoints from ``[{name, url}]``. Raises ValueError for none, or a name or URL used twice."""
    endpoints = [Endpoint(item["name"], item["url"], api_key) for item in items]
    if not endpoints:
        raise ValueError("wanted at least one endpoint, found an empty list")
    for what in ("name", "url"):
        values = [getattr(endpoint, what) for endpoint in endpoints]
        doubled = sorted({value for value in values if values.count(value) > 1})
        if doubled:
            raise ValueError(f"wanted endpoints that differ in {what}, found {', '.join(doubled)} more than once")
    return endpoints


class Exchange:
    """One request and its answer under one deadline.

    As a context manager it turns whatever the network does meanwhile into an EndpointError.
    """

    def __init__(self, endpoint: Endpoint, wanted: str, seconds: float) -> None:
        self.chunks = 0
        self._endpoint = endpoint
        self._wanted = wanted
        self._seconds = seconds
        self._started = time.monotonic()
        self._answered = False
        self._socket: socket.socket | None = None

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._socket is not None:
            self._socket.close()
        if isinstance(error, (OSError, http.client.HTTPException)):
            raise self._translate(error) from error

    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._started

    def remaining(self) -> float:
        """Seconds left, above zero. Raises socket.timeout when there are none."""
        left = self._seconds - self.elapsed()
        if left <= 0:
            raise socket.timeout("deadline passed")
        return left

    def error(self, kind: type[EndpointError], found: str, status: int | None = None) -> EndpointError:
        """An error that names the endpoint, what was wanted and what was found."""
        return kind(f"{self._endpoint}: wanted {self._wanted}, found {found}", status, self.chunks)

    def ask(self, method: str, path: str, payload: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        """Send the request and return the response, its body unread.

        Raises HttpStatus, and what the network raises (see the class) for ``with`` to translate.
        """
        parts = urlsplit(self._endpoint.url)
        secure = parts.scheme == "https"
        host, port = str(parts.hostname), parts.port or (443 if secure else 80)
        self._socket = self._connect(host, port)
        if secure:
            self._socket.settimeout(self.remaining())
            context = ssl.create_default_context()
            self._socket = context.wrap_socket(self._socket, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _Wire(self._socket, self)
        headers = {"Accept": "*/*", "Connection": "close"}
        if self._endpoint.api_key:
            headers["Authorization"] = f"Bearer {self._endpoint.api_key}"
        body = None
        if payload is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(payload).encode()
        connection.request(method, parts.path + path, body, headers)
        response = connection.getresponse()
        self._answered = True
        if response.status != 200:
            raise self._bad_status(response)
        return response

    def _connect(self, host: str, port: int) -> socket.socket:
        # socket.create_connection would give every address of the host the whole timeout.
        failure: OSError | None = None
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _name, address in candidates:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self.remaining())
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure or OSError(f"{host} has no address")

    def _bad_status(self, response: http.client.HTTPResponse) -> EndpointError:
        try:
            message = server_message(response.read(65536))
        except (OSError, http.client.HTTPException):
            message = "and no readable message"  # the status alone already says enough
        found = f"HTTP {response.status} {message}".rstrip() + REMEDIES.get(response.status, "")
        return self.error(HttpStatus, found, response.status)

    def _translate(self, error: Exception) -> EndpointError:
        # The kernel's own ETIMEDOUT is the same class, but it has an errno.
        expired = isinstance(error, socket.timeout) and error.errno is None
        if expired or self.elapsed() >= self._seconds:
            if self.chunks:
                found = f"only {self.chunks} pieces of it"
            else:
                found = "an answer without its end" if self._answered else "no answer"
            return self.error(DeadlineExceeded, f"{found} within {self._seconds:.3g} s")
        what = shorten(getattr(error, "strerror", None) or error) or type(error).__name__
        if self._answered:
            found = f"the connection broken after {self.chunks} pieces of it ({what})"
            return self.error(ResponseCut, found)
        found = f"no answer ({what}); is the server running and listening there?"
        return self.error(ConnectFailed, found)


class _Wire(io.RawIOBase):
    """What http.client uses as its socket: every receive gets only what is left of the deadline."""

    def __init__(self, sock: socket.socket, exchange: Exchange) -> None:
        self._sock = sock
        self._exchange = exchange

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._exchange.remaining())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Wire(self._sock, self._exchange))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._exchange.remaining())
        return self._sock.recv_into(buffer)


def server_message(body: bytes | Mapping[str, Any]) -> str:
    """The human part of an error body, or the start of the body itself."""
    found: Any = body
    if isinstance(found, bytes):
        try:
            found = json.loads(found)
        except ValueError:
            return shorten(body)
    while isinstance(found, dict):
        keys = [key for key in ("error", "message", "detail") if found.get(key)]
        found = found[keys[0]] if keys else str(found)
    return shorten(found)


def shorten(text: object) -> str:
    """One line of at most MESSAGE_LIMIT characters."""
    line = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    line = " ".join(line.split())
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 3] + "..."
