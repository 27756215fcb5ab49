"""Preflight of a GPU host: every state of a stand-in for nvidia-smi, its verdict and its sentence."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ROOT, SANDBOX, playbook, playbook_json, results
from testinfra.host import Host

pytestmark = pytest.mark.usefixtures("keeps_serving", "nvidia_smi")
PAIR = [{"name": "primary", "port": 8001, "gpus": [0]}, {"name": "secondary", "port": 8002, "gpus": [1]}]
#: The guide's deployment. The container's disk is not what is asked about.
GUIDE: dict[str, Any] = {
    "vllm_device": "cuda",
    # What the driver's role would mend is no error where it is going to run.
    "cuda_driver_source": "host",
    "vllm_arguments": {},
    "vllm_environment": {},
    "vllm_instances": PAIR,
    "vllm_model_source": "hub",
    "vllm_model_repository": "openai/gpt-oss-120b",
    "vllm_model_root": "/srv/models/gpt-oss-120b",
    "vllm_model_required_space": 1,
    "vllm_required_space": 1,
    "gpu_preflight_timeout": 2,
}


@pytest.fixture(scope="module")
def nvidia_smi(host: Host) -> Iterator[None]:
    """The stand-in on the host's PATH."""
    text = (ROOT / "tests/fakes/nvidia-smi").read_text()
    subprocess.run(
        [
            *("ssh", "-i", str(SANDBOX / "id_ed25519"), "-p", "2223"),
            *("-o", f"UserKnownHostsFile={SANDBOX}/known_hosts", "root@127.0.0.1"),
            "cat >/usr/local/bin/nvidia-smi && chmod 755 /usr/local/bin/nvidia-smi",
        ],
        input=text.encode(),
        check=True,
        timeout=60,
    )
    yield
    host.run_expect([0], "rm -f /usr/local/bin/nvidia-smi /etc/nvidia-smi-state")


def preflight(host: Host, state: str, **variables: Any) -> tuple[int, str]:
    """Exit status and what the operator reads, on one line."""
    host.run_expect([0], f"echo {state} >/etc/nvidia-smi-state")
    done = playbook("playbooks/preflight.yml", **{**GUIDE, **variables})
    assert "changed=0" in done.stdout
    return done.returncode, " ".join(done.stdout.replace("\\n", " ").split())


def test_two_idle_cards_carry_the_guides_pair(host: Host) -> None:
    status, text = preflight(host, "idle")
    assert status == 0, text
    assert "0 NVIDIA H100 NVL 93.0" in text
    assert "1 NVIDIA H100 NVL 93.0" in text
    # What the guide's values leave unused.
    assert "primary: max-num-seqs 8 requests of max-model-len 4096 use at most" in text


def test_the_guides_pair_on_one_card_is_refused_with_the_placements_that_work(host: Host) -> None:
    began = time.monotonic()
    status, text = preflight(host, "idle", vllm_instances=[PAIR[0], {**PAIR[1], "gpus": [0]}])
    assert status != 0
    assert "primary and secondary share GPU 0 (NVIDIA H100 NVL" in text
    assert "which alone is more than the GPU has" in text
    assert "declare one GPU for each, such as primary on GPU 0, secondary on GPU 1" in text
    assert time.monotonic() - began < 60  # it takes about 4 s; this only finds a run that hangs


def test_who_knows_better_than_the_estimate_goes_on(host: Host) -> None:
    shared = [PAIR[0], {**PAIR[1], "gpus": [0]}]
    status, text = preflight(host, "idle", vllm_instances=shared, gpu_preflight_memory="warning")
    assert status == 0, text
    assert "primary and secondary share GPU 0" in text


def test_a_card_that_is_not_there(host: Host) -> None:
    status, text = preflight(host, "one")
    assert status != 0
    assert "GPU 1 of instance secondary is not there: the host has 0 (GPU-" in text


@pytest.mark.parametrize(
    ("state", "fits", "told"),
    [
        # A process of that number must not happen to be one of the engines here.
        ("busy pid=4000000", False, "holds 75079 MiB"),
        ("mig", False, "MIG"),
        ("remap_pending", True, "remap"),
        ("remap_failure", False, "remap"),
        ("lost", False, "lost"),
        ("mismatch", False, "kernel module and libraries are of different versions"),
        ("not_loaded", False, "driver is not loaded"),
        ("hang", False, "did not answer within 2 s"),
        ("power_cap", True, "310 W"),
        ("persistence_off", True, "persistence"),
        ("driver550", False, "580"),
    ],
)
def test_each_state_has_its_verdict_and_its_sentence(host: Host, state: str, fits: bool, told: str) -> None:
    status, text = preflight(host, state)
    assert (status == 0) is fits, text
    assert told in text


def test_a_severity_can_be_changed(host: Host) -> None:
    assert preflight(host, "power_cap", gpu_preflight_severities={"power_cap_below_default": "error"})[0] != 0
    status, text = preflight(host, "mig", gpu_preflight_severities={"mig_enable": "warning"})
    assert status != 0
    assert "mig_enabled" in text


def test_a_host_without_a_driver_is_no_error_in_check_mode(host: Host) -> None:
    host.run_expect([0], "mv /usr/local/bin/nvidia-smi /tmp/")
    try:
        done = playbook("playbooks/preflight.yml", "--check", **GUIDE)
        refused = playbook("playbooks/preflight.yml", **GUIDE)
    finally:
        host.run_expect([0], "mv /tmp/nvidia-smi /usr/local/bin/")
    assert done.returncode == 0, done.stdout
    assert refused.returncode != 0
    assert "nvidia-smi is not there: install the NVIDIA driver" in refused.stdout


def test_the_plan_is_in_the_result_for_programs(host: Host) -> None:
    host.run_expect([0], "echo idle >/etc/nvidia-smi-state")
    plan, _gateway = results(playbook_json("playbooks/preflight.yml", **GUIDE), "plan")
    assert plan["fits"] is True
    assert [one["verdict"] for one in plan["instances"]] == ["wasteful", "wasteful"]
