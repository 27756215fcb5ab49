"""The gateway's configuration in a real HAProxy, in front of stand-ins for engines."""

from __future__ import annotations

import contextlib
import csv
import http.client
import importlib.util
import io
import json
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import jinja2
import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils._gateway import Plan, Wanted, plan

HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/vllm_gateway"
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
VARIABLES = yaml.safe_load((ROLE / "vars/main.yml").read_text())
ENGINE_KEY = 'engine%key"with$odd\\characters'
KEYS = {"team-a": "a-key-of-team-a-000", "team-a.next": "a-key-of-team-a-111"}
POST = "/v1/chat/completions"


def jinja(extra: dict) -> jinja2.Environment:
    """The few filters of Ansible's that the role's files use."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        to_json=json.dumps,
        comment=lambda text: f"# {text}",
        regex_replace=lambda text, pattern, new: re.sub(pattern, new, text),
    )
    environment.globals.update(ansible_managed="Managed by a test", **extra)
    return environment


def render(made: Plan, directory: Path, ports: dict[str, int], **variables) -> str:
    """The configuration as the role writes it, with other paths and ports."""
    values = {**DEFAULTS, "vllm_api_key": ENGINE_KEY, **VARIABLES, **variables}
    values |= {
        "__vllm_gateway_plan": asdict(made),
        "__vllm_gateway_directory": str(directory),
        "__vllm_gateway_runtime": str(directory),
        "__vllm_gateway_keys": f"{directory}/keys",
        "__vllm_gateway_pem": f"{directory}/door.pem",
        "__vllm_gateway_statistics": f"127.0.0.1:{ports['statistics']}",
        "__vllm_gateway_agent": {"address": "127.0.0.1", "port": ports["agent"]},
    }
    return jinja(values).from_string((ROLE / "templates/haproxy.cfg.j2").read_text()).render()


def load_helper():
    """The unit's helper as a module."""
    path = ROLE / "files/vllm-gateway"
    spec = importlib.util.spec_from_loader("vllm_gateway_helper", SourceFileLoader("vllm_gateway_helper", str(path)))
    helper = importlib.util.module_from_spec(spec)
    write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(helper)
    finally:
        sys.dont_write_bytecode = write
    return helper


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, seconds: float = 10.0):
    """Poll until the condition holds, and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return value


class Agent(socketserver.ThreadingTCPServer):
    """A stand-in for the health agent: says of each engine what the test has it say."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.words: dict[str, str] = {}
        super().__init__(("127.0.0.1", port), self.Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            name = self.rfile.readline().decode().strip()
            self.wfile.write(self.server.words.get(name, "up ready").encode() + b"\n")


@dataclass
class Answer:
    status: int
    body: bytes
    headers: http.client.HTTPMessage
    engine: str


class Gateway:
    """Engines, agent and HAProxy in one directory."""

    def __init__(self, directory: Path, names=("primary", "secondary"), arguments=None, variables=None, **wanted):
        door, stats, agent, *engines = free_ports(3 + len(names))
        self.directory = directory
        self.ports = {"door": door, "statistics": stats, "agent": agent, **dict(zip(names, engines, strict=True))}
        self.names = list(names)
        self.arguments = {"max-model-len": 4096, "max-num-seqs": 8, **(arguments or {})}
        self.variables = variables or {}
        self.wanted = Wanted("here", "cuda", "127.0.0.1", door, **wanted)
        self.processes: dict[str, subprocess.Popen] = {}
        self.agent = Agent(agent)
        self.helper = load_helper()
        self.helper.CONFIG = self.helper.RUNTIME = str(directory)
        self.helper.HAPROXY = HAPROXY
        self.helper.TAKE_OVER_SECONDS = 5.0
        self.log = directory / "log"

    def instances(self) -> list[dict]:
        urls = {name: f"http://127.0.0.1:{self.ports[name]}" for name in self.names}
        return [{"name": name, "url": url, "arguments": self.arguments} for name, url in urls.items()]

    def write(self, keys=None) -> Plan:
        wanted = self.wanted if keys is None else replace(self.wanted, keys=keys)
        made, errors = plan(wanted, self.instances())
        assert errors == []
        (self.directory / "keys").write_text("".join(f"{line}\n" for line in made.keys))
        variables = {"vllm_gateway_tls": wanted.tls, "vllm_gateway_affinity": wanted.affinity, **self.variables}
        (self.directory / "haproxy.cfg").write_text(render(made, self.directory, self.ports, **variables))
        return made

    def start_engine(self, name: str) -> None:
        command = [sys.executable, "-I", str(ROOT / "tests/unit/stub_engine.py"), name, str(self.ports[name])]
        self.processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.processes[name].stdout.readline() == "ready\n"

    def start(self) -> Gateway:
        self.plan = self.write()
        for name in self.names:
            self.start_engine(name)
        self.start_haproxy()
        wait_for(lambda: all(self.server(name)["agent_status"] == "L7OK" for name in self.names))
        return self

    def start_haproxy(self) -> None:
        self.helper.prepare()
        with self.log.open("a") as stream:
            self.processes["haproxy"] = subprocess.Popen(
                [HAPROXY, "-W", "-f", str(self.directory / "haproxy.cfg"), "-S", str(self.directory / "master.sock")],
                stdout=stream,
                stderr=stream,
            )
        wait_for(self.helper.worker)

    def reload(self) -> str:
        return self.helper.reload(self.processes["haproxy"].pid)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()

    def stop(self) -> None:
        if haproxy := self.processes.pop("haproxy", None):
            haproxy.terminate()
            haproxy.wait(10)
        for name in list(self.processes):
            self.kill(name)
        self.agent.shutdown()
        self.agent.server_close()

    def server(self, name: str) -> dict[str, str]:
        """A row of the statistics, as Prometheus and people see them."""
        text = fetch(self.ports["statistics"], "GET", "/;csv").body.decode()
        rows = csv.DictReader(io.StringIO(text.removeprefix("# ")))
        return next(row for row in rows if row["pxname"] == "engines" and row["svname"] == name)

    def seen(self, name: str) -> dict:
        return json.loads(fetch(self.ports[name], "GET", "/seen").body)

    def ask(
        self, body: dict | bytes | None = None, method: str = "POST", path: str = POST, key="", **headers
    ) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return fetch(self.ports["door"], method, path, data, headers)

    def logged(self) -> list[dict]:
        """The access log."""
        lines = self.log.read_text().splitlines()
        # The journal takes the level off.
        return [json.loads(line.removeprefix("<6>")) for line in lines if line.startswith("<6>{")]


def fetch(port: int, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        with connection.getresponse() as response:
            return Answer(response.status, response.read(), response.headers, response.headers.get("X-Engine", ""))


@pytest.fixture
def start(tmp_path):
    """Starts a gateway with its engines; all of it ends with the test."""
    started: list[Gateway] = []

    def run(**options) -> Gateway:
        started.append(Gateway(tmp_path, **options))
        return started[-1].start()

    yield run
    for gateway in started:
        gateway.stop()


def load(gateway: Gateway, body: dict, number: int = 240, at: int = 60, event=lambda: None, key: str = "") -> list:
    """A closed loop of eight clients without retries. Returns what was not answered with 200."""
    done, lock, lost = [0], threading.Lock(), []

    def client(_number: int) -> None:
        for _ in range(number // 8):
            try:
                answer = gateway.ask(body, key=key)
                if answer.status != 200 or not json.loads(answer.body)["bytes"]:
                    lost.append(answer)
            except (OSError, http.client.HTTPException) as error:
                lost.append(error)
            with lock:
                done[0] += 1
                hit = done[0] == at
            if hit:
                event()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    assert done[0] == number
    return lost


def test_an_engine_that_is_killed_loses_nothing(start):
    gateway = start()
    body = {"pause": 0.02, "prompt": ""}
    body["prompt"] = "x" * (gateway.plan.body_limit - len(json.dumps(body)))

    assert load(gateway, body, event=lambda: gateway.kill("primary")) == []
    assert sum(int(line["retries"].lstrip("+")) for line in gateway.logged()) > 0
    wait_for(lambda: gateway.server("primary")["status"].startswith("DOWN"))
    gateway.start_engine("primary")
    wait_for(lambda: gateway.server("primary")["status"] == "UP")


@pytest.mark.parametrize("behave", ["die", "close"])
def test_a_request_is_sent_again_in_full_before_the_first_byte(start, behave):
    gateway = start()
    body = json.dumps({"behave": {"primary": behave}, "prompt": "x" * 90_000}).encode()

    answers = [gateway.ask(body) for _ in range(2)]

    assert [(answer.status, json.loads(answer.body)) for answer in answers] == [
        (200, {"engine": "secondary", "bytes": len(body)})
    ] * 2
    assert any(line["retries"].lstrip("+") == "1" for line in gateway.logged())


def test_a_stream_that_is_cut_is_seen_as_cut(start):
    gateway = start()

    with pytest.raises(http.client.IncompleteRead):
        gateway.ask({"stream": True, "behave": {"primary": "cut", "secondary": "cut"}})

    assert sum(gateway.seen(name)["completions"] for name in gateway.names) == 1


def test_an_answer_of_500_is_not_sent_again(start):
    gateway = start()

    assert gateway.ask({"behave": {"primary": "500", "secondary": "500"}}).status == 500
    assert sum(gateway.seen(name)["completions"] for name in gateway.names) == 1


def test_what_waits_for_an_engine_that_the_agent_ejects_moves_on(start):
    gateway = start()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(gateway.ask, {"behave": {"primary": "hang"}}) for _ in range(8)]
        wait_for(lambda: gateway.seen("primary")["under_way"])
        gateway.agent.words["primary"] = "down #no token for 6 s and the canary failed"
        found = [(future.result().status, future.result().engine) for future in answers]

    assert found == [(200, "secondary")] * 8


def test_a_full_queue_is_told_at_once(start):
    gateway = start(names=("primary",), arguments={"max-num-seqs": 1, "max-num-queued-reqs": 2}, queue=1)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gateway.ask, {"pause": 3})
        wait_for(lambda: gateway.seen("primary")["under_way"])
        second = pool.submit(gateway.ask, {})
        wait_for(lambda: gateway.server("primary")["qcur"] == "1" or backend_queue(gateway))
        refused = gateway.ask({})
        assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        assert json.loads(refused.body)["error"]["type"] == "overloaded"
        assert (first.result().status, second.result().status) == (200, 200)


def backend_queue(gateway: Gateway) -> bool:
    return "engines,BACKEND,1," in fetch(gateway.ports["statistics"], "GET", "/;csv").body.decode()


def test_a_scan_without_a_key_finds_nothing_but_health(start):
    gateway = start(keys=[{"name": "a", "key": "a" * 32}])
    guarded = {("POST", path) for path in (POST, "/v1/completions", "/v1/responses")} | {("GET", "/v1/models")}
    paths = (
        *(POST, "/v1/completions", "/v1/responses", "/v1/models", "/health", "/", "/invocations", "/tokenize"),
        *("/detokenize", "/scale_elastic_ep", "/metrics", "/ping", "/load", "/version", "/docs", "/openapi.json"),
        *("//invocations", "/health/", "/health/../metrics", "/V1/models", "/v1/models/m", "/%68ealth"),
    )

    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        for path in paths:
            wanted = 401 if (method, path) in guarded else 200 if (method, path) == ("GET", "/health") else 404
            assert gateway.ask(method=method, path=path).status == wanted, (method, path)
    assert [gateway.seen(name)["completions"] for name in gateway.names] == [0, 0]


def test_two_keys_are_valid_at_once_and_end_at_the_door(start):
    gateway = start(keys=[{"name": name, "key": key} for name, key in KEYS.items()])

    assert [gateway.ask({}, key=key).status for key in [*KEYS.values(), ENGINE_KEY, "another", ""]] == [
        *(200, 200),
        *(401, 401, 401),
    ]
    headers = [gateway.seen(name)["headers"] for name in gateway.names]
    assert {found["authorization"] for found in headers if found} == {f"Bearer {ENGINE_KEY}"}
    wait_for(lambda: len(gateway.logged()) == 5)
    assert [line["key"] for line in gateway.logged()][:2] == list(KEYS)
    log = gateway.log.read_text()
    assert [key for key in [*KEYS.values(), ENGINE_KEY] if key in log] == []


def test_a_reload_loses_nothing_and_keeps_an_engine_out(start):
    gateway = start(keys=[{"name": "old", "key": "o" * 32}])
    gateway.agent.words["primary"] = "down #hung"
    wait_for(lambda: gateway.server("primary")["status"].startswith("DOWN"))
    problems = []

    def rotate() -> None:
        gateway.write([{"name": "old", "key": "o" * 32}, {"name": "new", "key": "n" * 32}])
        problems.append(gateway.reload())

    assert load(gateway, {"pause": 0.01}, event=rotate, key="o" * 32) == []
    assert problems == [""]
    assert gateway.ask({}, key="n" * 32).status == 200
    assert gateway.seen("primary")["completions"] == 0
