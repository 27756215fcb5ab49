"""The doctor on real engines: healthy as they are, and each illness that can be had here found."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTANCES, await_, chat, main_pid, playbook, show
from testinfra.host import Host

HEALTHY, SICK, UNKNOWN = 0, 2, 4


class Doctor:
    """Runs of the playbook, with the findings as it writes them."""

    def __init__(self, directory: Path) -> None:
        self.report = directory / "doctor.json"
        self.shown = ""

    def run(self, **variables: Any) -> int:
        done = playbook(
            "playbooks/doctor.yml", **{"vllm_doctor_report": str(self.report), "vllm_doctor_window": 3.0, **variables}
        )
        self.shown = done.stdout + done.stderr
        return done.returncode

    def found(self) -> dict[str, str]:
        """Evidence by name and place."""
        findings = json.loads(self.report.read_text())["molecule"]["findings"]
        return {f"{one['name']}: {one['where']}": one["evidence"] for one in findings}


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


@pytest.fixture
def whole(host: Host) -> Iterator[None]:
    """Both engines are used again before the next test."""
    yield
    await_(lambda: host.run("curl -sf http://127.0.0.1:8405/status").stdout.count('"up ready"') == 2, 90)


def test_a_healthy_host_has_no_finding(doctor: Doctor, keeps_serving: None) -> None:
    assert doctor.run() == HEALTHY, doctor.shown
    assert doctor.found() == {}
    assert "molecule  healthy" in doctor.shown


@contextmanager
def stopped(host: Host, name: str) -> Iterator[None]:
    """An engine core that hangs."""
    pid = main_pid(host, name)
    core = host.check_output(f"pgrep --parent {pid} --full VLLM::EngineCore")
    # Without the agent, which would restart the engine while the doctor looks.
    host.run_expect([0], f"systemctl stop vllm-health.service && kill -{signal.SIGSTOP.value} {core}")
    try:
        yield
    finally:
        host.run_expect([0], f"kill -{signal.SIGCONT.value} {core}; systemctl start vllm-health.service")


def test_an_engine_that_hangs_is_false_healthy(host: Host, doctor: Doctor, whole: None) -> None:
    with stopped(host, "secondary"):
        assert doctor.run() == SICK, doctor.shown
        found = doctor.found()
    assert "/health answers 200" in found["false_healthy: vllm@secondary.service"]
    # The agent, which the test has stopped, is told too.
    assert "unit_not_active: vllm-health.service" in found


def test_what_an_admin_leaves_behind_is_found(host: Host, doctor: Doctor, whole: None) -> None:
    host.run_expect(
        [0],
        "mkdir -p /run/nvl-vllm/drain && echo test >/run/nvl-vllm/drain/secondary"
        " && cp -p /etc/vllm/primary.yaml /tmp/primary.yaml && echo '# by hand' >>/etc/vllm/primary.yaml"
        " && systemd-run --quiet --unit=stray bash -c 'exec -a VLLM::EngineCore sleep 600'",
    )
    try:
        await_(lambda: "drain" in host.run("curl -sf http://127.0.0.1:8405/status").stdout, 30)
        assert doctor.run() == SICK, doctor.shown
        found = doctor.found()
    finally:
        host.run_expect(
            [0],
            "rm -f /run/nvl-vllm/drain/secondary; systemctl stop stray; cp -p /tmp/primary.yaml /etc/vllm/primary.yaml",
        )
    assert found["kept_out: vllm@secondary.service"] == "the health agent says drain"
    assert "runs_from_older_files: vllm@primary.service" in found
    assert any(name.startswith("orphan_engine: process") for name in found), found


def test_an_engine_that_dies_at_its_start_says_why(host: Host, doctor: Doctor) -> None:
    """A throw-away engine that asks for more context than its KV cache has room for."""
    host.run_expect(
        [0],
        "cd /etc/vllm && cp -p secondary.env third.env"
        " && sed 's/8002/8009/; s/^max-model-len.*/max-model-len: 131072/' secondary.yaml >third.yaml",
    )
    try:
        host.run("systemctl start --no-block vllm@third.service")
        # It has failed, and systemd starts it again: the doctor still says why.
        await_(lambda: int(show(host, "vllm@third.service", "NRestarts")["NRestarts"]) > 0, 90)
        third = {"name": "third", "port": 8009}
        declared = [{"name": name, "port": 8001 + number} for number, name in enumerate(INSTANCES)]
        assert doctor.run(vllm_instances=[*declared, third]) == SICK, doctor.shown
        evidence = doctor.found()["out_of_memory: vllm@third.service"]
        assert "larger than the available KV cache memory" in evidence
        longest = evidence.partition("estimated maximum model length is ")[2].partition(".")[0]
        assert f"set max-model-len: {longest} (it is 4096)" in " ".join(doctor.shown.split())
    finally:
        host.run("systemctl stop vllm@third.service; systemctl reset-failed vllm@third.service")
        host.run_expect([0], "rm -f /etc/vllm/third.yaml /etc/vllm/third.env")


@contextmanager
def under_load(host: Host, key: str, many: int, prompt: Callable[[int], str], **more: Any) -> Iterator[None]:
    """So many requests at the primary engine at once, until the block ends or they are answered."""
    with ThreadPoolExecutor(many) as pool:
        asked = [
            pool.submit(chat, host, "primary", key, messages=[{"role": "user", "content": prompt(number)}], **more)
            for number in range(many)
        ]
        await_(
            lambda: (
                f'vllm:num_requests_running{{engine="0",model_name="gpt-oss-120b"}} {min(8, many)}.0'
                in host.run("curl -sf http://127.0.0.1:8001/metrics").stdout
            ),
            30,
        )
        yield
        for one in asked:
            one.result(timeout=120)


def test_too_many_requests_at_once(host: Host, doctor: Doctor, api_key: str, whole: None) -> None:
    with under_load(host, api_key, 24, lambda number: f"Hello {number}", max_tokens=600, ignore_eos=True):
        assert doctor.run() == SICK, doctor.shown
    assert "8 requests run (max-num-seqs 8)" in doctor.found()["max_num_seqs_reached: vllm@primary.service"]


def test_prompts_that_share_nothing(host: Host, doctor: Doctor, api_key: str, whole: None) -> None:
    numbers = count()

    def another() -> None:
        text = " ".join(f"{next(numbers)}" for _ in range(700))
        chat(host, "primary", api_key, messages=[{"role": "user", "content": text}], max_tokens=1)

    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(doctor.run, vllm_doctor_window=15.0)
        while not looked.done():
            another()
        assert looked.result() == SICK, doctor.shown
    assert "prompt tokens (" in doctor.found()["prefix_cache_without_hits: vllm@primary.service"]


def test_a_host_that_is_away_is_no_healthy_one(doctor: Doctor) -> None:
    assert doctor.run(ansible_port=1) == UNKNOWN


def test_a_limit_that_there_is_not_is_refused(doctor: Doctor) -> None:
    assert doctor.run(vllm_doctor_limits={"hit_rat": 0.5}) == SICK
    assert "limits names hit_rat, which is no limit; did you mean hit_rate?" in " ".join(doctor.shown.split())
