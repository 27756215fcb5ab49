"""What the doctor reads of a host, with a stand-in for its commands."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info
from ansible_collections.nvl.vllm.plugins.module_utils._doctor import Observed, diagnose
from ansible_collections.nvl.vllm.plugins.module_utils._doctor_look import Look, Wanted
from ansible_collections.nvl.vllm.plugins.module_utils._http import ConnectFailed

FAKES = Path(__file__).parents[3] / "fakes"


def wanted(**changes: Any) -> Wanted:
    values: dict[str, Any] = {
        "instances": [],
        "device": "cpu",
        "gateway": False,
        "agent_url": "http://127.0.0.1:1",
        "statistics_url": "http://127.0.0.1:1",
        "root": "/nonexistent",
        "model_path": "/nonexistent",
        "disks": [],
        "window": 0.01,
        "interval": 0.01,
        "timeout": 1,
    }
    return Wanted(**{**values, **changes})


def answer(status: int, out: str) -> Any:
    return lambda argv, timeout: (status, out, "it failed" if status else "")


class Journal:
    """Stands in for journalctl: answers the same to all, and keeps what it was asked."""

    def __init__(self, status: int, out: str) -> None:
        self.status, self.out = status, out
        self.asked: list[list[str]] = []

    def __call__(self, argv: list[str], timeout: float) -> tuple[int, str, str]:
        self.asked.append(argv)
        return self.status, self.out, ""


def test_of_an_engine_that_runs_the_lines_of_its_start_are_read_however_many_follow():
    journal = Journal(0, "Loading weights took 3.1 seconds")
    uptime = time.clock_gettime(time.CLOCK_MONOTONIC)
    state = {
        "ActiveState": "active",
        "ExecMainStartTimestampMonotonic": str(int((uptime - 7200) * 1e6)),
        "ActiveEnterTimestampMonotonic": str(int((uptime - 7140) * 1e6)),
    }
    assert "took 3.1" in Look(wanted(), journal).start("primary", "vllm@primary.service", state)
    (argv,) = journal.asked
    since, until = (float(one.partition("@")[2]) for one in argv if one.startswith(("--since=@", "--until=@")))
    assert abs(time.time() - 7201 - since) < 60
    assert until - since == pytest.approx(62, abs=1)


def test_of_an_engine_that_does_not_run_the_last_lines_are_read():
    journal = Journal(0, "why")
    Look(wanted(), journal).start("primary", "vllm@primary.service", {"ActiveState": "failed"})
    assert "--lines=200" in journal.asked[0]


def test_memory_that_ran_out_is_searched_for_with_its_time_and_without_secrets(tmp_path: Path):
    (tmp_path / "primary.env").write_text('VLLM_API_KEY="sesame"\n')
    line = "2026-11-24T09:00:00+0000 gpu1 vllm[7]: (EngineCore) CUDA out of memory, sesame\n"
    journal = Journal(0, line)
    (found,) = Look(wanted(), journal, config=str(tmp_path)).out_of_memory("primary", "vllm@primary.service")
    assert found.startswith("2026-11-24T09:00:00+0000 (EngineCore) CUDA out of memory")
    assert "sesame" not in found
    assert f"--since=@{time.time() - 3600:.0f}"[:-3] in " ".join(journal.asked[0])
    # Files that were changed since may be the remedy.
    (tmp_path / "primary.yaml").touch()
    Look(wanted(), journal, config=str(tmp_path)).out_of_memory("primary", "vllm@primary.service")
    assert f"--since=@{(tmp_path / 'primary.yaml').stat().st_mtime:.0f}" in journal.asked[1]


def test_a_search_that_finds_nothing_is_no_failure():
    look = Look(wanted(), Journal(1, ""))
    assert look.out_of_memory("primary", "vllm@primary.service") == []
    assert look.unknown == []


def test_services_that_run_and_do_not_answer_are_told():
    look = Look(wanted(gateway=True), answer(0, ""))
    assert look.gateway() == {}
    assert look.agent() == {}
    assert sorted(look.silent) == ["vllm-gateway.service", "vllm-health.service"]


STATISTICS = (
    "# pxname,svname,qcur,scur,wretr,hrsp_5xx,status\nengines,primary,0,8,0,0,UP\nengines,BACKEND,%d,8,0,%d,UP\n"
)


class Gateway:
    """Stands in for the statistics: an answer for each look, or none; the last one is repeated."""

    def __init__(self, *looks: tuple[int, int] | None) -> None:
        self.looks = list(looks)

    def __call__(self, service: str, url: str, path: str) -> str:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if found is None:
            raise ConnectFailed("connection refused")
        return STATISTICS % found


@pytest.mark.parametrize(
    ("looks", "refused", "queues", "silent", "unknown"),
    [
        (((4, 700), (6, 712)), 12, [4, 6], [], 0),
        # All 5xx since its start are not those of the window.
        ((None, (6, 712)), None, [6], [], 1),
        (((4, 700), None), None, [4], ["vllm-gateway.service"], 0),
        ((None,), None, [], ["vllm-gateway.service"], 0),
        (((4, 700), (0, 3)), 0, [4, 0], [], 0),  # restarted meanwhile
    ],
    ids=["well", "late", "gone", "silent", "restarted"],
)
def test_the_gateway_is_watched_and_its_last_look_decides_whether_it_answers(
    looks: tuple[tuple[int, int] | None, ...],
    refused: int | None,
    queues: list[int],
    silent: list[str],
    unknown: int,
    monkeypatch: pytest.MonkeyPatch,
):
    look = Look(wanted(gateway=True, window=1e-9), answer(0, ""), sleep=lambda seconds: None)
    monkeypatch.setattr(look, "asked", Gateway(*looks))
    seen = look.window([])
    assert look.refused(seen.gateway) == refused
    assert [figures["queues"]["primary"] for figures in seen.gateway][-2:] == queues
    assert sorted(look.silent) == silent
    assert len(look.unknown) == unknown


def test_a_gateway_that_does_not_answer_is_not_waited_for_at_each_look(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def ask(*what: str) -> str:
        asked.append(what)
        raise ConnectFailed("no answer within 10 s")

    look = Look(wanted(gateway=True, window=0.2), answer(0, ""))
    monkeypatch.setattr(look, "asked", ask)
    look.window([])
    assert len(asked) == 2


def test_an_agent_that_tells_something_else_is_told(monkeypatch: pytest.MonkeyPatch):
    look = Look(wanted(), answer(0, ""))
    monkeypatch.setattr(look, "asked", lambda *what: '{"instances": {"primary": {}}}')
    assert look.agent() == {}
    assert "wanted the health agent's word on each engine" in look.silent["vllm-health.service"]


def test_a_command_that_fails_is_told_and_does_not_end_the_look():
    look = Look(wanted(), answer(1, ""))
    assert look.journal("u", "u") == ""
    (problem,) = look.unknown
    assert "exit status 1: it failed" in problem

    def missing(argv: list[str], timeout: float) -> tuple[int, str, str]:
        raise OSError("no such file")

    look = Look(wanted(), missing)
    assert look.states() == {}
    assert look.unknown == ["systemctl: no such file"]


def test_pressure_and_space_are_read_where_there_are_any(tmp_path: Path):
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/io").write_text("some avg10=12.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=90.00 total=1\n")
    look = Look(wanted(disks=[str(tmp_path), "/nonexistent"]), answer(0, ""), proc=str(tmp_path))
    assert look.pressure() == {"io": 0.125}
    ((free, size),) = look.space().values()
    assert 0 <= free <= size


def test_an_engine_of_no_unit_is_an_orphan(tmp_path: Path):
    process = tmp_path / "4711"
    process.mkdir()
    (process / "cmdline").write_bytes(b"VLLM::EngineCore\0")
    (process / "environ").write_bytes(b"")
    (process / "stat").write_text("4711 (VLLM) S " + " ".join(["1"] * 40))
    (process / "status").write_text("VmSwap:\t 2048 kB\n")
    (process / "cgroup").write_text("0::/system.slice/vllm@primary.service\n")
    (tmp_path / "uptime").write_text("100.0 100.0\n")
    look = Look(wanted(), answer(0, ""), proc=str(tmp_path))
    assert look.orphans(["vllm@primary.service"]) == []
    assert look.orphans(["vllm@secondary.service"]) == [
        ("process 4711 (VLLM::EngineCore)", "systemctl stop vllm@primary.service")
    ]
    assert look.swapped("vllm@primary.service") == 2.0


def test_a_gpu_is_judged_by_the_whole_window():
    gpu = _gpu_info.Gpu("0000:01:00.0", 0)
    # Of hw_slowdown (8) hw_thermal_slowdown (64) is the reason; 1 is idle, 4 the power cap.
    looks = [(20.0, 1), (40.0, 8 + 64), (None, 64), (30.0, 4 + 128), (None, None)]
    rows = [{"gpu": 0, "utilization": used, "clock_reasons": bits} for used, bits in looks]
    (found,) = Look.gpus(_gpu_info.Facts([gpu], _gpu_info.Host()), [*rows, {**rows[1], "gpu": 1}])
    assert round(found["utilization"], 3) == 0.3
    assert found["throttled"] == [
        "GPU 0 (0000:01:00.0): in 2 of 5 looks it is too hot (hardware)",
        "GPU 0 (0000:01:00.0): in 1 of 5 looks the power supply asks for less (power brake)",
    ]
    assert Look.gpus(None, []) == []


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ("idle", []),
        ("mismatch", ["gpu_driver"]),
        ("lost", ["gpu_fault"]),
        ("remap_failure", ["gpu_fault"]),
        ("power_capped", []),
        ("throttling", ["throttled"]),
    ],
)
def test_what_only_hardware_could_do_is_found_by_the_stand_in_for_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch, state: str, names: list[str]
):
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("NVIDIA_SMI_STATE", state)
    look = Look(wanted(device="cuda"))
    facts = _gpu_info.read(_gpu_info.run_command, 10)
    observed = Observed([], 1, gpus=Look.gpus(facts, look.window([]).gpus), gpu_problem=facts.problem)
    assert [one.name for one in diagnose(observed)] == names
