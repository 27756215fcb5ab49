"""The faults of the drill on real processes, with stand-ins for systemctl and systemd-run on PATH."""

from __future__ import annotations

import os
import signal
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import EngineError
from ansible_collections.nvl.vllm.plugins.module_utils._faults import (
    NOT_LOADED,
    AllOf,
    DeadMan,
    Drain,
    Fault,
    GatewayReload,
    Hang,
    KillEngine,
    KillServer,
    NotGuarded,
    Relayed,
    Stop,
    undone,
)
from ansible_collections.nvl.vllm.plugins.module_utils._gateway_socket import ServerAddress
from ansible_collections.nvl.vllm.plugins.module_utils._http import Endpoint

UNIT = "vllm@primary.service"

SYSTEMCTL = r"""#!/bin/sh
# A stand-in for systemctl: units are files UNIT.pid, UNIT.state and UNIT.run beside it.
cd "$(dirname "$0")" || exit 1
echo "systemctl $*" >> log
for unit; do :; done
case "$*" in
  *MainPID*) cat "$unit.pid" ;;
  *ActiveState*) echo "ActiveState=$(cat "$unit.state")"; echo "InvocationID=$(cat "$unit.run")" ;;
  *" stop "*) [ -e no-stop ] && { echo refused >&2; exit 1; }; echo deactivating > "$unit.state" ;;
  *" start "*) echo activating > "$unit.state"; echo new > "$unit.run" ;;
  "kill --signal=SIGCONT"*) kill -CONT "$(cat "$unit.pid")" ;;
  *.timer) [ -e "$unit" ] || exit 5; kill "$(cat "$unit")"; rm "$unit" ;;
  reset-failed*) [ -e no-reset ] && { echo "no bus" >&2; exit 1; }; exit 0 ;;
  reload*) [ -e no-reload ] && { echo broken >&2; exit 1; }; exit 0 ;;
esac
"""

SYSTEMD_RUN = r"""#!/bin/sh
# A stand-in for systemd-run: a timer that is due after a hundredth of the time.
cd "$(dirname "$0")" || exit 1
echo "systemd-run $*" >> log
[ -e no-timer ] && { echo "no bus" >&2; exit 1; }
for word; do
  case "$word" in
    --unit=*) name=${word#--unit=} ;;
    --on-active=*) seconds=${word#--on-active=}; seconds=${seconds%s} ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
(sleep "$(echo "$seconds" | awk '{print $1 / 10}')"; rm -f "$name.timer"; exec "$@") >/dev/null 2>&1 &
echo $! > "$name.timer"
"""


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.01)


def state_of(pid):
    """Letter of the process' state in /proc: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Systemd:
    """The stand-ins in one directory, and what they were asked."""

    def __init__(self, directory):
        self.directory = directory
        for name, text in (("systemctl", SYSTEMCTL), ("systemd-run", SYSTEMD_RUN)):
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        self.set(state="active", run="old")

    def set(self, unit=UNIT, **values):
        for name, value in values.items():
            (self.directory / f"{unit}.{name}").write_text(f"{value}\n")

    def break_(self, name):
        (self.directory / name).touch()

    @property
    def log(self):
        log = self.directory / "log"
        return log.read_text().splitlines() if log.exists() else []

    def run(self, command):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Systemd(directory)


@pytest.fixture
def sleeper():
    """Makes processes that sleep under a name of choice; all end with the test."""
    processes = []

    def start(name="VLLM::EngineCore"):
        processes.append(subprocess.Popen([name, "60"], executable="/bin/sleep"))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def engine(systemd, sleeper):
    """An engine below the unit's main process, which is this test."""
    systemd.set(pid=os.getpid())
    return sleeper()


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


# Hang


def test_a_hang_stops_the_engine_until_its_time_is_up(systemd, engine):
    clock = Clock()
    fault = Hang(UNIT, systemd.run, 20.0, clock=clock)
    fault.prepare()
    wait_until(lambda: state_of(engine.pid) == "S")
    fault.inject()
    wait_until(lambda: state_of(engine.pid) == "T")
    assert fault.pending() == f"engine {engine.pid} of {UNIT} is stopped on purpose"
    clock.time = 20.0
    assert fault.pending() == ""
    wait_until(lambda: state_of(engine.pid) == "S")
    fault.restore()  # nothing is left to do
    assert fault.pending() == ""


def test_a_hang_ends_early_when_restored(systemd, engine):
    fault = Hang(UNIT, systemd.run, 20.0)
    fault.inject()
    fault.restore()
    wait_until(lambda: state_of(engine.pid) == "S")


class Interruption(BaseException):
    """What a signal that ends the drill raises."""


def test_a_hang_that_is_interrupted_as_it_begins_is_undone(systemd, engine):
    numbers = []

    def kill(pid, number):
        os.kill(pid, number)
        numbers.append(number)
        if number == signal.SIGSTOP:
            raise Interruption

    fault = Hang(UNIT, systemd.run, 20.0, kill=kill)
    with pytest.raises(Interruption), undone(fault, DeadMan(systemd.run, "drill")):
        fault.inject()
    assert numbers == [signal.SIGSTOP, signal.SIGCONT]


def test_a_hang_that_is_interrupted_as_it_ends_is_undone(systemd, engine):
    clock, interruptions = Clock(), [Interruption]

    def kill(pid, number):
        if number == signal.SIGCONT and interruptions:
            raise interruptions.pop()
        os.kill(pid, number)

    fault = Hang(UNIT, systemd.run, 20.0, kill=kill, clock=clock)
    fault.inject()
    clock.time = 20.0
    with pytest.raises(Interruption):
        fault.pending()
    fault.restore()
    wait_until(lambda: state_of(engine.pid) == "S")


def test_a_hang_that_was_not_allowed_has_nothing_to_undo(systemd, engine):
    numbers = []

    def kill(_pid, number):
        numbers.append(number)
        raise PermissionError

    fault = Hang(UNIT, systemd.run, 20.0, kill=kill)
    with pytest.raises(EngineError, match="found no permission"):
        fault.inject()
    fault.restore()
    assert numbers == [signal.SIGSTOP]


def test_a_hung_engine_that_a_watchdog_killed_has_a_successor(systemd, engine, sleeper):
    fault = Hang(UNIT, systemd.run, 20.0)
    fault.inject()
    engine.kill()
    engine.wait()
    assert "none of that name" in fault.pending()
    sleeper()
    assert fault.pending() == ""
    fault.restore()


def test_an_engine_inside_its_server_hangs_with_it(systemd, sleeper):
    server = sleeper("vllm")
    systemd.set(pid=server.pid)
    fault = Hang(UNIT, systemd.run, 20.0)
    fault.prepare()
    fault.inject()
    wait_until(lambda: state_of(server.pid) == "T")
    server.kill()
    server.wait()
    assert f"main process {server.pid} of {UNIT} alive" in fault.pending()
    systemd.set(pid=sleeper("vllm").pid)
    assert fault.pending() == ""


def test_no_hang_of_a_unit_that_does_not_run(systemd):
    systemd.set(pid=0)
    with pytest.raises(EngineError, match=f"wanted {UNIT} running on this host"):
        Hang(UNIT, systemd.run, 20.0).prepare()


# Stop


def test_a_stop_waits_for_the_end_and_starts_again(systemd):
    fault = Stop(UNIT, systemd.run)
    fault.prepare()
    fault.inject()
    assert fault.pending() == f"{UNIT} still stops (deactivating)"
    systemd.set(state="inactive")
    assert fault.pending() == f"{UNIT} has stopped (inactive) and is to start"
    assert fault.pending() == f"{UNIT} is activating"
    systemd.set(state="active")
    assert fault.pending() == ""
    fault.restore()
    changes = [line for line in systemd.log if "show" not in line]
    verbs = ("reset-failed", "--no-block stop", "--no-block start")
    assert changes == [f"systemctl {verb} -- {UNIT}" for verb in verbs]


def test_a_stop_that_is_interrupted_starts_the_unit(systemd):
    fault = Stop(UNIT, systemd.run)
    fault.inject()
    fault.restore()
    fault.restore()
    assert systemd.log[-1] == f"systemctl --no-block start -- {UNIT}"
    assert sum(" start " in line for line in systemd.log) == 1


def test_a_stopped_unit_that_somebody_else_started(systemd):
    fault = Stop(UNIT, systemd.run)
    fault.inject()
    systemd.set(state="active", run="new")
    assert fault.pending() == ""
    fault.restore()
    assert not any(" start " in line for line in systemd.log)


def test_no_stop_of_what_is_not_active(systemd):
    systemd.set(state="activating")
    with pytest.raises(EngineError, match=f"wanted {UNIT} active, found activating"):
        Stop(UNIT, systemd.run).prepare()


def test_a_stop_that_systemd_refuses(systemd):
    systemd.break_("no-stop")
    with pytest.raises(EngineError, match="found exit status 1: refused"):
        Stop(UNIT, systemd.run).inject()


# Drain


def test_a_drain_file_is_there_for_its_time(tmp_path):
    clock, path = Clock(), tmp_path / "drain" / "primary"
    fault = Drain("primary", 5.0, str(tmp_path / "drain"), clock)
    fault.prepare()
    assert not path.parent.exists()
    fault.inject()
    assert path.read_text() == "failover drill\n"
    assert fault.pending() == "primary is drained on purpose"
    clock.time = 5.0
    assert fault.pending() == ""
    assert not path.exists()


def test_somebody_elses_drain_file_is_not_touched(tmp_path):
    path = tmp_path / "primary"
    path.write_text("maintenance")
    fault = Drain("primary", 5.0, str(tmp_path))
    with pytest.raises(EngineError, match="is drained already; remove it"):
        fault.prepare()
    with pytest.raises(EngineError, match="File exists"):
        fault.inject()
    fault.restore()
    assert path.read_text() == "maintenance"


def test_a_drain_that_is_interrupted_as_it_begins_is_undone(tmp_path, monkeypatch):
    def open_(path, _mode):
        path.touch()
        raise Interruption

    fault = Drain("primary", 5.0, str(tmp_path))
    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(Interruption):
        fault.inject()
    fault.restore()
    assert list(tmp_path.iterdir()) == []


def test_a_drain_file_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    def open_(path, _mode):
        path.touch()
        raise OSError(28, "No space left on device")

    fault = Drain("primary", 5.0, str(tmp_path))
    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(EngineError, match="found No space left on device"):
        fault.inject()
    assert list(tmp_path.iterdir()) == []


def test_a_drain_file_that_the_unit_removed_at_its_start(tmp_path):
    fault = Drain("primary", 5.0, str(tmp_path))
    fault.inject()
    (tmp_path / "primary").unlink()
    fault.restore()


# The gateway, several at once


def test_a_reload(systemd):
    systemd.set(pid=os.getpid())
    fault = GatewayReload(UNIT, systemd.run)
    fault.prepare()
    fault.inject()
    assert fault.pending() == ""
    assert systemd.log[-1] == f"systemctl reload -- {UNIT}"
    systemd.break_("no-reload")
    with pytest.raises(EngineError, match=f"wanted `systemctl reload -- {UNIT}` to succeed, .* 1: broken"):
        fault.inject()


def test_a_killed_gateway_is_gone_until_its_successor(systemd, sleeper):
    master = sleeper("haproxy")
    systemd.set(pid=master.pid)
    fault = KillServer(UNIT, systemd.run)
    fault.inject()
    assert master.wait(10) == -signal.SIGKILL
    assert f"main process {master.pid}" in fault.pending()
    systemd.set(pid=sleeper("haproxy").pid)
    assert fault.pending() == ""


def test_a_kill_does_not_use_up_the_units_starts(systemd, sleeper):
    master = sleeper("vllm")
    systemd.set(pid=master.pid)
    systemd.break_("no-reset")
    with pytest.raises(EngineError, match=f"wanted `systemctl reset-failed -- {UNIT}` to succeed, .* 1: no bus"):
        KillServer(UNIT, systemd.run).inject()
    assert master.poll() is None
    (systemd.directory / "no-reset").unlink()
    KillServer(UNIT, systemd.run).inject()
    assert master.wait(10) == -signal.SIGKILL
    assert systemd.log.count(f"systemctl reset-failed -- {UNIT}") == 2


def test_both_die_or_none(systemd, sleeper):
    other = "vllm@secondary.service"
    first = sleeper("vllm")
    systemd.set(pid=first.pid)
    systemd.set(other, pid=0)
    fault = AllOf([KillServer(UNIT, systemd.run), KillServer(other, systemd.run)])
    with pytest.raises(EngineError, match=f"wanted {other} running"):
        fault.inject()
    assert first.poll() is None
    second = sleeper("vllm")
    systemd.set(other, pid=second.pid)
    fault.inject()
    assert {process.wait(10) for process in (first, second)} == {-signal.SIGKILL}
    assert f"of {UNIT} alive" in fault.pending()
    assert f"of {other} alive" in fault.pending()
    assert str(fault) == f"SIGKILL to the main process of {UNIT} and SIGKILL to the main process of {other}"


# Relayed


class Haproxy:
    """A stand-in for the gateway's admin socket that knows one server."""

    def __init__(self, path):
        self.place, self.stubborn, self.asked = "127.0.0.1 8001", False, []
        haproxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                self.wfile.write(haproxy.answer(self.rfile.readline().decode().split()).encode())

        self.path = str(path / "admin.sock")
        self.server = socketserver.ThreadingUnixStreamServer(self.path, Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, words):
        if words[0] == "show":
            address, port = self.place.split()
            names = "be_id be_name srv_id srv_name srv_addr srv_op_state srv_port"
            return f"1\n# {names}\n3 engines 1 primary {address} 2 {port}\n\n"
        self.asked.append(" ".join(words))
        if self.stubborn:
            return "Permission denied\n\n"
        self.place = f"{words[4]} {words[6]}"
        return "port changed\n\n"


@pytest.fixture
def haproxy(tmp_path):
    made = Haproxy(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


def relayed(haproxy, **more):
    """A fault of one second in front of the primary, behind the gateway."""
    door = ServerAddress("primary", haproxy.path)
    return Relayed("slow", Endpoint("primary", "http://127.0.0.1:8001"), 1.0, door, "gateway.service", **more)


def test_a_gateway_looks_for_the_engine_at_the_relay_for_the_time_of_the_fault(haproxy):
    clock = Clock()
    fault = relayed(haproxy, clock=clock)
    fault.prepare()
    assert haproxy.asked == []
    fault.inject()
    relay = haproxy.place
    assert relay.startswith("127.0.0.1 ")
    assert relay != "127.0.0.1 8001"
    clock.time = 1.0
    assert fault.pending() == ""
    fault.restore()
    fault.close()
    assert haproxy.asked == [
        f"set server engines/primary addr {place.replace(' ', ' port ')}" for place in (relay, "127.0.0.1 8001")
    ]
    assert fault.undo == ("systemctl", "reload", "--", "gateway.service")


def test_a_gateway_that_is_interrupted_on_its_way_to_the_relay_is_set_back(haproxy, monkeypatch):
    fault = relayed(haproxy)
    fault.prepare()
    move = ServerAddress.move

    def interrupted(door, place):
        move(door, place)
        raise Interruption

    monkeypatch.setattr(ServerAddress, "move", interrupted)
    with pytest.raises(Interruption):
        fault.inject()
    monkeypatch.setattr(ServerAddress, "move", move)
    fault.restore()
    fault.close()
    assert haproxy.place == "127.0.0.1 8001"


def test_a_gateway_that_does_not_move_is_no_fault(haproxy):
    haproxy.stubborn = True
    fault = relayed(haproxy)
    fault.prepare()
    with pytest.raises(EngineError, match=r"found it at 127\.0\.0\.1 port 8001: Permission denied"):
        fault.inject()
    fault.restore()
    fault.close()
    assert haproxy.place == "127.0.0.1 8001"


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("third", "admin.sock", "wanted a server third of the gateway behind .*, found none of that name"),
        ("primary", "none.sock", r"found No such file or directory; set gateway_socket, and run the task as root"),
    ],
)
def test_a_gateway_without_the_engine_or_the_socket(haproxy, tmp_path, name, path, message):
    door = ServerAddress(name, str(tmp_path / path))
    with pytest.raises(EngineError, match=message):
        Relayed("slow", Endpoint(name, "http://127.0.0.1:9"), 1.0, door).prepare()


def test_a_relay_is_the_entrance_of_its_target_alone(fake_vllm):
    target, other = Endpoint("primary", fake_vllm.url, "key"), Endpoint("secondary", "http://127.0.0.1:9")
    fault = Relayed("slow", target, 5.0)
    fault.prepare()
    assert fault.entrance(other) is other
    entrance = fault.entrance(target)
    assert (entrance.name, entrance.api_key) == ("primary", "key")
    assert entrance.url != target.url
    fault.close()


# Undoing


class Needy(Fault):
    """A fault with a command that undoes it from outside."""

    lasts = 20.0
    undo = ("touch", "undone-by-timer")
    ended = False
    fails = False

    def inject(self):
        pass

    def restore(self):
        if self.fails:
            raise EngineError("will not end")
        self.ended = True


def test_the_timer_is_set_before_and_cancelled_after(systemd):
    fault = Needy()
    with undone(fault, DeadMan(systemd.run, "drill-1")):
        assert systemd.log == [
            "systemd-run --collect --quiet --unit=drill-1 --on-active=50s --timer-property=AccuracySec=1s "
            "touch undone-by-timer"
        ]
        assert not fault.ended
    assert fault.ended
    assert systemd.log[-1] == "systemctl stop -- drill-1.timer"
    assert not (systemd.directory / "drill-1.timer").exists()


def test_the_fault_is_undone_whatever_happens(systemd):
    fault = Needy()
    with pytest.raises(KeyboardInterrupt), undone(fault, DeadMan(systemd.run, "drill-1")):
        raise KeyboardInterrupt
    assert fault.ended
    assert systemd.log[-1] == "systemctl stop -- drill-1.timer"


def test_the_timer_stays_where_the_fault_will_not_end(systemd):
    fault = Needy()
    fault.fails = True
    with pytest.raises(EngineError, match="will not end"), undone(fault, DeadMan(systemd.run, "drill-1")):
        pass
    wait_until((systemd.directory / "undone-by-timer").exists)


def test_a_timer_that_has_run_already_is_no_failure(systemd):
    with undone(Needy(), DeadMan(systemd.run, "drill-1")):
        wait_until((systemd.directory / "undone-by-timer").exists)
    assert systemd.run(["systemctl", "stop", "--", "drill-1.timer"])[0] == NOT_LOADED


def test_without_a_timer_there_is_no_fault(systemd):
    systemd.break_("no-timer")
    refused = pytest.raises(NotGuarded, match="found exit status 1 of systemd-run: no bus")
    with refused, undone(Needy(), DeadMan(systemd.run, "drill-1")):
        pytest.fail("went on without a timer")


@pytest.mark.parametrize("fault", [KillEngine(UNIT, None), KillServer(UNIT, None), GatewayReload(UNIT, None)], ids=str)
def test_what_systemd_repairs_needs_no_timer(systemd, fault):
    with undone(fault, DeadMan(systemd.run, "drill-1")):
        pass
    assert systemd.log == []


@pytest.mark.parametrize(
    ("fault", "command"),
    [
        (Hang(UNIT, None, 1.0), f"systemctl kill --signal=SIGCONT -- {UNIT}"),
        (Stop(UNIT, None), f"systemctl --no-block start -- {UNIT}"),
        (Drain("primary", 1.0), "rm -f -- /run/nvl-vllm/drain/primary"),
        (Relayed("reset", Endpoint("a", "http://127.0.0.1:9"), 1.0), ""),  # it ends with the process
    ],
    ids=str,
)
def test_what_undoes_it_from_outside(fault, command):
    assert " ".join(fault.undo) == command


def test_a_drill_that_is_killed_is_undone_by_the_timer(systemd, sleeper):
    server = sleeper("vllm")
    systemd.set(pid=server.pid)
    script = f"""
        import subprocess, time
        from ansible_collections.nvl.vllm.plugins.module_utils._faults import DeadMan, Hang, undone

        def run(command):
            done = subprocess.run(command, capture_output=True, text=True)
            return done.returncode, done.stdout, done.stderr

        fault = Hang("{UNIT}", run, 20.0)
        fault.prepare()
        with undone(fault, DeadMan(run, "drill-1")):
            fault.inject()
            print("hung", flush=True)
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as drill:
        assert drill.stdout.readline() == b"hung\n"
        wait_until(lambda: state_of(server.pid) == "T")
        drill.kill()
    wait_until(lambda: state_of(server.pid) == "S")
    assert systemd.log[-1] == f"systemctl kill --signal=SIGCONT -- {UNIT}"
