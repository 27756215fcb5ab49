"""Questions to the container, and runs of the repository's playbooks against it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
SANDBOX = ROOT / ".sandbox"
INSTANCES = ("primary", "secondary")
PORTS = {"primary": 8001, "secondary": 8002}
DOOR = 8000


def show(host: Host, unit: str, *properties: str) -> dict[str, str]:
    """Effective properties of a unit, as systemd has them."""
    text = host.check_output(f"systemctl show {unit} --property={','.join(properties)}")
    return dict(line.split("=", 1) for line in text.splitlines())


def main_pid(host: Host, name: str) -> int:
    return int(show(host, f"vllm@{name}.service", "MainPID")["MainPID"])


def chat(host: Host, name: str, key: str, **more: Any) -> str:
    """The body that the instance (or "gateway") answers a chat with; a status other than 200 fails."""
    body = {"model": "gpt-oss-120b", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24} | more
    return host.check_output(
        "curl --silent --show-error --fail --max-time 60 -H 'Content-Type: application/json'"
        " -H 'Authorization: Bearer %s' http://127.0.0.1:%s/v1/chat/completions -d %s",
        key,
        str(PORTS.get(name, DOOR)),
        json.dumps(body),
    )


def playbook(path: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a playbook against the container as an operator would, with extra variables."""
    return subprocess.run(
        ["ansible-playbook", "-i", "inventory/molecule", path, "-e", json.dumps(variables), *arguments],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def playbook_json(path: str, **variables: Any) -> dict[str, Any]:
    """What a playbook's modules returned, as Ansible's JSON callback has it. It must succeed."""
    done = subprocess.run(
        ["ansible-playbook", "-i", "inventory/molecule", path, "-e", json.dumps(variables)],
        cwd=ROOT,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def results(output: dict[str, Any], key: str) -> list[Any]:
    """The values of one key in the results of all tasks."""
    hosts = [task["hosts"].get("molecule", {}) for play in output["plays"] for task in play["tasks"]]
    return [result[key] for result in hosts if key in result]


def site(*arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run site.yml; tests drill only where they say so."""
    return playbook("site.yml", *arguments, **{"vllm_verify_drill": "never", **variables})


def await_(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so; a generous deadline ends the test."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
