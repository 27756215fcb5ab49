"""What the doctor reads of a host, with a stand-in for its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info
from ansible_collections.nvl.vllm.plugins.module_utils._doctor_look import Look, Wanted, parse_utilization


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


def test_utilization_is_by_index_and_without_what_cannot_be_told():
    assert parse_utilization("0, 87\n1, [N/A]\n2, 0\n") == {"0": 0.87, "2": 0.0}


def test_only_the_journal_of_the_last_start_counts():
    text = "old\nStarting vllm@primary.service - vLLM engine primary...\nnew: CUDA out of memory\n"
    assert "old" not in Look(wanted(), answer(0, text)).journal("vllm@primary.service")
    assert Look(wanted(), answer(0, "all there is\n")).journal("u") == "all there is\n"


def test_processes_that_the_kernel_killed():
    text = "fine\nvllm@primary.service: A process of this unit has been killed by the OOM killer.\n"
    (line,) = Look(wanted(), answer(0, text)).killed(["vllm@primary.service"])
    assert line.endswith("killed by the OOM killer.")


def test_a_command_that_fails_is_told_and_does_not_end_the_look():
    look = Look(wanted(), answer(1, ""))
    assert look.journal("u") == ""
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
    assert look.orphans(["vllm@secondary.service"]) == ["process 4711 (VLLM::EngineCore)"]
    assert look.swapped("vllm@primary.service") == 2.0


def test_a_gpus_utilization_is_the_mean_of_the_window():
    gpu = _gpu_info.Gpu("0000:01:00.0", 0, throttle_reasons=["hw_thermal_slowdown"])
    (found,) = Look.gpus(_gpu_info.Facts([gpu], _gpu_info.Host()), [{"0": 0.2}, {"0": 0.4}, {}])
    assert round(found["utilization"], 3) == 0.3
    assert len(found["throttled"]) == 1
    assert Look.gpus(None, []) == []
