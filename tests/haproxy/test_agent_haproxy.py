"""The health agent's words, said to a real HAProxy: its own parser decides what they mean."""

from __future__ import annotations

import csv
import io
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._agent import Canary, Look, Thresholds, Watch

HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"
CONFIGURATION = """
global
  stats socket {socket} mode 600
defaults
  mode http
  timeout connect 1s
  timeout client 10s
  timeout server 10s
backend engines
  default-server check inter 100ms agent-check agent-addr 127.0.0.1 agent-port {agent} agent-inter 100ms
  server primary 127.0.0.1:{engine} agent-send "primary\\n"
"""
WELL = Look("answered", {"vllm:num_requests_running": 3.0, "vllm:generation_tokens_total": 9.0}, unit="active")


def until(found, seconds=15.0):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Engine(BaseHTTPRequestHandler):
    """A stand-in for an engine: it is always alive."""

    def do_OPTIONS(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class Door:
    """HAProxy, which asks a stand-in for the daemon; that one says what a Watch says."""

    def __init__(self, path):
        self.watch = Watch("primary", Thresholds(), 0.0)
        self.asked = []
        self.now = 0.0
        door = self

        class Agent(socketserver.StreamRequestHandler):
            def handle(self):
                door.asked.append(self.rfile.readline())
                self.wfile.write(f"{door.watch.word()}\n".encode() if door.watch.word() else b"")

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

        self.servers = [Server(("127.0.0.1", 0), Agent), ThreadingHTTPServer(("127.0.0.1", 0), Engine)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        agent, engine = (server.server_address[1] for server in self.servers)
        self.socket = path / "haproxy.sock"
        text = CONFIGURATION.format(socket=self.socket, agent=agent, engine=engine)
        (path / "haproxy.cfg").write_text(text)
        self.process = subprocess.Popen([HAPROXY, "-f", str(path / "haproxy.cfg")], stderr=subprocess.DEVNULL)
        until(self.socket.exists)

    def sees(self, look):
        """The engine is looked at, and HAProxy then asks."""
        self.now += 5.0
        self.watch.observe(look, self.now, self.now)
        count = len(self.asked)
        until(lambda: len(self.asked) > count + 1)

    def canary(self, canary):
        self.watch.canary_begins(self.now)
        self.now += 4.0
        self.watch.canary_ends(canary, self.now)

    def server(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.socket))
            sock.sendall(b"show stat -1 4 -1\n")
            answer = b""
            while data := sock.recv(65536):
                answer += data
        return next(csv.DictReader(io.StringIO(answer.decode().lstrip("# "))))

    def becomes(self, status):
        until(lambda: self.server()["status"] == status)

    def close(self):
        self.process.kill()
        self.process.wait()
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def door(tmp_path):
    made = Door(tmp_path)
    yield made
    made.close()


def test_haproxy_understands_every_word(door):
    door.sees(WELL)
    assert door.watch.word() is None
    assert door.server()["status"] == "UP"  # nothing said, nothing changed
    assert set(door.asked) == {b"primary\n"}

    door.canary(Canary("ok"))
    door.sees(WELL)
    assert door.server()["agent_status"] == "L7OK"

    door.canary(Canary("failed", "no answer within 4 s", 4.0, True))
    door.sees(WELL)
    door.becomes("DOWN (agent)")
    assert "no token for" in door.server()["last_agt"]

    door.sees(WELL._replace(drain="new driver"))
    assert door.watch.word().startswith("drain down #")
    assert door.server()["status"] == "DOWN (agent)"

    door.canary(Canary("ok"))
    door.sees(WELL._replace(drain="new driver"))
    assert door.watch.word() == "drain"
    door.sees(WELL)
    door.becomes("UP")

    door.sees(WELL._replace(drain="new driver"))
    door.becomes("DRAIN (agent)")
    door.sees(WELL)
    door.becomes("UP")

    door.sees(Look("refused", reason="Connection refused", unit="activating"))
    door.becomes("DOWN (agent)")
    assert "the unit is activating" in door.server()["last_agt"]


def test_an_agent_that_is_away_takes_no_engine_down(door):
    door.sees(WELL)
    door.canary(Canary("ok"))
    door.sees(WELL)
    door.servers[0].shutdown()
    door.servers[0].server_close()
    until(lambda: door.server()["agent_status"] != "L7OK")
    time.sleep(0.5)
    assert door.server()["status"] == "UP"
