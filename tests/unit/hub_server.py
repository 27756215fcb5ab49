#!/usr/bin/env python3
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A stand-in for huggingface.co: a real HTTP server that speaks the hub's API for one generated repository.

    tests/unit/hub_server.py DIRECTORY --repository openai/gpt-oss-120b --revision HEX40 --port 8800 --large 4096
    tests/unit/hub_server.py DIRECTORY ... --fault cut,path=*00002*,after=100000,times=2 --fault ratelimit

Where DIRECTORY is empty or not there, a small checkpoint is generated in it. Files of ``large`` bytes or more are
what a hub keeps in LFS: a redirect leads to ``/storage/...?Signature=...``, on a second port with --other-origin.

Faults, each with ``path`` (a pattern for the requested path), ``times`` (-1: for ever), ``after`` (bytes of the body
that are sent before it) and ``seconds``:

    cut, reset        break the connection in a body, with FIN or with RST
    trickle           from then on one byte every ``seconds``, until released
    corrupt           one wrong byte in a body
    norange           ignore Range: 200 and the whole file
    longer, shorter   list a file one byte shorter, or longer, than it is
    token             401 unless a token is sent
    gated             403, the licence is not accepted
    repository, revision, entry   404 as the hub says it
    ratelimit         429, to come back after ``seconds``
    html              200 with a page instead of an answer
    redirect          to the other origin
    500, 503, ...     that status

While it runs: GET /control/requests tells what was asked, POST /control/faults replaces the faults (one a line, as
--fault takes them), POST /control/release ends what trickles.

The standard library alone; Python 3.9 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import random
import socket
import struct
import sys
import threading
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

REPOSITORY = "openai/gpt-oss-120b"
REVISION = "b5c939de8f754692c1647ca79fbf85e8c1e70f8a"
PIECE = 65536  # bytes sent at a time
BODY_FAULTS = ("cut", "reset", "trickle", "corrupt", "norange")
LISTING_FAULTS = ("longer", "shorter")


@dataclass
class Fault:
    """Something that goes wrong ``times`` times (-1: for ever) where the path fits the pattern."""

    name: str
    path: str = "*"
    times: int = 1
    after: int = 0  # bytes of a body that are sent before it
    seconds: float = 1
    #: For cut and reset: awaited before the connection breaks, so that a test knows what had arrived.
    ready: threading.Event | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """``NAME,path=PATTERN,times=1,after=0,seconds=1``. Raises ValueError."""
        name, *options = text.strip().split(",")
        known = (*BODY_FAULTS, *LISTING_FAULTS, *_REFUSALS, "token", "ratelimit", "html", "redirect")
        if name not in known and not name.isdigit():
            raise ValueError(f"{name!r} is no fault, wanted one of {', '.join(known)} or an HTTP status")
        fault = cls(name)
        for option in options:
            key, _equals, value = option.partition("=")
            if key not in ("path", "times", "after", "seconds"):
                raise ValueError(f"{key!r} is no option of a fault")
            setattr(fault, key, type(getattr(cls, key))(value))
        return fault


_REFUSALS = {
    "gated": (403, "GatedRepo", "Access to model is restricted and you are not in the authorized list."),
    "repository": (404, "RepoNotFound", "Repository not found"),
    "revision": (404, "RevisionNotFound", "Invalid rev id"),
    "entry": (404, "EntryNotFound", "Entry not found"),
}


@dataclass
class Request:
    """What was asked, and how many bytes of a body were sent."""

    method: str
    path: str
    query: str
    headers: dict[str, str]  # names in small letters
    port: int
    status: int = 0
    sent: int = 0


@dataclass
class HubServer:
    """The server; a context manager. What a test sets, it can change while the server runs."""

    directory: str | Path
    repository: str = REPOSITORY
    revision: str = REVISION
    large: int = 10_000_000  # from this size on, a file is in the storage; bytes
    port: int = 0
    address: str = "127.0.0.1"
    other_origin: bool = False  # whether the storage is on a port of its own
    page: int = 0  # entries on a page of the list of files; 0: all
    token: str = ""  # the token that is accepted; empty: any, and none
    main: str = ""  # the commit that main is at; empty: the revision
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    storage_port: int = 0

    def __post_init__(self) -> None:
        self.directory = Path(self.directory)
        self._lock = threading.Lock()
        self._servers: list[_Server] = []
        self._connections: set[socket.socket] = set()
        self._sums: dict[tuple[str, int, int], tuple[str, str]] = {}

    def __enter__(self) -> HubServer:
        self.port = self._listen(self.port)
        self.storage_port = self._listen(self.storage_port) if self.other_origin else self.port
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # already gone
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, port: int) -> int:
        server = _Server((self.address, port), _Handler)
        server.hub = self
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return int(server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def fail(
        self,
        name: str,
        path: str = "*",
        times: int = 1,
        after: int = 0,
        seconds: float = 1,
        ready: threading.Event | None = None,
    ) -> None:
        """Let something go wrong, see the faults above."""
        with self._lock:
            self.faults.append(Fault(name, path, times, after, seconds, ready))

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        """The requests so far for paths that fit the pattern."""
        return [one for one in list(self.requests) if one.method == method and fnmatch.fnmatchcase(one.path, pattern)]

    def take(self, path: str, names: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Fault | None:
        """The first fault for a path, which is counted as having happened."""
        with self._lock:
            for fault in self.faults:
                fits = (not names or fault.name in names) and fault.name not in without
                if fits and fault.times and fnmatch.fnmatchcase(path, fault.path):
                    fault.times -= 1 if fault.times > 0 else 0
                    return fault
        return None

    def sums(self, path: str) -> tuple[str, str]:
        """SHA-256 and git's blob identifier of a file."""
        file = Path(self.directory, path)
        found = file.stat()
        key = (path, found.st_size, found.st_mtime_ns)
        if key not in self._sums:
            sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % found.st_size)
            with file.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    sha256.update(piece)
                    sha1.update(piece)
            self._sums[key] = sha256.hexdigest(), sha1.hexdigest()
        return self._sums[key]

    def tree(self) -> list[dict]:
        """The list of files, as the hub has it."""
        entries: list[dict] = []
        for file in sorted(Path(self.directory).rglob("*")):
            path = file.relative_to(self.directory).as_posix()
            if file.is_dir():
                oid = hashlib.sha1(path.encode()).hexdigest()
                entries.append({"type": "directory", "oid": oid, "size": 0, "path": path})
                continue
            size = file.stat().st_size
            sha256, sha1 = self.sums(path)
            lfs = size >= self.large
            fault = self.take(path, LISTING_FAULTS)
            size += {"": 0, "longer": -1, "shorter": 1}[fault.name if fault else ""]
            entry = {"type": "file", "oid": sha1, "size": size, "path": path}
            if lfs:
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 135}
                entry["xetHash"] = sha256  # a real hub has it for all large files
            entries.append(entry)
        return entries


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.hub._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client left
            super().handle()

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if path == "/control/requests":
            self.answer(200, [asdict(request) for request in list(self.hub.requests)])
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked = Request(self.command, path, parts.query, headers, self.server.server_address[1])
        self.hub.requests.append(self.asked)
        if path.startswith("/storage/"):
            self.storage(path)
        elif not self.refused(path):
            self.api(path, parse_qs(parts.query))

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.path == "/control/release":
            self.hub.released.set()
            self.answer(200, {})
        elif self.path == "/control/faults":
            try:
                faults = [Fault.parse(line) for line in text.splitlines() if line.strip()]
            except ValueError as error:
                self.answer(400, {"error": str(error)})
                return
            self.hub.released.clear()
            self.hub.faults[:] = faults
            self.answer(200, {})
        else:
            self.answer(404, {"error": "no such control"})

    # Requests

    def refused(self, path: str) -> bool:
        """Whether a fault, or the hub's own rules, answered."""
        repository, authorization = self.hub.repository, self.headers.get("Authorization", "")
        if self.hub.token and authorization and authorization != f"Bearer {self.hub.token}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return True
        if not path.startswith((f"/api/models/{repository}", f"/{repository}/")):
            if authorization:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:  # a hub does not tell what is private from what is not there
                self.refuse(401, "RepoNotFound", "Invalid username or password.")
            return True
        if self.hub.token and not authorization:
            self.refuse(401, "GatedRepo", "Access to model is restricted. You must be authenticated to access it.")
            return True
        fault = self.hub.take(path, without=BODY_FAULTS + LISTING_FAULTS + (("token",) if authorization else ()))
        if fault is not None:
            self.misbehave(fault, path)
        return fault is not None

    def misbehave(self, fault: Fault, path: str) -> None:
        if fault.name == "token":
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif fault.name == "ratelimit":
            seconds = str(int(fault.seconds))
            self.refuse(429, "", "We had to rate limit you", {"Retry-After": seconds})
        elif fault.name == "html":
            self.page("<html><title>Sign in</title></html>")
        elif fault.name == "redirect":
            self.redirect(f"http://{self.hub.address}:{self.hub.storage_port}{quote(path)}")
        elif fault.name in _REFUSALS:
            self.refuse(*_REFUSALS[fault.name])
        else:
            self.refuse(int(fault.name), "", "told to fail")

    def api(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        api, resolve = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if path == api:
            self.answer(200, self.model(hub.main or hub.revision))
            return
        if path.startswith(resolve):
            revision, _slash, file = path[len(resolve) :].partition("/")
        else:
            kind, _slash, revision = path[len(api) + 1 :].partition("/")
            if kind not in ("tree", "revision"):
                self.refuse(404, "", "Sorry, we can't find the page you are looking for.")
                return
        if revision not in (hub.revision, "main"):
            self.refuse(*_REFUSALS["revision"])
        elif path.startswith(resolve):
            self.resolve(file)
        elif kind == "revision":
            self.answer(200, self.model(hub.revision))
        else:
            self.tree(path, query)

    def model(self, commit: str) -> dict:
        files = [{"rfilename": entry["path"]} for entry in self.hub.tree() if entry["type"] == "file"]
        return {"id": self.hub.repository, "modelId": self.hub.repository, "sha": commit, "siblings": files}

    def tree(self, path: str, query: dict[str, list[str]]) -> None:
        entries = self.hub.tree()
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"]]
        first, page = int(query.get("cursor", ["0"])[0]), self.hub.page or len(entries) or 1
        headers = {}
        if first + page < len(entries):
            url = f"http://{self.headers['Host']}{quote(path)}?recursive=true&cursor={first + page}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.answer(200, entries[first : first + page], headers)

    def resolve(self, path: str) -> None:
        file = self.file(path)
        if file is None:
            self.refuse(*_REFUSALS["entry"])
            return
        sha256, sha1 = self.hub.sums(path)
        size = file.stat().st_size
        headers = {"X-Repo-Commit": self.hub.revision, "Accept-Ranges": "bytes"}
        if size < self.hub.large:
            self.body(file, {**headers, "ETag": f'"{sha1}"'})
            return
        headers.update({"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size), "ETag": f'"{sha256}"'})
        host = self.headers["Host"].rpartition(":")[0] or self.hub.address
        target = f"http://{host}:{self.hub.storage_port}/storage/{quote(path)}?Signature=signed-{sha256[:8]}"
        self.redirect(target, headers)

    def storage(self, path: str) -> None:
        fault = self.hub.take(path, without=BODY_FAULTS + LISTING_FAULTS)
        file = self.file(path[len("/storage/") :])
        if fault is not None:
            self.misbehave(fault, path)
        elif file is None or "Signature=signed-" not in self.path:
            self.refuse(403, "", "AccessDenied")
        else:
            self.body(file, {"ETag": f'"{self.hub.sums(path[len("/storage/") :])[0]}"'})

    def file(self, path: str) -> Path | None:
        root = Path(self.hub.directory).resolve()
        file = (root / path).resolve()
        return file if file.is_file() and root in file.parents else None

    # Answers

    def body(self, file: Path, headers: dict[str, str]) -> None:
        size = file.stat().st_size
        path = self.asked.path
        fault = self.hub.take(path, BODY_FAULTS) if self.command == "GET" else None
        begin, end = 0, size
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and not (fault and fault.name == "norange"):
            first, _dash, last = wanted[len("bytes=") :].partition("-")
            begin, end = int(first or 0), min(int(last) + 1 if last else size, size)
            if begin >= size:
                self.refuse(416, "", "", {"Content-Range": f"bytes */{size}"})
                return
            self.begin(206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}, end - begin)
        else:
            self.begin(200, headers, size)
        if self.command == "HEAD":
            return
        with file.open("rb") as stream:
            stream.seek(begin)
            limit = min(begin + fault.after, end) if fault and fault.name in ("cut", "reset", "trickle") else end
            wrong = begin + fault.after if fault and fault.name == "corrupt" else -1
            while (position := stream.tell()) < limit:
                piece = bytearray(stream.read(min(PIECE, limit - position)))
                if position <= wrong < position + len(piece):
                    piece[wrong - position] ^= 1
                self.send(piece)
            if limit < end and fault:
                if fault.name == "trickle":
                    while stream.tell() < end and not self.hub.released.wait(fault.seconds):
                        self.send(stream.read(1))
                    while piece := bytearray(stream.read(min(PIECE, end - stream.tell()))):
                        self.send(piece)
                else:
                    self.break_off(fault)

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.asked.sent += len(data)

    def break_off(self, fault: Fault) -> None:
        if fault.ready is not None:
            fault.ready.wait(30)
        if fault.name == "reset":
            # With a linger time of 0 the kernel answers with RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def begin(self, status: int, headers: dict[str, str], length: int) -> None:
        if hasattr(self, "asked"):
            self.asked.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.begin(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if code:
            headers["X-Error-Code"] = code
        if message:
            headers["X-Error-Message"] = message
        self.answer(status, {"error": message}, headers)

    def page(self, text: str) -> None:
        self.begin(200, {"Content-Type": "text/html"}, len(text))
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def redirect(self, target: str, headers: dict[str, str] | None = None) -> None:
        self.begin(302, {**(headers or {}), "Location": target}, 0)


def write_repository(directory: str | Path, shards: int = 3, shard_bytes: int = 300_000) -> list[str]:
    """Generate a small checkpoint of the form of gpt-oss-120b, always the same one; returns its files' paths.

    Its shards are real safetensors with about ``shard_bytes`` of data each, and its index is right; the values
    mean nothing. ``original/`` and ``metal/`` hold what a deployment leaves out.
    """
    root = Path(directory)
    width = 64
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": shards,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(shards)],
        "rms_norm_eps": 1e-05,
        "rope_theta": 150000,
        "torch_dtype": "bfloat16",
        "eos_token_id": 200002,
        "pad_token_id": 199999,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {chr(33 + code): code for code in range(90)}, "merges": []},
    }
    texts = {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": "---\nlicense: apache-2.0\n---\n\n# A generated checkpoint\n",
        "chat_template.jinja": "{%- for message in messages %}{{ message.content }}{% endfor %}\n",
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps({"do_sample": True, "eos_token_id": [200002]}, indent=2) + "\n",
        "tokenizer.json": json.dumps(tokenizer, indent=2) + "\n",
        "tokenizer_config.json": json.dumps({"model_max_length": 131072}, indent=2) + "\n",
        "original/config.json": "{}\n",
        "metal/model.bin": "not for this deployment\n",
    }
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(1, shards + 1):
        path = f"model-{number:05}-of-{shards:05}.safetensors"
        rows = max(shard_bytes // (2 * width), 1)
        shapes = {
            f"model.layers.{number - 1}.input_layernorm.weight": [width],
            f"model.layers.{number - 1}.mlp.experts.weight": [rows, width],
        }
        header: dict[str, dict] = {}
        position = 0
        for name, shape in shapes.items():
            size = 2 * width * (shape[0] if len(shape) == 2 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
            weight_map[name] = path
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        data = random.Random(number)
        with (root / path).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for begin in range(0, position, 1 << 20):
                stream.write(data.randbytes(min(1 << 20, position - begin)))
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A stand-in for huggingface.co; see the top of this file.")
    parser.add_argument("directory")
    parser.add_argument("--repository", default=REPOSITORY)
    parser.add_argument("--revision", default=REVISION)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--large", type=int, default=4096, metavar="BYTES", help="from this size on, in the storage")
    parser.add_argument("--other-origin", action="store_true", help="the storage on a port of its own")
    parser.add_argument("--storage-port", type=int, default=0, help="with --other-origin; default: any")
    parser.add_argument("--token", default="", help="ask for this token")
    parser.add_argument("--main", default="", metavar="HEX40", help="the commit that main is at")
    parser.add_argument("--page", type=int, default=0, metavar="ENTRIES", help="list the files in pages")
    parser.add_argument("--shards", type=int, default=3, help="of the checkpoint to generate")
    parser.add_argument("--shard-bytes", type=int, default=300_000)
    parser.add_argument("--fault", action="append", default=[], metavar="NAME[,path=PATTERN][,times=N][,after=BYTES]")
    chosen = vars(parser.parse_args(arguments))
    shards, shard_bytes, faults = chosen.pop("shards"), chosen.pop("shard_bytes"), chosen.pop("fault")
    try:
        chosen["faults"] = [Fault.parse(text) for text in faults]
    except ValueError as error:
        parser.error(str(error))
    if not os.path.isdir(chosen["directory"]) or not os.listdir(chosen["directory"]):
        write_repository(chosen["directory"], shards, shard_bytes)
    with HubServer(**chosen) as server, contextlib.suppress(KeyboardInterrupt):
        print(server.url, flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
