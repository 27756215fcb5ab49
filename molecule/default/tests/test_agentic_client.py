"""The agent platform's configuration, on the host that also has the engines."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers import ROOT, playbook
from testinfra.host import Host

CONFIG = "/etc/agentic/config.yaml"


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    inventory = tmp_path / "clients.yml"
    inventory.write_text(yaml.safe_dump({"clients": {"hosts": {"molecule": None}}}))
    return inventory


def render(clients: Path, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    return playbook("playbooks/client.yml", "-i", str(clients), *arguments, **variables)


def test_client_configuration_is_rendered_once_and_works(host: Host, clients: Path, api_key: str) -> None:
    host.run_expect([0], "rm -rf /etc/agentic")
    checked = render(clients, "--check", "--diff")
    assert checked.returncode == 0, checked.stdout
    assert api_key not in checked.stdout
    assert not host.file(CONFIG).exists
    assert render(clients).returncode == 0
    again = render(clients)
    assert "changed=0" in again.stdout, again.stdout
    config = yaml.safe_load(host.file(CONFIG).content_string)
    jsonschema.validate(config, json.loads((ROOT / "roles/agentic_client/files/config.schema.json").read_text()))
    assert config["conversation"]["window_tokens"] == 3072
    key = host.file(config["llm"]["api_key_file"])
    assert (key.user, key.mode) == ("root", 0o640)
    body = json.dumps({"model": config["llm"]["model_name"], "prompt": "Hello", "max_tokens": 1})
    for endpoint in config["llm"]["endpoints"]:
        host.check_output(
            "curl --fail --silent --max-time 60 -H 'Content-Type: application/json' "
            '-H "Authorization: Bearer $(cat %s)" %s/completions -d %s',
            config["llm"]["api_key_file"],
            endpoint["url"],
            body,
        )


def test_client_configuration_takes_the_key_from_the_environment_where_wanted(clients: Path) -> None:
    changed = render(clients, "--check", "--diff", agentic_client_api_key_env="VLLM_API_KEY")
    assert changed.returncode == 0, changed.stdout
    assert "+  api_key_env: VLLM_API_KEY" in changed.stdout, changed.stdout
    assert "-  api_key_file:" in changed.stdout, changed.stdout


def test_client_configuration_leaves_a_directory_as_it_is(host: Host, clients: Path) -> None:
    host.run_expect([0], "install -d -m 0700 -o nobody /root/platform")
    done = render(clients, agentic_client_config_path="/root/platform/config.yaml")
    assert done.returncode == 0, done.stdout
    assert host.file("/root/platform/config.yaml").exists
    found = host.file("/root/platform")
    assert (found.user, found.mode) == ("nobody", 0o700)
    host.run_expect([0], "rm -r /root/platform")


def test_client_configuration_follows_the_servers(host: Host, clients: Path) -> None:
    before = host.file(CONFIG).content_string
    moved = render(clients, "--check", "--diff", vllm_gateway_port=8010)
    assert "+    url: http://127.0.0.1:8010/v1" in moved.stdout, moved.stdout
    assert render(clients, agentic_client_mode="endpoints").returncode == 0
    found = yaml.safe_load(host.file(CONFIG).content_string)["llm"]["endpoints"]
    assert [one["url"] for one in found] == ["http://127.0.0.1:8001/v1", "http://127.0.0.1:8002/v1"]
    assert render(clients).returncode == 0
    assert host.file(CONFIG).content_string == before


def test_client_configuration_needs_all_servers(clients: Path, tmp_path: Path) -> None:
    away = tmp_path / "away.yml"
    away.write_text(yaml.safe_dump({"vllm": {"hosts": {"away": None}}}))
    done = render(clients, "-i", str(away), "--limit", "molecule", "--check")
    assert done.returncode != 0
    assert "nothing is known of away" in " ".join((done.stdout + done.stderr).split()), done.stdout


def test_client_configuration_refuses_a_gateway_that_the_client_does_not_reach(tmp_path: Path) -> None:
    inventory = tmp_path / "clients.yml"
    inventory.write_text(yaml.safe_dump({"clients": {"hosts": {"app": {"ansible_host": "192.0.2.1"}}}}))
    done = render(inventory, vllm_gateway_host="127.0.0.1")
    assert done.returncode != 0
    told = " ".join((done.stdout + done.stderr).split())
    assert "molecule: vllm_gateway_host is 127.0.0.1, which only clients on that host reach" in told, done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"agentic_client_reply_reserve": 5000}, "agentic_client_reply_reserve is 5000: wanted 1 to 4095 tokens"),
        ({"agentic_client_mode": "both"}, "agentic_client_mode must be one of"),
        ({"agentic_client_servers": "nobody"}, "agentic_client_servers must be a group"),
    ],
)
def test_client_configuration_that_cannot_work_is_refused(
    host: Host, clients: Path, variables: dict[str, Any], message: str
) -> None:
    before = host.file(CONFIG).content_string
    done = render(clients, **variables)
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).split()), done.stdout
    assert host.file(CONFIG).content_string == before
