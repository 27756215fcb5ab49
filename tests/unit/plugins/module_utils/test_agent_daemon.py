"""The health agent against real sockets: stand-ins for engines and for systemctl, its own listeners, its files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _agent_daemon
from ansible_collections.nvl.vllm.plugins.module_utils._agent import Canary, Thresholds
from ansible_collections.nvl.vllm.plugins.module_utils._agent_daemon import (
    BadSettings,
    Daemon,
    Endpoint,
    Paths,
    Settings,
    settings_of,
)

# So short that the tests are quick; what has to happen is waited for much longer, as test machines are slow.
QUICK = {
    "poll_interval": 0.1,
    "metrics_timeout": 0.5,
    "silence_timeout": 1.0,
    "stall_seconds": 0.4,
    "canary_timeout": 0.5,
    "idle_canary_interval": 0.3,
    "restart_after": 0.2,
}
PATIENCE = 15.0
SYSTEMCTL = """#!/bin/sh
# A stand-in for systemctl: says what the test wrote, and writes down what it was asked to kill.
cd "${0%/*}"
case "$1" in
  show) echo "ActiveState=$(cat "state-$4")" ;;
  kill) echo "$*" >>killed; [ ! -e broken ] || { echo "no such unit" >&2; exit 1; } ;;
esac
"""


def run(argv):
    """As the script that the role ships."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    return done.returncode, done.stdout, done.stderr


def until(found, seconds=PATIENCE):
    """What ``found`` gives once it is true."""
    end = time.monotonic() + seconds
    while True:
        result = found()
        if result or time.monotonic() > end:
            assert result, "it did not happen in time"
            return result
        time.sleep(0.02)


class Host:
    """The files that the agent reads and writes, and systemctl."""

    def __init__(self, path):
        self.path = path
        self.bin, self.etc, self.drain = path / "bin", path / "etc", path / "drain"
        for folder in (self.bin, self.etc, self.drain, path / "state"):
            folder.mkdir()
        (self.bin / "systemctl").write_text(SYSTEMCTL)
        (self.bin / "systemctl").chmod(0o755)
        names = ("etc/health.json", "etc", "drain", "hung", "state/health.json", "started", "vllm-health", "unit")
        self.paths = Paths(*(str(path / name) for name in names))
        self.agents = []

    def engine(self, name, url, active="active"):
        """Declare an engine; returns it as the settings have it."""
        self.unit_is(f"vllm@{name}.service", active)
        (self.etc / f"{name}.env").write_text(f'A="1"\nVLLM_API_KEY="key-of-{name}"\n')
        return {"name": name, "url": url, "unit": f"vllm@{name}.service"}

    def unit_is(self, unit, active):
        (self.bin / f"state-{unit}").write_text(f"{active}\n")

    def killed(self):
        path = self.bin / "killed"
        return path.read_text().splitlines() if path.exists() else []

    def write(self, *engines, **more):
        """Write the settings; ports are chosen by the kernel."""
        found = {"instances": engines, "agent_port": 0, "status_port": 0, "thresholds": QUICK, **more}
        Path(self.paths.settings).write_text(json.dumps(found))

    def start(self, *engines, **thresholds):
        """An agent that looks after these engines."""
        self.write(*engines, thresholds={**QUICK, **thresholds})
        self.agents.append(Agent(settings_of(self.paths.settings), self.paths))
        return self.agents[-1]


class Agent:
    """A daemon in a thread of its own."""

    def __init__(self, settings, paths):
        self.settings, self.paths = settings, paths
        self.said = []
        self.problem = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        assert self._up.wait(PATIENCE)
        until(lambda: self.problem or len(self.daemon.ports) == 2)

    def _main(self):
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.daemon = Daemon(self.settings, run, self.paths, {}, self.said.append)
        self._up.set()
        try:
            await self.daemon.serve()
        except Exception as problem:
            self.problem = problem

    def stop(self):
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.daemon.stopping.set)
            self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def ask(self, question):
        """What HAProxy's agent-check gets."""
        with socket.create_connection(("127.0.0.1", self.daemon.ports["agent"]), timeout=PATIENCE) as sock:
            sock.sendall(question)
            answer = b""
            while data := sock.recv(4096):
                answer += data
        return answer.decode()

    def word(self, name="primary"):
        return self.ask(f"{name}\n".encode())

    def becomes(self, start, name="primary"):
        return until(lambda: self.word(name) if self.word(name).startswith(start) else "")

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.daemon.ports['status']}{path}", timeout=PATIENCE) as got:
            return got.read().decode()

    def metric(self, series):
        return float(re.search(rf"^{re.escape(series)} (\S+)$", self.get("/metrics"), re.MULTILINE).group(1))

    def decisions(self, name="primary"):
        return [item["decision"] for item in list(self.said) if item["instance"] == name]


@pytest.fixture
def host(tmp_path, monkeypatch):
    made = Host(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    yield made
    for agent in made.agents:
        agent.stop()
        assert agent.problem is None


# Engines


def test_an_engine_that_answers_is_up(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    assert agent.becomes("up") == "up ready\n"
    assert agent.decisions() == ["admit"]
    asked = [headers for path, headers, _ in list(fake_vllm.requests) if path == "/v1/chat/completions"]
    assert asked[0]["Authorization"] == "Bearer key-of-primary"
    assert fake_vllm.asked("/v1/chat/completions")[0]["max_tokens"] == 1


def test_a_busy_engine_stays(host, fake_vllm):
    """Every completion hangs in its queue, and tokens come out."""
    fake_vllm.chat, fake_vllm.running, fake_vllm.moving = "hang", 200, "vllm:generation_tokens_total"
    agent = host.start(host.engine("primary", fake_vllm.url))
    agent.becomes("up")
    end = time.monotonic() + 2 * (QUICK["stall_seconds"] + QUICK["canary_timeout"])
    while time.monotonic() < end:
        assert agent.word() == "up ready\n"
        time.sleep(0.02)
    assert agent.decisions() == ["admit"]


def test_a_hung_engine_is_ejected_then_killed_and_comes_back(host, fake_vllm):
    fake_vllm.running = 3
    agent = host.start(host.engine("primary", fake_vllm.url), query_of_death_window=1)
    agent.becomes("up")
    fake_vllm.chat = "hang"
    assert agent.becomes("down").startswith("down #no token for ")
    until(host.killed)
    assert host.killed()[0] == "kill --signal=SIGKILL -- vllm@primary.service"
    fake_vllm.chat = "ok"
    agent.becomes("up ready")
    assert agent.decisions()[:3] == ["admit", "eject", "restart"]
    assert agent.decisions()[-1] == "admit"
    assert agent.metric('vllm_health_ejections_total{instance="primary",state="hung"}') == 1
    assert agent.metric('vllm_health_restarts_total{instance="primary"}') == len(host.killed())


def test_the_engines_middleware_hears_of_a_hang_after_the_gateway(host, fake_vllm):
    """Handed back before, a request could meet the same engine again."""
    fake_vllm.running = 3
    agent = host.start(host.engine("primary", fake_vllm.url), restart_after=1000)
    agent.becomes("up")
    mark = Path(host.paths.hung, "primary")
    fake_vllm.chat = "hang"
    until(lambda: agent.decisions()[-1] == "eject")
    assert not mark.exists()
    agent.becomes("down")
    assert mark.exists()
    fake_vllm.chat = "ok"
    agent.becomes("up ready")
    until(lambda: not mark.exists())


def test_a_mark_of_an_agent_before_is_taken_away(host, fake_vllm):
    mark = Path(host.paths.hung, "primary")
    mark.parent.mkdir()
    mark.touch()
    host.start(host.engine("primary", fake_vllm.url)).becomes("up")
    until(lambda: not mark.exists())


def test_an_idle_engine_that_hangs_is_ejected(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url), restart_after=1000)
    agent.becomes("up")
    fake_vllm.chat = "hang"
    assert agent.becomes("down").startswith("down #2 canaries in a row failed on an idle engine")


def test_an_engine_that_hung_between_two_requests_is_ejected_for_the_client_that_waits(host, fake_vllm):
    """By its own metrics it is idle: only the open connection tells that somebody waits."""
    agent = host.start(host.engine("primary", fake_vllm.url), restart_after=1000, idle_canary_interval=1000)
    agent.becomes("up")
    fake_vllm.chat = "hang"
    time.sleep(3 * QUICK["stall_seconds"])
    assert agent.word() == "up ready\n"
    with socket.create_connection(("127.0.0.1", fake_vllm.port)):
        agent.becomes("down #no token for ")
    assert agent.decisions() == ["admit", "eject"]


def test_clients_are_found_in_both_address_families(tmp_path):
    """Lines of /proc/net/tcp and tcp6: a listener, a client, one that has closed, and one of another port."""
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rows = ["0100007F:1F41 00000000:0000 0A", "0100007F:1F41 0100007F:C001 01", "0100007F:1F41 0100007F:C002 08"]
    rows.append("0100007F:1F42 0100007F:C003 01")
    (tmp_path / "tcp").write_text(head + "".join(f"   0: {row} 00000000:00000000 00:0 0 0 0 1\n" for row in rows))
    mapped = "0000000000000000FFFF00000100007F"
    (tmp_path / "tcp6").write_text(head + f"   0: {mapped}:1F41 {mapped}:C004 01 00000000:00000000 00:0 0 0 0 1\n")
    assert _agent_daemon.clients_of(8001, str(tmp_path)) == {"0100007F:C001", f"{mapped}:C004"}
    assert _agent_daemon.clients_of(80, str(tmp_path)) == frozenset()


def test_a_server_that_takes_connections_and_says_nothing_hangs(host):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        agent = host.start(host.engine("primary", f"http://127.0.0.1:{silent.getsockname()[1]}"), restart_after=1000)
        agent.becomes("down #no token for ")
        assert agent.metric('vllm_health_state{instance="primary",state="hung"}') == 1


def test_an_engine_that_died_is_down_and_not_killed(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    agent.becomes("up")
    fake_vllm.die()
    assert "Connection refused" in agent.becomes("down")
    time.sleep(2 * QUICK["restart_after"])
    assert host.killed() == []
    fake_vllm.restore()
    agent.becomes("up ready")


def test_a_unit_that_starts_is_down_and_not_killed(host, fake_vllm):
    fake_vllm.chat = "hang"
    agent = host.start(host.engine("primary", fake_vllm.url, "activating"))
    agent.becomes("down #2 canaries in a row failed")
    time.sleep(2 * QUICK["restart_after"])
    assert host.killed() == []
    fake_vllm.chat = "ok"
    # Before the unit is active: it is so only once the gateway sends to the engine.
    agent.becomes("up ready")


def test_a_slow_engine_stays(host, fake_vllm):
    fake_vllm.latency = 0.1
    agent = host.start(host.engine("primary", fake_vllm.url), canary_timeout=5)
    agent.becomes("up")
    until(lambda: len(fake_vllm.asked("/v1/chat/completions")) >= 3)
    assert agent.decisions() == ["admit"]
    assert agent.metric('vllm_health_canary_seconds{instance="primary"}') >= 0.1


def test_one_canary_at_a_time(host, fake_vllm):
    under_way, most = [], []

    def count():
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.1)
        under_way.pop()

    fake_vllm.before_chat = count
    host.start(host.engine("primary", fake_vllm.url), canary_timeout=10)
    until(lambda: len(most) >= 3)
    assert max(most) == 1


def test_a_key_that_was_changed_is_used_at_once(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    agent.becomes("up")
    (host.etc / "primary.env").write_text("VLLM_API_KEY=new-key\n")
    until(lambda: any(headers.get("Authorization") == "Bearer new-key" for _, headers, _ in list(fake_vllm.requests)))
    (host.etc / "primary.env").unlink()
    until(lambda: "note" in agent.decisions())
    assert agent.word() == "up ready\n"


@pytest.mark.parametrize(
    ("chat", "kind"),
    [("ok", "ok"), ("401", "refused"), ("404", "refused"), ("429", "failed"), ("500", "failed"), ("503", "failed")]
    + [(chat, "failed") for chat in ("close", "error_then_done", "no_token", "abort", "hang_after_headers")],
)
def test_what_a_canary_says(fake_vllm, chat, kind):
    fake_vllm.chat = chat
    canary = _agent_daemon.send_canary(Endpoint("primary", fake_vllm.url), 0.5 if "hang" in chat else 5.0)
    assert canary.kind == kind
    assert canary.late == ("hang" in chat)
    assert canary.seconds < 5


def test_a_canary_keeps_one_deadline_for_both_of_its_requests(fake_vllm):
    fake_vllm.chat = "drip"
    canary = _agent_daemon.send_canary(Endpoint("primary", fake_vllm.url), 0.3)
    assert canary.kind == "failed"
    assert canary.seconds < 1.5


# Restarts


def test_the_limit_outlives_the_agent(host, fake_vllm):
    fake_vllm.chat, fake_vllm.running = "hang", 3
    engine = host.engine("primary", fake_vllm.url)
    first = host.start(engine, restart_limit=1)
    until(host.killed)
    first.stop()
    second = host.start(engine, restart_limit=1)
    until(lambda: "restart_refused" in second.decisions())
    time.sleep(2 * QUICK["restart_after"])
    assert len(host.killed()) == 1
    assert second.decisions().count("restart_refused") == 1
    assert second.metric('vllm_health_refused_restarts_total{instance="primary",reason="storm"}') == 1
    assert len(json.loads(second.get("/status"))["instances"]["primary"]["restarts_at"]) == 1


def test_two_engines_that_hang_are_not_both_restarted(host, make_fake_vllm):
    fakes = {name: make_fake_vllm() for name in ("primary", "secondary")}
    for fake in fakes.values():
        fake.running = 3
    agent = host.start(*(host.engine(name, fake.url) for name, fake in fakes.items()), restart_limit=1)
    for name in fakes:
        agent.becomes("up", name)
    assert agent.metric("vllm_health_all_ejected") == 0
    for fake in fakes.values():
        fake.chat = "hang"
    until(lambda: any(item["decision"] == "restart_refused" and "hung both" in item["reason"] for item in agent.said))
    time.sleep(2 * QUICK["restart_after"])
    assert len(host.killed()) == 1
    assert agent.metric("vllm_health_all_ejected") == 1
    assert all(agent.word(name).startswith("down #") for name in fakes)
    refused = [
        agent.metric(f'vllm_health_refused_restarts_total{{instance="{name}",reason="query_of_death"}}')
        for name in fakes
    ]
    assert sum(refused) == 1


def test_a_restart_that_cannot_be_recorded_is_not_made(host, fake_vllm):
    fake_vllm.chat, fake_vllm.running = "hang", 3
    agent = host.start(host.engine("primary", fake_vllm.url))
    state = Path(host.paths.state).parent
    state.rmdir()
    state.write_text("not a directory")
    until(lambda: "restart_refused" in agent.decisions())
    time.sleep(5 * QUICK["poll_interval"])
    assert host.killed() == []
    assert agent.metric('vllm_health_refused_restarts_total{instance="primary",reason="record"}') == 1
    # It counts as none, so that it is made once the record can be written.
    state.unlink()
    until(host.killed)
    assert agent.metric('vllm_health_restarts_total{instance="primary"}') == len(host.killed())


def test_a_kill_that_fails_is_said(host, fake_vllm):
    (host.bin / "broken").touch()
    fake_vllm.chat, fake_vllm.running = "hang", 3
    agent = host.start(host.engine("primary", fake_vllm.url))
    until(lambda: "restart_failed" in agent.decisions())
    failed = next(item for item in agent.said if item["decision"] == "restart_failed")
    assert failed["reason"].endswith("vllm@primary.service ended with status 1: no such unit")


# Drained


def test_a_drain_file_drains_until_it_is_gone(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    agent.becomes("up")
    (host.drain / "primary").write_text("new driver\n")
    assert agent.becomes("drain") == "drain\n"
    assert agent.metric('vllm_health_drained{instance="primary"}') == 1
    assert json.loads(agent.get("/status"))["instances"]["primary"]["drain"] == "new driver"
    (host.drain / "primary").unlink()
    agent.becomes("up ready")
    assert agent.decisions() == ["admit", "drain", "undrain"]


def test_why_an_engine_is_drained(host):
    assert _agent_daemon.drain_of("primary", str(host.drain)) is None
    assert _agent_daemon.drain_of("primary", str(host.drain / "absent")) is None
    (host.drain / "primary").touch()
    assert _agent_daemon.drain_of("primary", str(host.drain)) == "no reason given"
    (host.drain / "primary").unlink()
    (host.drain / "primary").mkdir()
    assert _agent_daemon.drain_of("primary", str(host.drain)) == "a reason that cannot be read: Is a directory"


# Listeners


def test_answers_do_not_wait_for_an_engine(host):
    """Looks and canaries are stuck in a server that says nothing, and HAProxy has its answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = host.engine("primary", f"http://127.0.0.1:{silent.getsockname()[1]}")
        agent = host.start(engine, metrics_timeout=20, canary_timeout=20)
        until(lambda: agent.daemon.watches["primary"].canary_began)
        began = time.monotonic()
        for _ in range(50):
            assert agent.word() == ""  # nothing is known yet
        assert time.monotonic() - began < 5
        silent.close()


def test_of_an_unknown_engine_nothing_is_said_and_once_logged(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    assert [agent.word("tertiary") for _ in range(3)] == ["", "", ""]
    assert agent.decisions("tertiary") == ["note"]
    for number in range(300):
        agent.daemon._agent_answer(f"name-{number}\n")
    assert len(agent.said) < 120


@pytest.mark.parametrize("question", [b"", b"x" * 100_000, b"\xff\xfe\n", b"primary"])
def test_a_client_that_asks_badly_gets_no_answer(host, fake_vllm, question, monkeypatch):
    monkeypatch.setattr(_agent_daemon, "CLIENT_SECONDS", 0.3)
    agent = host.start(host.engine("primary", fake_vllm.url))
    agent.becomes("up")
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it did not read all of that
        assert agent.ask(question) in ("", "up ready\n" if question == b"primary" else "")
    assert agent.word() == "up ready\n"


def test_status_and_metrics(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    agent.becomes("up")
    status = json.loads(agent.get("/status"))
    assert status["all_ejected"] is False
    assert status["instances"]["primary"]["state"] == "up"
    assert status["instances"]["primary"]["word"] == "up ready"
    page = agent.get("/metrics")
    for line in page.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) vllm_health_\w+ .+|vllm_health_\w+(\{[^}]+\})? [-+.\de]+", line)
    assert agent.metric('vllm_health_state{instance="primary",state="up"}') == 1
    assert agent.metric('vllm_health_state{instance="primary",state="hung"}') == 0
    assert agent.metric('vllm_health_sees_progress{instance="primary"}') == 1
    assert agent.metric('vllm_health_last_progress_seconds{instance="primary"}') < PATIENCE
    with pytest.raises(urllib.error.HTTPError) as raised:
        agent.get("/etc/passwd")
    raised.value.close()
    assert raised.value.code == 404


def test_a_port_that_is_taken_ends_the_agent(host, fake_vllm):
    with socket.create_server(("127.0.0.1", 0)) as other:
        host.write(host.engine("primary", fake_vllm.url), agent_port=other.getsockname()[1])
        assert _agent_daemon.main(["run"], run, host.paths) == 1


# systemd


class Notified:
    """What a service tells systemd."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(PATIENCE)

    def next(self):
        return self.sock.recv(4096).decode()


def test_the_process_reports_to_systemd_and_ends_when_told(host, fake_vllm):
    host.write(host.engine("primary", fake_vllm.url))
    notified = Notified(host.path / "notify")
    code = (
        "import sys, subprocess\n"
        f"from {_agent_daemon.__name__} import Paths, main\n"
        "run = lambda argv: (0, 'ActiveState=active\\n', '')\n"
        f"sys.exit(main(['run'], run, Paths(**{host.paths.__dict__!r})))\n"
    )
    environment = {
        **os.environ,
        "NOTIFY_SOCKET": str(host.path / "notify"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert notified.next() == "READY=1"
        assert notified.next() == "WATCHDOG=1"
        assert json.loads(process.stdout.readline())["decision"] == "admit"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        notified.sock.close()


def test_an_abstract_socket_is_notified():
    name = f"nvl-vllm-test-{os.getpid()}"
    notified = Notified(f"\0{name}")
    _agent_daemon.notify("READY=1", {"NOTIFY_SOCKET": f"@{name}"})
    assert notified.next() == "READY=1"
    notified.sock.close()


def test_the_watchdog_is_not_fed_while_an_engine_is_not_looked_at(host, fake_vllm, monkeypatch):
    told = []
    monkeypatch.setattr(_agent_daemon, "notify", lambda message, _environment: told.append(message))
    monkeypatch.setattr(_agent_daemon, "NOTIFY_INTERVAL", 0.02)
    agent = host.start(host.engine("primary", fake_vllm.url))
    until(lambda: told.count("WATCHDOG=1") >= 3)
    begun, end = threading.Event(), threading.Event()

    def stuck(*_):
        begun.set()
        end.wait(PATIENCE)
        return _agent_daemon.Look("silent")

    monkeypatch.setattr(_agent_daemon, "look_at", stuck)
    assert begun.wait(PATIENCE)
    monkeypatch.setattr(agent.daemon, "_looked", {"primary": time.monotonic() - 1000})
    time.sleep(0.2)
    before = len(told)
    time.sleep(0.3)
    end.set()
    assert len(told) == before


# Settings and files


def test_the_agent_is_stale_when_its_files_changed(host, fake_vllm):
    assert _agent_daemon.main(["stale"], run, host.paths) == 3
    agent = host.start(host.engine("primary", fake_vllm.url))
    until(lambda: os.path.exists(host.paths.started) and os.path.getsize(host.paths.started))
    assert _agent_daemon.main(["stale"], run, host.paths) == 0
    for path in (host.paths.unit, host.paths.script, host.paths.settings):
        before = Path(path).read_bytes() if os.path.exists(path) else None
        Path(path).write_text("something else")
        assert _agent_daemon.main(["stale"], run, host.paths) == 3
        Path(path).unlink() if before is None else Path(path).write_bytes(before)
        assert _agent_daemon.main(["stale"], run, host.paths) == 0
    agent.stop()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"instances": []}, "wanted one or more"),
        ({"instances": [{"name": "a", "url": "http://127.0.0.1:1", "unit": "u"}] * 2}, "a name of its own"),
        ({"instances": [{"name": "a", "url": "127.0.0.1", "unit": "u"}]}, "wanted a URL"),
        ({"instances": [{"name": "a"}]}, "url"),
        ({"thresholds": {"stall_seconds": 0}}, "vllm_health_stall_seconds is 0"),
        ({"thresholds": {"patience": 1}}, "patience"),
    ],
)
def test_settings_that_cannot_be_used_are_named(host, change, named, capsys):
    host.write(host.engine("primary", "http://127.0.0.1:8001"), **change)
    with pytest.raises(BadSettings, match=named):
        settings_of(host.paths.settings)
    assert _agent_daemon.main(["check", host.paths.settings], run, host.paths) == 1
    assert capsys.readouterr().err.startswith(f"vllm-health: {host.paths.settings} ")


def test_check_of_good_and_of_absent_settings(host):
    host.write(host.engine("primary", "http://127.0.0.1:8001"), thresholds={})
    assert settings_of(host.paths.settings).thresholds == Thresholds()
    assert isinstance(settings_of(host.paths.settings), Settings)
    assert _agent_daemon.main(["check", host.paths.settings], run) == 0
    assert _agent_daemon.main(["check", str(host.path / "absent")], run) == 1
    assert _agent_daemon.main(["check"], run) == 2


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('VLLM_API_KEY="a b\\"c"\n', 'a b"c'),
        ("VLLM_API_KEY=plain\n", "plain"),
        ('VLLM_API_KEY=""\n', None),
        ("OTHER=1\n", None),
    ],
)
def test_the_key_in_the_environment_file(host, text, key):
    (host.etc / "primary.env").write_text(text)
    assert _agent_daemon.key_of("primary", str(host.etc)) == key


def test_log_lines_are_json(capsys):
    _agent_daemon.log({"decision": "eject", "reason": 'a "b"\n'})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"decision": "eject", "reason": 'a "b"\n'}


def test_a_canary_without_its_key_proves_nothing(host, fake_vllm):
    agent = host.start(host.engine("primary", fake_vllm.url))
    (host.etc / "primary.env").write_text("VLLM_API_KEY=not a key\n")
    canary = agent.daemon._canary(agent.settings.instances[0])
    assert canary._replace(reason="", seconds=0.0) == Canary("refused")
    assert "not a key" not in canary.reason
