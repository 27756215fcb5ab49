"""The status screen of real engines."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import INSTANCES, PORTS, ROOT, await_, chat
from testinfra.host import Host

COMMAND = ["../tools/status", "-i", "molecule"]


def screen(*arguments: str) -> str:
    """What it prints, called from another directory than the clone's, and not in the colours that Molecule wants."""
    leave = ("ANSIBLE_CONFIG", "ANSIBLE_FORCE_COLOR", "PY_COLORS")
    environment = {name: value for name, value in os.environ.items() if name not in leave}
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT / "inventory",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_the_screen_is_all_that_is_printed(host: Host, keeps_serving: None) -> None:
    lines = screen().splitlines()
    assert lines[0] == "molecule"
    assert [line.split()[:2] for line in lines[2:4]] == [[name, "serves"] for name in INSTANCES]
    assert "2 of 2 engines" in lines[-1]


def test_requests_that_run_are_shown(host: Host, api_key: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(chat, host, "primary", api_key, max_tokens=2000, ignore_eos=True)
        shown: list[str] = []

        def runs() -> bool:
            assert not request.done(), "the request was over before it was seen"
            shown[:] = next(line for line in screen().splitlines() if line.startswith("primary")).split()
            return shown[shown.index("min") + 1] == "1"

        await_(runs, 60)
        assert int(shown[shown.index("min") + 4].replace(",", "")) > 0, shown
        request.result(timeout=120)


def test_an_engine_that_is_drained_is_shown_as_such(host: Host) -> None:
    host.run_expect([0], "mkdir -p /run/nvl-vllm/drain && echo test >/run/nvl-vllm/drain/secondary")
    try:
        await_(lambda: any(line.split()[:2] == ["secondary", "drain"] for line in screen().splitlines()), 60)
    finally:
        host.run_expect([0], "rm /run/nvl-vllm/drain/secondary")
    await_(lambda: "2 of 2 engines" in screen(), 60)


def test_gpus_that_cannot_be_asked_do_not_hide_the_engines(host: Host) -> None:
    """A GPU host whose driver is gone; the variables alone say that this one has GPUs."""
    assert not host.exists("nvidia-smi")
    pair = [{"name": name, "port": PORTS[name], "gpus": [number]} for number, name in enumerate(INSTANCES)]
    variables = {"vllm_device": "cuda", "vllm_arguments": {}, "vllm_environment": {}, "vllm_instances": pair}
    lines = screen("-e", json.dumps(variables)).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [[name, "serves"] for name in INSTANCES]
    assert lines[-1] == "nvidia-smi is not there: install the NVIDIA driver"


@pytest.mark.parametrize("variables", [{"ansible_port": 1}, {"vllm_status_window": 0}])
def test_a_host_that_cannot_be_looked_at_says_why(variables: dict[str, int]) -> None:
    lines = screen("-e", json.dumps(variables)).splitlines()
    assert lines[0] == "molecule"
    assert any(word in lines[1] for word in ("Connection refused", "wanted more than 0")), lines
