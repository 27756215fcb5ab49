"""The helper of vllm@.service: fingerprint, back-off, turns, GPU memory, readiness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _json_file, _unit
from ansible_collections.nvl.vllm.plugins.module_utils._unit import Helper, NotReady, Paths, Turn

GPU = "GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001"
#: nvidia-smi --query-gpu=memory.total,memory.reserved,memory.free --format=csv,noheader,nounits: the figures that
#: nvidia-smi -q was recorded to show on an idle H100 NVL (driver 550), and such a card with an engine on it.
IDLE = "95830, 594, 95235\n"
BUSY = "95830, 594, 14121\n"


class FakeHost:
    """All that an engine is started from, below tmp_path."""

    def __init__(self, path):
        self.paths = Paths(*(str(path / name) for name in ("state", "etc", "units", "calibration")))
        self.root, self.model = path / "opt", path / "model"
        self.etc, self.units = path / "etc", path / "units"
        for folder in (self.etc, self.units, self.root / "a", self.root / "b", self.model / "sub"):
            folder.mkdir(parents=True)
        (self.etc / "primary.yaml").write_text("port: 8001\n")
        (self.etc / "primary.env").write_text("A=1\n")
        (self.units / "vllm@.service").write_text("[Service]\n")
        (self.root / "current").symlink_to(self.root / "a")
        (self.model / "config.json").write_text("{}")

    def fingerprint(self):
        return _unit.fingerprint("primary", str(self.root), str(self.model), self.paths)

    def state(self, failed_starts):
        """What the state of a unit says that was started from all this."""
        return {
            "fingerprint": self.fingerprint(),
            "failed_starts": failed_starts,
            "release": os.path.realpath(self.root / "a"),
            "model": os.path.realpath(self.model),
        }

    def drop_in(self, unit):
        (self.units / f"{unit}.d").mkdir()
        (self.units / f"{unit}.d/override.conf").write_text("[Service]\nNice=5\n")

    def point_current_to(self, release):
        (self.root / "current").unlink()
        (self.root / "current").symlink_to(self.root / release)


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda host: (host.etc / "primary.yaml").write_text("port: 8009\n"),
        lambda host: (host.etc / "primary.yaml").unlink(),
        lambda host: (host.etc / "primary.env").write_text("A=2\n"),
        lambda host: (host.units / "vllm@.service").write_text("[Service]\nNice=5\n"),
        lambda host: host.drop_in("vllm@.service"),
        lambda host: host.drop_in("vllm@primary.service"),
        lambda host: host.point_current_to("b"),
        lambda host: (host.model / "config.json").write_text('{"a": 1}'),
        lambda host: (host.model / "sub/shard").write_text(""),
        lambda host: (host.model / "config.json").rename(host.model / "other.json"),
    ],
    ids=["yaml", "no-yaml", "env", "unit", "drop-in", "own-drop-in", "release", "model", "model-file", "model-name"],
)
def test_fingerprint_changes_with_what_an_engine_is_started_from(host, change):
    before = host.fingerprint()
    change(host)
    assert host.fingerprint() != before


@pytest.mark.parametrize(
    "change",
    [
        lambda host: None,
        lambda host: (host.etc / "primary.yaml").write_text("port: 8001\n"),
        lambda host: (host.etc / "secondary.yaml").write_text("port: 8002\n"),
        lambda host: (host.etc / "secondary.env").write_text("A=2\n"),
        lambda host: host.drop_in("vllm@secondary.service"),
        lambda host: (host.root / "b/new").write_text(""),
        lambda host: _unit.write_state("primary", {"failed_starts": 1}, host.paths),
    ],
    ids=["nothing", "written-again", "other-yaml", "other-env", "other-drop-in", "other-release", "state"],
)
def test_fingerprint_changes_with_nothing_else(host, change):
    before = host.fingerprint()
    change(host)
    assert host.fingerprint() == before


def test_content_does_not_move_from_one_file_to_the_next_unseen(host):
    before = host.fingerprint()
    (host.etc / "primary.yaml").write_text("")
    (host.etc / "primary.env").write_text("port: 8001\nA=1\n")
    assert host.fingerprint() != before


def test_back_off_doubles_up_to_a_minute():
    assert [_unit.back_off_seconds(failed) for failed in range(9)] == [0, 2, 4, 8, 16, 32, 60, 60, 60]


def test_failed_starts_are_counted_until_the_inputs_change(host):
    counts = [_unit.count_start("primary", "one", host.paths) for _ in range(3)]
    assert counts == [0, 1, 2]
    assert _unit.count_start("primary", "two", host.paths) == 0
    assert _unit.count_start("primary", "two", host.paths) == 1
    assert _unit.count_start("secondary", "two", host.paths) == 0


@pytest.mark.parametrize("text", ["", "{half of", "[]"])
def test_a_damaged_state_counts_as_none(host, text):
    _unit.write_state("primary", {"fingerprint": "one", "failed_starts": 3}, host.paths)
    (host.root.parent / "state/primary.json").write_text(text)
    assert _unit.read_state("primary", host.paths) == {}


def test_one_turn_for_two(host):
    primary, secondary = (Turn(name, 600.0, host.paths) for name in ("primary", "secondary"))
    assert primary.take() == "primary"
    assert secondary.take() == "primary"
    assert primary.take() == "primary"
    primary.give()
    assert secondary.take() == "secondary"
    assert primary.take() == "secondary"


def test_who_has_not_the_turn_cannot_give_it(host):
    primary, secondary = (Turn(name, 600.0, host.paths) for name in ("primary", "secondary"))
    primary.take()
    secondary.give()
    assert secondary.take() == "primary"


@pytest.mark.parametrize(("age", "holder"), [(599.0, "primary"), (601.0, "secondary"), (-1.0, "secondary")])
def test_a_holder_that_is_gone_loses_the_turn(host, monkeypatch, age, holder):
    now = 10_000.0
    monkeypatch.setattr(_unit.time, "monotonic", lambda: now)
    Turn("primary", 600.0, host.paths).take()
    now += age
    assert Turn("secondary", 600.0, host.paths).take() == holder


class FakeNvidiaSmi:
    """A runner that answers with these outputs, the last one again and again."""

    def __init__(self, *outputs, rc=0):
        self.outputs = list(outputs)
        self.rc = rc
        self.asked = []

    def __call__(self, argv):
        self.asked.append(argv)
        return self.rc, self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0], ""


def test_what_vllm_wants_is_a_share_of_what_cuda_sees():
    assert _unit.wanted_mib(IDLE, 0.85) == [(95235, 80951)]
    assert _unit.wanted_mib(IDLE + BUSY, 0.5) == [(95235, 47618), (14121, 47618)]


def test_free_gpus_are_not_waited_for():
    smi = FakeNvidiaSmi(IDLE + IDLE)
    _unit.wait_for_gpus(f"{GPU},GPU-2", 0.85, smi, pause=pytest.fail)
    query = "--query-gpu=memory.total,memory.reserved,memory.free"
    assert smi.asked == [["nvidia-smi", f"--id={GPU},GPU-2", query, "--format=csv,noheader,nounits"]]


def test_memory_that_is_given_back_late_is_waited_for():
    pauses = []
    _unit.wait_for_gpus(GPU, 0.85, FakeNvidiaSmi(IDLE + BUSY, BUSY + IDLE, IDLE + IDLE), pauses.append)
    assert pauses == [1.0, 1.0]


def test_memory_that_is_not_given_back_is_told_with_figures():
    with pytest.raises(NotReady) as refusal:
        _unit.wait_for_gpus(
            GPU, 0.85, FakeNvidiaSmi(BUSY, "4711, /usr/bin/python3, 81000\n"), pause=pytest.fail, seconds=0
        )
    assert str(refusal.value) == (
        f"a GPU of {GPU} has 14121 MiB free and gpu-memory-utilization 0.85 wants 80951 MiB: "
        "end what else runs there (/usr/bin/python3, process 4711, 81000 MiB), or lower gpu-memory-utilization"
    )


def test_memory_that_nobody_visible_holds_is_told_as_such():
    with pytest.raises(NotReady, match=r"end what else runs there \(nvidia-smi names nothing\)"):
        _unit.wait_for_gpus(GPU, 0.85, FakeNvidiaSmi(BUSY, ""), pause=pytest.fail, seconds=0)


def test_a_driver_that_does_not_answer_is_quoted():
    smi = FakeNvidiaSmi("No devices were found\n", rc=6)
    with pytest.raises(NotReady, match=r"^nvidia-smi failed with status 6: No devices were found$"):
        _unit.wait_for_gpus(GPU, 0.85, smi, pause=pytest.fail)


def test_a_figure_that_is_missing_is_told():
    with pytest.raises(NotReady, match=r"^nvidia-smi says '95830, \[N/A\], 95235', wanted total, reserved and free"):
        _unit.wait_for_gpus(GPU, 0.85, FakeNvidiaSmi("95830, [N/A], 95235"), pause=pytest.fail)


@pytest.fixture
def helper(host, fake_vllm):
    """Makes the helper of an instance, as its unit would; ``made.said`` is what it told the journal."""

    def make(name="primary", run=pytest.fail, pause=pytest.fail, **environment):
        said = []
        unit = {
            "NVL_VLLM_ROOT": str(host.root),
            "NVL_VLLM_MODEL_PATH": str(host.model),
            "NVL_VLLM_START_TIMEOUT": "600",
            "NVL_VLLM_SERVED_MODEL_NAME": "gpt-oss-120b",
            "NVL_VLLM_URL": fake_vllm.url,
        }
        # Nothing listens there.
        gateway = environment.pop("gateway", "http://127.0.0.1:1")
        made = Helper(name, {**unit, **environment}, run, host.paths, said.append, pause, gateway)
        made.said = said
        return made

    return make


@pytest.fixture
def engine():
    """A live process in the place of an engine."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_prepare_of_a_first_start_waits_for_nothing(helper, host):
    made = helper()
    made.prepare()
    assert made.said == []
    assert _unit.read_state("primary", host.paths) == host.state(failed_starts=1)


def test_prepare_records_where_links_lead(helper, host):
    link = host.root.parent / "link"
    link.symlink_to(host.model)
    helper(NVL_VLLM_MODEL_PATH=str(link)).prepare()
    host.point_current_to("b")
    state = _unit.read_state("primary", host.paths)
    assert state["release"] == os.path.realpath(host.root / "a")
    assert state["model"] == os.path.realpath(host.model)


def test_prepare_backs_off_after_a_failed_start(helper):
    helper().prepare()
    pauses = []
    made = helper(pause=pauses.append)
    made.prepare()
    assert pauses == [2.0]
    assert made.said == ["1 starts failed before this one: waiting 2 s"]


def test_prepare_does_not_back_off_after_a_change(helper, host):
    helper().prepare()
    (host.etc / "primary.yaml").write_text("port: 8009\n")
    helper().prepare()


def test_prepare_waits_for_the_turn(helper, host):
    other = Turn("secondary", 600.0, host.paths)
    other.take()
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            other.give()

    made = helper(pause=pause)
    made.prepare()
    assert len(pauses) == 3
    assert made.said == ["waiting for secondary to finish its start, as engines size their memory one at a time"]
    assert other.take() == "primary"


def test_prepare_waits_for_the_memory_of_the_gpus(helper):
    smi = FakeNvidiaSmi(BUSY, IDLE)
    pauses = []
    made = helper(run=smi, pause=pauses.append, CUDA_VISIBLE_DEVICES=GPU, NVL_VLLM_GPU_MEMORY_UTILIZATION="0.85")
    made.prepare()
    assert pauses == [1.0]


def test_ready_when_a_completion_was_answered(helper, host, fake_vllm, engine):
    helper().prepare()
    made = helper(MAINPID=str(engine.pid), VLLM_API_KEY="sk-123")
    made.ready()
    (headers,) = [headers for path, headers, _ in fake_vllm.requests if path.endswith("/completions")]
    assert headers["Authorization"] == "Bearer sk-123"
    assert _unit.read_state("primary", host.paths) == host.state(failed_starts=0)
    assert Turn("secondary", 600.0, host.paths).take() == "secondary"
    assert len(made.said) == 1


def test_what_vllm_measured_on_the_gpu_is_kept(helper, host, fake_vllm, engine):
    smi = FakeNvidiaSmi(IDLE)
    gpu = {"CUDA_VISIBLE_DEVICES": GPU, "NVL_VLLM_GPU_MEMORY_UTILIZATION": "0.85", "INVOCATION_ID": "ab12"}
    helper(run=smi, **gpu).prepare()
    journal = FakeNvidiaSmi("Model loading took 61.43 GiB memory\nAvailable KV cache memory: 14.2 GiB\n")
    helper(run=journal, MAINPID=str(engine.pid), **gpu).ready()
    assert journal.asked == [["journalctl", "--no-pager", "--output=cat", "_SYSTEMD_INVOCATION_ID=ab12"]]
    kept = _json_file.read_object(f"{host.paths.calibration}/primary.json")
    assert kept["figures"] == {"weights_gib": 61.43, "available_kv_gib": 14.2}
    assert kept["release"] == os.path.realpath(host.root / "current")
    assert kept["model"] == os.path.realpath(host.model)


def test_a_start_is_good_also_where_its_figures_cannot_be_kept(helper, host, fake_vllm, engine):
    smi = FakeNvidiaSmi(IDLE)
    gpu = {"CUDA_VISIBLE_DEVICES": GPU, "NVL_VLLM_GPU_MEMORY_UTILIZATION": "0.85", "INVOCATION_ID": "ab12"}
    helper(run=smi, **gpu).prepare()
    (host.etc / "primary.yaml").unlink()
    made = helper(run=FakeNvidiaSmi("Model loading took 61.43 GiB memory\n"), MAINPID=str(engine.pid), **gpu)
    made.ready()
    assert made.said[-1].startswith("what vLLM measured is not kept: ")


def test_an_engine_that_dies_is_not_waited_for(helper, host, fake_vllm, engine):
    helper().prepare()
    fake_vllm.health = 503
    fake_vllm.chat = "503"
    fake_vllm.models = []
    died = []

    class Requests(list):
        """Ends the engine with the first request."""

        def append(self, request):
            super().append(request)
            if not died:
                died.append(True)
                engine.kill()

    fake_vllm.requests = Requests()
    with pytest.raises(NotReady, match=r"^the engine ended while it started: "):
        helper(MAINPID=str(engine.pid), NVL_VLLM_START_TIMEOUT="10").ready()
    assert _unit.read_state("primary", host.paths)["failed_starts"] == 1
    assert Turn("secondary", 600.0, host.paths).take() == "primary"


def test_an_engine_that_is_gone_already_is_not_waited_for(helper, fake_vllm, engine):
    fake_vllm.die()
    engine.kill()
    engine.wait()
    with pytest.raises(NotReady, match=r"^the engine ended while it started: "):
        helper(MAINPID=str(engine.pid), NVL_VLLM_START_TIMEOUT="10").ready()


def test_stopped_gives_the_turn_back(helper, host):
    helper().prepare()
    helper("secondary").stopped()
    assert Turn("secondary", 600.0, host.paths).take() == "primary"
    helper().stopped()
    assert Turn("secondary", 600.0, host.paths).take() == "secondary"


class Gateway(ThreadingHTTPServer):
    """HAProxy's page of statistics. It drains an engine some looks after the drain file is there, or never."""

    def __init__(self, drain, looks):
        self.drain, self.looks, self.seen, self.returns = drain, looks, 0, 0
        self.requests = 0  # at the engine; one has ended at each look
        super().__init__(("127.0.0.1", 0), GatewayHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/;csv"

    def status(self):
        if self.returns:
            self.returns -= 1
            return "DOWN 1/2"
        self.seen += self.drain.exists()
        return "DRAIN" if self.seen > self.looks else "UP"


class GatewayHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, requests = self.server.status(), self.server.requests
        self.server.requests -= status == "DRAIN" and requests > 0
        text = f"# pxname,svname,scur,status,wretr,\nengines,primary,{requests},{status},0,\n"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def gateway(host):
    made = []

    def make(looks):
        made.append(Gateway(host.root.parent / "state/drain/primary", looks))
        return made[0]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def test_the_gateway_lets_go_before_the_stop_and_sends_again_after_the_start(helper, gateway, engine):
    server, pauses = gateway(looks=2), []
    made = helper(MAINPID="1", gateway=server.url, pause=pauses.append)
    made.leave()
    assert server.drain.read_text() == _unit.LEAVING
    assert pauses == [0.1, 0.1]
    helper().prepare()
    assert server.drain.exists()
    helper(MAINPID=str(engine.pid)).ready()
    assert not server.drain.exists()


def test_the_engine_may_look_for_its_drain_file(helper, gateway):
    """After a boot the helper makes the directories, with the umask of the unit."""
    before = os.umask(0o077)
    try:
        helper().prepare()
        server = gateway(looks=0)
        helper(MAINPID="1", gateway=server.url).leave()
    finally:
        os.umask(before)
    folder = server.drain.parent
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, folder.parent)] == ["0o755", "0o755"]


def test_what_the_gateway_has_just_sent_arrives_before_the_stop(helper, gateway):
    """vLLM answers 500 to what it begins after SIGTERM."""
    server, pauses = gateway(looks=0), []
    server.requests = 3
    helper(MAINPID="1", gateway=server.url, pause=pauses.append).leave()
    assert server.requests == 0


def test_long_answers_do_not_hold_up_a_stop(helper, gateway, monkeypatch):
    monkeypatch.setattr(_unit, "ARRIVE_SECONDS", 0.0)
    server = gateway(looks=0)
    server.requests = 10**6
    made = helper(MAINPID="1", gateway=server.url)
    made.leave()
    assert made.said == []


def test_a_start_ends_when_the_gateway_uses_the_engine(helper, gateway, engine):
    server, pauses = gateway(looks=0), []
    server.returns = 3
    helper(gateway=server.url, pause=pauses.append, MAINPID=str(engine.pid)).ready()
    assert (server.returns, pauses) == (0, [0.1] * 3)


def test_a_gateway_that_does_not_take_the_engine_is_told_and_not_waited_for(helper, gateway, engine, monkeypatch):
    monkeypatch.setattr(_unit, "RETURN_SECONDS", 0.0)
    server = gateway(looks=0)
    server.returns = 10**6
    made = helper(gateway=server.url, MAINPID=str(engine.pid))
    made.ready()
    assert "the gateway does not use primary after 0 s: going on all the same" in made.said


def test_a_drain_of_an_operator_outlives_a_restart(helper, gateway, engine):
    server = gateway(looks=0)
    server.drain.parent.mkdir(parents=True)
    server.drain.write_text("new cables\n")
    helper(MAINPID="1", gateway=server.url).leave()
    helper().prepare()
    helper(MAINPID=str(engine.pid)).ready()
    assert server.drain.read_text() == "new cables\n"


def test_a_gateway_that_does_not_let_go_is_told_and_not_waited_for(helper, gateway, monkeypatch):
    monkeypatch.setattr(_unit, "LEAVE_SECONDS", 0.0)
    made = helper(MAINPID="1", gateway=gateway(looks=10**6).url)
    made.leave()
    assert made.said == ["the gateway has not let go of primary in 0 s: stopping all the same"]


@pytest.mark.parametrize("environment", [{}, {"MAINPID": "1"}])
def test_an_engine_that_ended_or_has_no_gateway_leaves_at_once(helper, host, environment):
    helper(**environment).leave()
    assert not (host.root.parent / "state/drain").exists()


@pytest.fixture
def main(monkeypatch, host, tmp_path):
    """Runs main() on a host below tmp_path, with standard output as a program has it."""
    monkeypatch.setattr(_unit.Helper.__init__, "__defaults__", (host.paths, print, pytest.fail, "http://127.0.0.1:1"))
    environment = {
        "NVL_VLLM_ROOT": str(host.root),
        "NVL_VLLM_MODEL_PATH": str(host.model),
        "NVL_VLLM_START_TIMEOUT": "600",
    }

    def run(*argv, run=pytest.fail, **more):
        with (tmp_path / "stdout").open("w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            return _unit.main(list(argv), {**environment, **more}, run)

    return run


@pytest.mark.parametrize(
    "argv", [(), ("prepare",), ("start", "primary"), ("prepare", "primary", "x"), ("timeout", "x")]
)
def test_bad_usage_is_status_2(main, capsys, argv):
    assert main(*argv) == 2
    assert capsys.readouterr().err == "usage: vllm-unit prepare|ready|leave|stopped NAME\n"


def test_success_is_status_0(main, host):
    assert main("prepare", "primary") == 0
    assert json.loads((host.root.parent / "state/primary.json").read_text())["failed_starts"] == 1
    assert main("stopped", "primary") == 0


def test_not_ready_is_status_1_with_the_reason(main, capsys):
    smi = FakeNvidiaSmi("No devices were found\n", rc=6)
    more = {"CUDA_VISIBLE_DEVICES": GPU, "NVL_VLLM_GPU_MEMORY_UTILIZATION": "0.85"}
    assert main("prepare", "primary", run=smi, **more) == 1
    assert capsys.readouterr().err == "not ready: nvidia-smi failed with status 6: No devices were found\n"
