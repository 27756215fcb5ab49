"""A stand-in for a vLLM server that misbehaves when told to, and a way to run a module's main()."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ansible.module_utils import _internal, basic
from ansible.module_utils.common import warnings

MODEL = "gpt-oss-120b"


class FakeVLLM:
    """A stand-in for vLLM: real HTTP and SSE over real sockets, with behaviour that a test sets.

    ``chat`` names how completions behave: a method ``chat_NAME`` of the handler below, or an HTTP
    status. What hangs, hangs until the fixture releases it at the end of the test.
    """

    def __init__(self) -> None:
        self.chat = "ok"
        self.health = 200
        self.version = "0.32.0"
        self.models = [MODEL]
        self.words = ["one", " two", " three"]
        self.running = 0
        self.moving = ""  # series that rise from one scrape to the next
        self.series = {
            "vllm:num_requests_running": 0.0,
            "vllm:generation_tokens_total": 100.0,
            "vllm:prompt_tokens_total": 1000.0,
            "vllm:kv_cache_usage_perc": 0.25,
        }
        self.before_chat = lambda: None
        self.latency = 0.0  # seconds before each completion
        self.cuts = 0
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.released = threading.Event()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self.connections: set[socket.socket] = set()
        self.restore()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, path: str) -> list[dict]:
        return [payload for asked, _headers, payload in list(self.requests) if asked == path]

    def restore(self) -> None:
        """Listen, on the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.fake = self
        self.port = self._server.server_address[1]
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.005,), daemon=True).start()

    def die(self) -> None:
        """Refuse connections and break those under way."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # already gone
                connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    fake: FakeVLLM


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.fake = self.server.fake
        self.fake.connections.add(self.connection)

    def finish(self) -> None:
        self.fake.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client left: many of these tests are about that
            super().handle()

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.requests.append((self.path, dict(self.headers), {}))
        if self.path == "/health":
            self.reply(self.fake.health, "")
        elif self.path == "/v1/models":
            entries = [{"id": name, "object": "model"} for name in self.fake.models]
            self.reply(200, json.dumps({"object": "list", "data": entries}))
        elif self.path == "/version":
            self.reply(200, json.dumps({"version": self.fake.version}))
        elif self.path == "/metrics":
            self.reply(200, self.page())
        else:
            self.reply(404, json.dumps({"detail": "Not Found"}))

    def page(self) -> str:
        fake = self.fake
        fake.series["vllm:num_requests_running"] = float(fake.running)
        if fake.moving:
            fake.series[fake.moving] *= 1.5
        lines = ["# HELP vllm:whatever text", "# TYPE vllm:whatever gauge"]
        for name, value in fake.series.items():
            lines.append(f'{name}{{engine="0",model_name="{MODEL}"}} {value}')
        return "\n".join(lines) + "\n"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.requests.append((self.path, dict(self.headers), body))
        self.streamed = body["stream"]
        self.max_tokens = body["max_tokens"]
        self.fake.before_chat()
        if self.fake.latency:
            self.fake.released.wait(self.fake.latency)
        if self.fake.chat.isdigit():
            error = {"message": f"told to answer {self.fake.chat}", "type": "Told", "code": 1}
            self.reply(int(self.fake.chat), json.dumps({"error": error}))
        else:
            getattr(self, f"chat_{self.fake.chat}")()

    # Ways to answer a completion.

    def chat_ok(self, field: str = "content", finish: str = "length") -> None:
        if self.streamed:
            self.begin()
            self.event(self.delta({"role": "assistant", "content": ""}))
            for word in self.fake.words:
                self.event(self.delta({field: word}))
            self.end(finish, len(self.fake.words))
        else:
            text = "".join(self.fake.words)
            choice = {"index": 0, "message": {field: text}, "finish_reason": finish}
            usage = {"completion_tokens": len(self.fake.words)}
            self.reply(200, json.dumps({"choices": [choice], "usage": usage}))

    def chat_reasoning(self) -> None:
        self.chat_ok("reasoning")

    def chat_reasoning_content(self) -> None:
        self.chat_ok("reasoning_content")

    def chat_silent_token(self) -> None:
        """One token of channel syntax: no text, only the usage shows it."""
        self.fake.words = [""]
        self.chat_ok()

    def chat_no_token(self) -> None:
        self.fake.words = []
        self.chat_ok()

    def chat_abort(self) -> None:
        self.fake.words = []
        self.chat_ok(finish="abort")

    def chat_abort_after_tokens(self) -> None:
        self.chat_ok(finish="abort")

    def chat_keep_alive(self) -> None:
        self.begin()
        self.chunk(b": ping\r\n\r\nevent: message\r\nid: 7\r\n")
        self.event(self.delta({"content": "yes"}))
        self.end("stop", 1)

    def chat_hang(self) -> None:
        self.fake.released.wait()

    def chat_hang_after_headers(self) -> None:
        self.begin()
        self.fake.released.wait()

    def chat_hang_after_token(self) -> None:
        self.begin()
        self.event(self.delta({"content": "one"}))
        self.fake.released.wait()

    def chat_drip(self) -> None:
        """Keep-alives for two seconds, then a good answer: only a total deadline notices."""
        self.begin()
        for _ in range(200):
            self.chunk(b": ping\n")
            if self.fake.released.wait(0.01):
                return
        self.end("stop", 1)

    def chat_drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(200):
            self.wfile.write(f"X-Drip-{number}: x\r\n".encode())
            if self.fake.released.wait(0.01):
                return
        self.fake.chat = "ok"

    def chat_close(self) -> None:
        self.close_connection = True

    def chat_reset(self) -> None:
        # With a linger time of 0 the kernel answers with RST instead of FIN.
        linger = b"\x01\0\0\0\0\0\0\0"
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def chat_not_http(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        self.close_connection = True

    def chat_cut_before_token(self) -> None:
        self.begin()
        self.close_connection = True

    def chat_cut_after_token(self) -> None:
        self.begin()
        self.event(self.delta({"content": "one"}))
        self.close_connection = True

    def chat_cut_streams(self) -> None:
        """Cut off streams of users; plain requests and the one token of a probe are well."""
        if self.streamed and self.max_tokens > 1:
            self.chat_cut_after_token()
            self.fake.cuts += 1
        else:
            self.chat_ok()

    def chat_cut_in_chunk(self) -> None:
        self.begin()
        self.event(self.delta({"content": "one"}))
        self.wfile.write(b"400\r\ndata: {half of")
        self.close_connection = True

    def chat_cut_in_body(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.close_connection = True

    def chat_no_done(self) -> None:
        self.begin()
        self.event(self.delta({"content": "one"}))
        self.event(self.delta({}, "length"))
        self.chunk(b"")

    def chat_no_finish(self) -> None:
        self.begin()
        self.event(self.delta({"content": "one"}))
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def chat_error_then_done(self) -> None:
        """What a stream gets when its engine is killed."""
        self.begin()
        error = {"message": "EngineCore encountered an issue", "type": "Dead", "code": 500}
        self.event({"error": error})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def chat_token_error_then_done(self) -> None:
        self.begin()
        self.event(self.delta({"content": "one"}))
        self.event({"error": {"message": "EngineCore encountered an issue", "code": 500}})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def chat_not_json(self) -> None:
        self.reply(200, "<html>It works!</html>")

    # Building blocks.

    def reply(self, status: int, body: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def event(self, piece: dict) -> None:
        self.chunk(b"data: " + json.dumps(piece).encode() + b"\n\n")

    def delta(self, delta: dict, finish: str | None = None) -> dict:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    def end(self, finish: str, tokens: int) -> None:
        self.event(self.delta({}, finish))
        self.event({"choices": [], "usage": {"completion_tokens": tokens}})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")


@pytest.fixture
def make_fake_vllm():
    """Makes stand-ins for vLLM; all of them end with the test."""
    fakes: list[FakeVLLM] = []

    def make() -> FakeVLLM:
        fakes.append(FakeVLLM())
        return fakes[-1]

    yield make
    for fake in fakes:
        fake.released.set()
        fake.die()


@pytest.fixture
def fake_vllm(make_fake_vllm):
    """One healthy stand-in for vLLM."""
    return make_fake_vllm()


@pytest.fixture
def run_module(monkeypatch, capsys):
    """Runs a module's main() as Ansible does and returns the JSON that it printed."""

    def run(main, check_mode: bool = False, **options) -> dict:
        arguments = {**options, "_ansible_check_mode": check_mode}
        encoded = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
        monkeypatch.setattr(basic, "_ANSIBLE_ARGS", encoded)
        monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy")
        # A module is a process of its own; here its warnings would go on to the next one's result.
        monkeypatch.setattr(warnings, "_global_warnings", {})
        # True where the tests of a filter were imported before, and then warnings would go to the terminal.
        monkeypatch.setattr(_internal, "is_controller", False)
        with pytest.raises(SystemExit):
            main()
        return json.loads(capsys.readouterr().out)

    return run
