"""The gateway's configuration in a real HAProxy, in front of stand-ins for engines."""

from __future__ import annotations

import contextlib
import csv
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import statistics
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
from ansible_collections.nvl.vllm.plugins.module_utils._faults import Relayed
from ansible_collections.nvl.vllm.plugins.module_utils._gateway import Plan, Wanted, plan
from ansible_collections.nvl.vllm.plugins.module_utils._gateway_socket import ServerAddress
from ansible_collections.nvl.vllm.plugins.module_utils._http import Endpoint

import bench_latency

sys.path.append(str(Path(__file__).parents[2] / "molecule/default/tests"))
from gaps import judge_gaps

HAPROXY = os.environ.get("HAPROXY") or shutil.which("haproxy") or "/usr/sbin/haproxy"

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
        self.asked: set[str] = set()
        super().__init__(("127.0.0.1", port), self.Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            name = self.rfile.readline().decode().strip()
            self.server.asked.add(name)
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
        for mark in ("hung", "drained"):
            (directory / mark).mkdir()

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
        command = [sys.executable, "-I", str(ROOT / "tests/haproxy/stub_engine.py"), name, str(self.ports[name])]
        command.append(str(self.directory))
        self.processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.processes[name].stdout.readline() == "ready\n"

    def start(self) -> Gateway:
        self.plan = self.write()
        for name in self.names:
            self.start_engine(name)
        self.start_haproxy()
        wait_for(lambda: self.agent.asked >= set(self.names))
        return self

    def start_haproxy(self) -> None:
        self.helper.prepare()
        with self.log.open("a") as stream:
            self.processes["haproxy"] = subprocess.Popen(
                [HAPROXY, "-W", "-f", str(self.directory / "haproxy.cfg"), "-S", str(self.directory / "master.sock")],
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        wait_for(self.helper.worker)

    def reload(self) -> str:
        return self.helper.reload(self.processes["haproxy"].pid)

    def workers(self) -> list[str]:
        """Processes that have requests, the newest one first."""
        with socket.socket(socket.AF_UNIX) as connection:
            # A master that has just read its files anew does not listen for a moment.
            wait_for(lambda: connection.connect_ex(str(self.directory / "master.sock")) == 0)
            connection.settimeout(5)
            connection.sendall(b"show proc\n")
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return re.findall(r"^(\d+)\s+worker", answer.decode(), re.MULTILINE)

    def ejects(self, name: str) -> None:
        """The health agent finds a hang: first HAProxy hears of it, then the engine's middleware."""
        self.agent.words[name] = "down #no token for 6 s and the canary failed"
        wait_for(lambda: self.server(name)["status"] == "DOWN (agent)")
        (self.directory / "hung" / name).touch()

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()

    def stop(self) -> None:
        if haproxy := self.processes.pop("haproxy", None):
            # With all its workers.
            os.killpg(haproxy.pid, signal.SIGKILL)
            haproxy.wait()
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
        # The journal takes the level off.
        lines = re.findall(r"^<6>(\{.*\})$", self.log.read_text(), re.MULTILINE)
        return [json.loads(line) for line in lines]

    def sent_again(self) -> int:
        """How often requests were sent again. The log comes a moment after the answer."""
        return sum(int(line["retries"].lstrip("+")) for line in self.logged())


def fetch(port: int, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        with connection.getresponse() as response:
            return Answer(response.status, response.read(), response.headers, response.headers.get("X-Engine", ""))


class Stream(threading.Thread):
    """A client that reads a stream: the delay of each token (s), and how the stream ended."""

    def __init__(self, port: int, body: dict) -> None:
        super().__init__(daemon=True)
        self.port, self.body = port, {"stream": True, **body}
        self.delays: list[float] = []
        self.engine = ""
        self.complete = False
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", POST, json.dumps(self.body))
            with connection.getresponse() as response:
                self.engine = response.headers.get("X-Engine", "")
                for line in response:
                    if line.startswith(b"data: {"):
                        self.delays.append(time.monotonic() - json.loads(line[6:])["sent"])
                    self.complete = self.complete or line == b"data: [DONE]\n"

    def ended(self) -> tuple[str, int, bool]:
        self.join(30)
        assert not self.is_alive()
        return self.engine, len(self.delays), self.complete


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affinity": "session"},
        # Fewer places than clients: the other engine is full when the first one dies.
        {"arguments": {"max-num-seqs": 2}},
    ],
    ids=["leastconn", "session", "full"],
)
def test_an_engine_that_is_killed_loses_nothing(start, options):
    gateway = start(**options)
    body = {"pause": 0.02, "prompt": ""}
    body["prompt"] = "x" * (gateway.plan.body_limit - len(json.dumps(body)))

    assert load(gateway, body, event=lambda: gateway.kill("primary")) == []
    wait_for(gateway.sent_again)
    wait_for(lambda: gateway.server("primary")["status"].startswith("DOWN"))
    gateway.start_engine("primary")
    wait_for(lambda: gateway.server("primary")["status"] == "UP")


@pytest.mark.parametrize("behave", ["die", "close", "reset"])
def test_a_request_is_sent_again_in_full_before_the_first_byte(start, behave):
    gateway = start()
    body = json.dumps({"behave": {"primary": behave}, "prompt": "x" * 90_000}).encode()

    answers = [gateway.ask(body) for _ in range(2)]

    assert [(answer.status, json.loads(answer.body)) for answer in answers] == [
        (200, {"engine": "secondary", "bytes": len(body)})
    ] * 2
    wait_for(gateway.sent_again)


def test_a_request_that_ends_engines_takes_three_of_them_at_most(start):
    """Each one dies over it without a byte."""
    gateway = start(names=("one", "two", "three", "four", "five"))

    assert gateway.ask({"behave": dict.fromkeys(gateway.names, "die")}).status == 502
    assert [process.poll() for name, process in gateway.processes.items() if name in gateway.names].count(None) == 2


def test_a_stream_that_is_cut_is_seen_as_cut(start):
    gateway = start()

    with pytest.raises(http.client.IncompleteRead):
        gateway.ask({"stream": True, "behave": {"primary": "cut", "secondary": "cut"}})

    assert sum(gateway.seen(name)["completions"] for name in gateway.names) == 1


def test_an_answer_of_500_is_not_sent_again(start):
    gateway = start()

    assert gateway.ask({"behave": {"primary": "500", "secondary": "500"}}).status == 500
    assert sum(gateway.seen(name)["completions"] for name in gateway.names) == 1


def test_an_answer_of_503_is_sent_again(start):
    gateway = start()

    answers = [gateway.ask({"behave": {"primary": "503"}}) for _ in range(4)]

    assert [(answer.status, answer.engine) for answer in answers] == [(200, "secondary")] * 4
    assert gateway.seen("primary")["completions"] > 0


def test_where_all_answer_503_the_client_has_the_last_one(start):
    gateway = start()

    answer = gateway.ask({"behave": {"primary": "503", "secondary": "503"}})

    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert json.loads(answer.body)["error"]["message"] == f"told so by {answer.engine}"
    # Each time another one, and no more than twice again.
    assert sorted(gateway.seen(name)["completions"] for name in gateway.names) == [1, 2]


def test_no_engine_is_told_after_the_body(start):
    gateway = start()
    for name in gateway.names:
        gateway.kill(name)
        wait_for(lambda name=name: gateway.server(name)["status"].startswith("DOWN"))

    answer = gateway.ask(b"x" * gateway.plan.body_limit)

    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert json.loads(answer.body)["error"]["type"] == "service_unavailable"
    assert gateway.ask(method="GET", path="/health").status == 503


def test_what_waits_for_an_engine_that_the_agent_ejects_moves_on(start):
    gateway = start()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(gateway.ask, {"behave": {"primary": "hang"}}) for _ in range(8)]
        wait_for(lambda: gateway.seen("primary")["under_way"])
        gateway.ejects("primary")
        found = [(future.result().status, future.result().engine) for future in answers]

    assert found == [(200, "secondary")] * 8


def test_of_an_ejected_engine_streams_go_on_and_the_rest_moves_on(start):
    gateway = start()
    running = [Stream(gateway.ports["door"], {"tokens": 60, "pause": 0.05}) for _ in range(2)]
    wait_for(lambda: all(stream.delays for stream in running))
    assert {stream.engine for stream in running} == {"primary", "secondary"}
    held = [Stream(gateway.ports["door"], {"behave": {"primary": "held"}, "hold": 15}) for _ in range(4)]
    wait_for(lambda: gateway.seen("primary")["under_way"] > 1)

    gateway.ejects("primary")

    assert [stream.ended() for stream in held] == [("secondary", 3, True)] * 4
    assert [stream.complete for stream in running] == [False, False]
    assert sorted(stream.ended() for stream in running) == [("primary", 60, True), ("secondary", 60, True)]


def test_what_waits_for_a_hung_engine_moves_on_when_that_is_restarted(start):
    gateway = start()
    # As when the agent is away.
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(gateway.ask, {"behave": {"primary": "hang"}}) for _ in range(4)]
        wait_for(lambda: sum(gateway.seen(name)["completions"] for name in gateway.names) == 4)
        gateway.kill("primary")
        found = [(future.result().status, future.result().engine) for future in answers]

    assert found == [(200, "secondary")] * 4


def test_an_engine_that_only_fails_its_health_check_keeps_its_streams(start):
    gateway = start(names=("primary",))
    running = Stream(gateway.ports["door"], {"tokens": 60, "pause": 0.05, "unhealthy": True})
    wait_for(lambda: gateway.server("primary")["status"].startswith("DOWN"))

    assert not running.complete
    assert running.ended() == ("primary", 60, True)


def test_a_drain_loses_nothing_and_lets_streams_run(start):
    gateway = start()
    running = [Stream(gateway.ports["door"], {"tokens": 40, "pause": 0.05}) for _ in range(2)]
    wait_for(lambda: all(stream.delays for stream in running))
    came = []

    def drain() -> None:
        gateway.agent.words["primary"] = "drain"
        wait_for(lambda: gateway.server("primary")["status"] == "DRAIN (agent)")
        came.append(gateway.seen("primary")["completions"])

    assert load(gateway, {"pause": 0.01}, event=drain) == []
    assert sorted(stream.ended() for stream in running) == [("primary", 40, True), ("secondary", 40, True)]
    # What was on its way when the word came still arrives.
    settled = gateway.seen("primary")["completions"]
    assert settled - came[0] <= 8
    assert [gateway.ask({}).engine for _ in range(4)] == ["secondary"] * 4
    assert gateway.seen("primary")["completions"] == settled


def test_tokens_are_not_held_up(start):
    gateway = start(names=("primary",))

    def median(port: int) -> float:
        stream = Stream(port, {"tokens": 100, "pause": 0.005})
        assert stream.ended() == ("primary", 100, True)
        return statistics.median(stream.delays)

    # Alternately, and the best of each, as others use the machine too. Without http-no-delay it is 40 ms and more.
    rounds = [(median(gateway.ports["door"]), median(gateway.ports["primary"])) for _ in range(3)]
    assert min(through for through, _ in rounds) - min(direct for _, direct in rounds) < 0.001


def test_a_short_request_takes_a_whole_buffer(start):
    """So the figure in the configuration counts buffers, and not bytes."""
    gateway = start(arguments={"max-model-len": 131_072, "max-num-seqs": 20})

    def resident() -> int:
        text = Path(f"/proc/{gateway.helper.worker()}/smaps_rollup").read_text()
        return 1024 * int(re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)[1])

    before = resident()
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(gateway.ask, {"pause": 2}) for _ in range(40)]
        wait_for(lambda: sum(gateway.seen(name)["under_way"] for name in gateway.names) == 40)
        taken = (resident() - before) / 40
        assert {answer.result().status for answer in answers} == {200}

    assert 0.8 < taken / gateway.plan.bufsize < 2


@contextlib.contextmanager
def relayed(gateway: Gateway, kind: str):
    """The drill's fault of that kind in front of primary."""
    door = ServerAddress("primary", str(gateway.directory / "admin.sock"))
    target = Endpoint("primary", f"http://127.0.0.1:{gateway.ports['primary']}")
    fault = Relayed(kind, target, 60.0, door, "vllm-gateway.service")
    home = door.look()
    assert home == ("127.0.0.1", gateway.ports["primary"])
    fault.prepare()
    try:
        fault.inject()
        assert door.look() != home
        yield door
        fault.restore()
        assert door.look() == home
    finally:
        fault.close()
    # It is looked at, at the relay and back, and never out.
    assert gateway.server("primary")["status"] == "UP"
    assert {gateway.ask({}).engine for _ in range(4)} == {"primary", "secondary"}


def test_a_storm_of_503_costs_users_of_the_gateway_nothing(start):
    gateway = start()
    with relayed(gateway, "storm503"):
        assert load(gateway, {"pause": 0.01}, number=80) == []
        assert gateway.seen("primary")["completions"] == 0
    wait_for(gateway.sent_again)


def test_a_slow_engine_gets_fewer_requests(start):
    gateway = start()
    with relayed(gateway, "slow"):
        assert load(gateway, {"pause": 0.01}, number=80) == []
        assert 0 < gateway.seen("primary")["completions"] < gateway.seen("secondary")["completions"]


def test_a_reset_in_the_middle_of_an_answer_is_seen(start):
    gateway = start()
    with relayed(gateway, "reset"):
        streams = [Stream(gateway.ports["door"], {"tokens": 20, "pause": 0.05}) for _ in range(4)]
        ended = {stream.ended() for stream in streams}
    assert ended == {("primary", 3, False), ("secondary", 20, True)}


def test_a_reload_has_the_gateway_look_at_the_engine_again(start):
    """So the drill's timer undoes it, should the drill be killed."""
    gateway = start()
    door = ServerAddress("primary", str(gateway.directory / "admin.sock"))
    door.move(("127.0.0.1", gateway.ports["secondary"]))
    assert gateway.reload() == ""
    assert door.look() == ("127.0.0.1", gateway.ports["primary"])


@pytest.mark.parametrize("delay", [False, True], ids=["as it is", "without http-no-delay"])
def test_molecules_judge_of_gaps_tells_a_gateway_that_collects_tokens(start, delay):
    gateway = start(names=("primary",))
    gateway.kill("primary")
    stand_in = [sys.executable, str(ROOT / "tools/bench_latency.py"), "stand-in", str(gateway.ports["primary"])]
    gateway.processes["primary"] = subprocess.Popen(stand_in)
    if delay:
        path = gateway.directory / "haproxy.cfg"
        path.write_text(path.read_text().replace("  option http-no-delay\n", ""))
        assert gateway.reload() == ""
    wait_for(lambda: gateway.server("primary")["status"] == "UP")
    ports = {"direct": gateway.ports["primary"], "gateway": gateway.ports["door"]}
    doors = [bench_latency.Door(name, (f"http://127.0.0.1:{port}",)) for name, port in ports.items()]

    found = bench_latency.report(bench_latency.measure(doors, "stand-in", 5, 40, ""))

    assert [one["failed"] for one in found.values()] == [0, 0]
    with pytest.raises(AssertionError) if delay else contextlib.nullcontext():
        judge_gaps(found)


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
    gateway.ejects("primary")
    problems = []

    def rotate() -> None:
        gateway.write([{"name": "old", "key": "o" * 32}, {"name": "new", "key": "n" * 32}])
        problems.append(gateway.reload())

    assert load(gateway, {"pause": 0.01}, event=rotate, key="o" * 32) == []
    assert problems == [""]
    assert gateway.ask({}, key="n" * 32).status == 200
    assert gateway.seen("primary")["completions"] == 0


def test_what_runs_at_a_reload_ends_in_the_old_process(start):
    gateway = start()
    idle = [http.client.HTTPConnection("127.0.0.1", gateway.ports["door"], timeout=20) for _ in range(2)]

    def over(connection: http.client.HTTPConnection, method: str, path: str, body: dict | None = None) -> tuple:
        """Status of a request over a connection that was there before, and whether another one may follow."""
        connection.request(method, path, body and json.dumps(body))
        with connection.getresponse() as response:
            assert response.read()
            return response.status, response.headers.get("Connection", "keep-alive")

    with contextlib.closing(idle[0]), contextlib.closing(idle[1]):
        for connection in idle:
            assert over(connection, "GET", "/v1/models") == (200, "keep-alive")
        stream = Stream(gateway.ports["door"], {"tokens": 50, "pause": 0.1})
        wait_for(lambda: stream.delays)
        slow = {"behave": {"primary": "held"}, "hold": 15}
        held = [Stream(gateway.ports["door"], slow) for _ in range(4)]
        wait_for(lambda: sum(gateway.seen(name)["completions"] for name in gateway.names) == 5)
        (old,) = gateway.workers()

        assert gateway.reload() == ""
        assert old in gateway.workers()
        # Connections without a request are served once more, in the old process.
        assert over(idle[0], "POST", POST, {"behave": {"primary": "close"}}) == (200, "close")
        assert over(idle[1], "GET", "/health") == (200, "close")
        # The old process checks no engine, and what waits in it moves on all the same.
        gateway.ejects("primary")
        assert [waiter.ended()[1:] for waiter in held] == [(3, True)] * 4
        assert {waiter.engine for waiter in held} == {"secondary"}
        assert not stream.complete
        assert stream.ended()[1:] == (50, True)
        wait_for(lambda: old not in gateway.workers())


def test_an_engine_that_is_drained_after_a_reload_gets_nothing_from_the_old_process_either(start):
    """That one asks the agent no more; the engine sends back what comes."""
    gateway = start()
    with contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", gateway.ports["door"])))
            for _ in range(8)
        ]
        for connection in idle:
            connection.request("GET", "/v1/models")
            connection.getresponse().read()
        assert gateway.reload() == ""
        gateway.agent.words["primary"] = "drain"
        (gateway.directory / "drained/primary").touch()
        wait_for(lambda: gateway.server("primary")["status"] == "DRAIN (agent)")

        for connection in idle:
            connection.request("POST", POST, "{}")
        answers = [connection.getresponse() for connection in idle]
        assert {(answer.status, answer.headers["X-Engine"]) for answer in answers} == {(200, "secondary")}
    # The old process knew of no drain.
    assert gateway.seen("primary")["completions"] > 0


def test_a_reload_takes_up_engines_that_are_new_moved_or_gone(start):
    gateway = start()
    gateway.ejects("primary")
    gateway.kill("secondary")
    wait_for(lambda: gateway.server("secondary")["status"].startswith("DOWN"))

    # Secondary moves to another port, and a third one comes.
    gateway.ports["secondary"], gateway.ports["third"] = free_ports(2)
    gateway.names.append("third")
    for name in ("secondary", "third"):
        gateway.start_engine(name)
    gateway.write()
    assert gateway.reload() == ""
    assert [gateway.server(name)["status"].split()[0] for name in gateway.names] == ["DOWN", "UP", "UP"]
    assert {gateway.ask({}).engine for _ in range(8)} == {"secondary", "third"}

    # Primary goes: its state is nobody's.
    gateway.names.remove("primary")
    gateway.write()
    assert gateway.reload() == ""
    assert {gateway.ask({}).engine for _ in range(8)} == {"secondary", "third"}
    assert (gateway.directory / "servers").read_text().count(" engines ") == 2


@pytest.mark.parametrize("tls", ["off", "files"])
@pytest.mark.parametrize("affinity", ["none", "session"])
@pytest.mark.parametrize("count", [1, 4])
def test_haproxy_has_nothing_to_say_against_the_configuration(tmp_path, tls, affinity, count):
    names = tuple(f"engine{number}" for number in range(count))
    pair = {"tls_certificate": "/etc/ssl/door.pem", "tls_key": "/etc/ssl/door.key"}
    # From 3.0 on it warns of more threads than processors.
    threads = {"vllm_gateway_threads": 1}
    gateway = Gateway(tmp_path, names=names, affinity=affinity, tls=tls, variables=threads, **pair)
    gateway.stop()
    if tls == "files":
        name = ["-subj", "/CN=door", "-keyout", str(tmp_path / "door.key"), "-out", str(tmp_path / "door.crt")]
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subprocess.run(["openssl", "req", "-x509", *curve, *name], check=True, capture_output=True)
        text = [(tmp_path / part).read_text() for part in ("door.crt", "door.key")]
        (tmp_path / "door.pem").write_text("".join(text))
    gateway.helper.prepare()
    gateway.write()

    command = [HAPROXY, "-c", "-f", str(tmp_path / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, re.findall(r"WARNING|ALERT", done.stderr)) == (0, []), done.stderr
