"""Finding the processes of a unit, killing them and knowing their successors."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import (
    EngineError,
    Process,
    find_engine,
    find_server,
    is_alive,
)
from ansible_collections.nvl.vllm.plugins.module_utils._faults import KillEngine, KillServer

UNIT = "vllm@primary.service"


class FakeHost:
    """A /proc with processes that a test adds, a systemctl and a kill that are only recorded."""

    def __init__(self, root, main_pid="10"):
        self.root = root
        self.main_pid = main_pid
        self.commands = []
        self.signals = []
        self.kill_raises = None
        self.answer = None

    def add(self, pid, parent, comm, cmdline="", state="S", started=None):
        process = self.root / str(pid)
        process.mkdir()
        # Fields 3 to 22 of proc(5): state, parent, 17 others, start time.
        fields = [state, str(parent), *17 * ["0"], str(started or pid)]
        (process / "stat").write_text(f"{pid} ({comm}) {' '.join(fields)} 0 0\n")
        (process / "comm").write_text(f"{comm}\n")
        (process / "cmdline").write_bytes(cmdline.replace(" ", "\0").encode())

    def remove(self, pid):
        for entry in (self.root / str(pid)).iterdir():
            entry.unlink()
        (self.root / str(pid)).rmdir()

    def run(self, command):
        self.commands.append(command)
        return self.answer or (0, f"{self.main_pid}\n", "")

    def kill(self, pid, number):
        if self.kill_raises:
            raise self.kill_raises
        self.signals.append((pid, number))

    def find(self):
        return find_engine(UNIT, self.run, self.root)

    def fault(self):
        return KillEngine(UNIT, self.run, self.root, self.kill)


@pytest.fixture
def host(tmp_path):
    """A server as vLLM runs it, a helper between server and engine, and another unit's engine."""
    host = FakeHost(tmp_path)
    host.add(1, 0, "systemd", "/sbin/init")
    host.add(10, 1, "vllm", "/opt/vllm/bin/python /opt/vllm/bin/vllm serve")
    host.add(11, 10, "a (b) c", "sh -c helper")
    host.add(12, 11, "VLLM::EngineCor", "VLLM::EngineCore")
    host.add(13, 12, "VLLM::Worker_TP", "VLLM::Worker_TP0")
    host.add(20, 1, "vllm", "/opt/vllm/bin/python /opt/vllm/bin/vllm serve")
    host.add(21, 20, "VLLM::EngineCor", "VLLM::EngineCore")
    (tmp_path / "self").mkdir()
    return host


def test_the_engine_is_found_below_its_own_unit(host):
    assert host.find() == Process(12, 12)
    assert host.commands == [["systemctl", "show", "-p", "MainPID", "--value", "--", UNIT]]


def test_a_name_in_comm_alone_is_enough(host):
    host.remove(12)
    host.add(12, 11, "VLLM::EngineCor", "python -c spawn_main")
    assert host.find().pid == 12


def test_a_name_in_the_command_line_alone_is_enough(host):
    host.remove(12)
    host.add(12, 11, "python3", "VLLM::EngineCore_DP0")
    assert host.find().pid == 12


def test_of_several_engines_the_oldest(host):
    host.add(9, 10, "VLLM::EngineCor", "VLLM::EngineCore_DP1", started=99)
    assert host.find() == Process(12, 12)


def test_a_zombie_is_no_engine(host):
    host.remove(12)
    host.add(12, 10, "VLLM::EngineCor", "", state="Z")
    with pytest.raises(EngineError, match="wanted a process named VLLM::EngineCore below"):
        host.find()


def test_no_engine(host):
    host.remove(12)
    with pytest.raises(EngineError, match="found 1 descendants and none of that name") as caught:
        host.find()
    assert "is it still starting?" in str(caught.value)


def test_a_unit_that_does_not_run(host):
    host.main_pid = "0"
    with pytest.raises(EngineError, match=f"wanted {UNIT} running on this host"):
        host.find()


@pytest.mark.parametrize("answer", [(1, "", "no bus"), (0, "", ""), (0, "x", "")])
def test_a_systemctl_that_does_not_answer(host, answer):
    host.answer = answer
    with pytest.raises(EngineError, match=f"main process of {UNIT} from systemctl"):
        host.find()


def test_prepare_touches_nothing(host):
    host.fault().prepare()
    assert host.signals == [(12, 0)]


def test_inject_kills_the_engine_and_waits_for_its_successor(host):
    fault = host.fault()
    fault.inject()
    assert host.signals == [(12, signal.SIGKILL)]
    assert fault.pending() == "engine 12 is still the killed one"
    host.remove(12)
    assert "none of that name" in fault.pending()
    host.main_pid = "0"
    assert "found no main process" in fault.pending()
    host.main_pid = "30"
    host.add(30, 1, "vllm", "vllm serve")
    assert "none of that name" in fault.pending()
    host.add(31, 30, "VLLM::EngineCor", "VLLM::EngineCore")
    assert fault.pending() == ""


def test_a_successor_with_the_same_pid_is_a_successor(host):
    fault = host.fault()
    fault.inject()
    host.remove(12)
    host.add(12, 10, "VLLM::EngineCor", "VLLM::EngineCore", started=500)
    assert fault.pending() == ""


def test_without_permission_the_remedy_is_named(host):
    host.kill_raises = PermissionError()
    with pytest.raises(EngineError, match=r"run the task as root \(become: true\)"):
        host.fault().prepare()


def test_an_engine_that_ends_under_the_hand(host):
    host.kill_raises = ProcessLookupError()
    with pytest.raises(EngineError, match="ended by itself"):
        host.fault().inject()


def test_a_real_process_is_found_and_killed():
    command = ["VLLM::EngineCore", "60"]
    with subprocess.Popen(command, executable="/bin/sleep") as engine:
        fault = KillEngine(UNIT, lambda _command: (0, str(os.getpid()), ""))
        fault.prepare()
        assert engine.poll() is None
        fault.inject()
        assert engine.wait(10) == -signal.SIGKILL
    assert "none of that name" in fault.pending()


def test_the_server_is_the_main_process(host):
    assert find_server(UNIT, host.run, host.root) == Process(10, 10)
    host.main_pid = "77"
    with pytest.raises(EngineError, match=f"wanted the main process 77 of {UNIT} alive, found that it has ended"):
        find_server(UNIT, host.run, host.root)


def test_a_killed_server_has_a_successor_with_another_start(host):
    fault = KillServer(UNIT, host.run, host.root, host.kill)
    fault.prepare()
    fault.inject()
    assert host.signals == [(10, 0), (10, signal.SIGKILL)]
    assert str(fault) == f"SIGKILL to the main process of {UNIT}"
    assert fault.pending() == "main 10 is still the killed one"
    host.remove(10)
    host.add(10, 1, "vllm", started=300)
    assert fault.pending() == ""


def test_a_process_is_alive_only_as_itself(host):
    assert is_alive(Process(12, 12), host.root)
    assert not is_alive(Process(12, 11), host.root)  # the id went to another process
    host.remove(12)
    assert not is_alive(Process(12, 12), host.root)
    host.add(12, 11, "VLLM::EngineCor", state="Z")
    assert not is_alive(Process(12, 12), host.root)
