"""What a change touches, what a start waits for, and what a failed deploy leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import INSTANCES, chat, main_pid, show, site
from testinfra.host import Host

SECONDARY = {"name": "secondary", "port": 8002}


def instances(**secondary: Any) -> list[dict[str, Any]]:
    return [{"name": "primary", "port": 8001}, SECONDARY | secondary]


def test_changed_argument_restarts_only_its_instance(host: Host, api_key: str) -> None:
    before = {name: main_pid(host, name) for name in INSTANCES}
    planned = site("--check", "--diff", vllm_instances=instances(arguments={"max-num-seqs": 4}))
    assert planned.returncode == 0, planned.stdout
    assert "+vllm@secondary.service runs from new inputs" in planned.stdout
    assert "vllm@primary.service" not in planned.stdout
    assert {name: main_pid(host, name) for name in INSTANCES} == before

    done = site(vllm_instances=instances(arguments={"max-num-seqs": 4}))
    assert done.returncode == 0, done.stdout
    assert main_pid(host, "primary") == before["primary"]
    assert main_pid(host, "secondary") != before["secondary"]
    assert "max-num-seqs: 4" in host.file("/etc/vllm/secondary.yaml").content_string
    chat(host, "secondary", api_key)


def test_failed_start_names_the_reason_and_leaves_the_other_serving(host: Host, api_key: str) -> None:
    primary = main_pid(host, "primary")
    # An argument that exists, with a value that only the engine can know to be too much for the model.
    arguments = {"max-model-len": 100_000_000}
    # The memory plan refuses it, before anything is changed.
    refused = site(vllm_instances=instances(arguments=arguments))
    assert refused.returncode != 0
    assert "changed=0" in refused.stdout
    assert "secondary" in refused.stdout.partition("Does not fit:")[2]
    failed = site(vllm_instances=instances(arguments=arguments), gpu_preflight_memory="warning")
    assert failed.returncode != 0
    assert "vllm@secondary.service did not come up" in failed.stdout
    assert "max_model_len" in failed.stdout
    assert main_pid(host, "primary") == primary
    chat(host, "primary", api_key)


def test_next_run_repairs_what_the_failed_one_left(host: Host, api_key: str) -> None:
    primary = main_pid(host, "primary")
    done = site()
    assert done.returncode == 0, done.stdout
    assert main_pid(host, "primary") == primary
    chat(host, "secondary", api_key)


@pytest.mark.more
def test_hand_made_change_is_undone_and_the_engine_restarted(host: Host) -> None:
    """Also with the change's own restart long past: what counts is what the engine was started from."""
    before = main_pid(host, "primary")
    host.run_expect([0], "mkdir -p /etc/systemd/system/vllm@secondary.service.d")
    host.run_expect([0], "printf '[Service]\\nNice=5\\n' >/etc/systemd/system/vllm@secondary.service.d/hand.conf")
    planned = site("--check", "--diff")
    assert "vllm@secondary.service runs from" in planned.stdout
    host.run_expect([0], "rm -r /etc/systemd/system/vllm@secondary.service.d && systemctl daemon-reload")
    unchanged = site("--check", "--diff")
    assert "changed=0" in unchanged.stdout
    assert main_pid(host, "primary") == before


@pytest.mark.more
def test_starts_are_serialised(host: Host) -> None:
    host.run_expect([0], "systemctl restart vllm@primary.service vllm@secondary.service")
    spans = []
    for name in INSTANCES:
        stamps = show(host, f"vllm@{name}.service", "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
        spans.append((int(stamps["ExecMainStartTimestampMonotonic"]), int(stamps["ActiveEnterTimestampMonotonic"])))
    (_, first_ready), (second_started, _) = sorted(spans)
    assert second_started >= first_ready


@pytest.mark.more
def test_killed_engine_comes_back_by_itself(host: Host, api_key: str) -> None:
    """vLLM ends with status 0 when its engine dies; ``Restart=on-failure`` would leave it down."""
    before = main_pid(host, "secondary")
    host.run_expect([0], f"pkill -KILL -P {before} -f ^VLLM::EngineCore")
    host.run_expect([0], f"timeout 60 tail --pid={before} -f /dev/null")
    host.run_expect([0], "systemctl start vllm@secondary.service")
    assert main_pid(host, "secondary") != before
    chat(host, "secondary", api_key)
