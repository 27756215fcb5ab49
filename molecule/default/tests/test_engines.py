"""The units as systemd has them, the processes as they run, and what they answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import INSTANCES, PORTS, SANDBOX, chat, main_pid, playbook, show
from testinfra.host import Host

EFFECTIVE = {
    "User": "vllm",
    "Restart": "always",
    "KillMode": "mixed",
    "TimeoutStopUSec": "1min 30s",
    "LimitNOFILE": "20000",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
    "DevicePolicy": "closed",
    "UMask": "0077",
}


@pytest.mark.parametrize("name", INSTANCES)
def test_unit_runs_and_starts_at_boot(host: Host, name: str) -> None:
    service = host.service(f"vllm@{name}.service")
    assert service.is_running
    assert service.is_enabled


def test_target_starts_at_boot(host: Host) -> None:
    assert host.service("vllm.target").is_enabled


@pytest.mark.parametrize("name", INSTANCES)
def test_effective_properties(host: Host, name: str) -> None:
    assert show(host, f"vllm@{name}.service", *EFFECTIVE) == EFFECTIVE


@pytest.mark.parametrize("name", INSTANCES)
def test_process_is_vllm_serving_its_configuration(host: Host, name: str) -> None:
    argv = host.check_output(f"tr '\\0' ' ' </proc/{main_pid(host, name)}/cmdline").split()
    assert argv[1:] == ["/opt/vllm/current/bin/vllm", "serve", "--config", f"/etc/vllm/{name}.yaml"]


def test_version_that_runs_is_the_pinned_one(host: Host) -> None:
    for port in PORTS.values():
        assert json.loads(host.check_output(f"curl -sf http://127.0.0.1:{port}/version"))["version"] == "0.32.0"
    release = json.loads(host.file("/opt/vllm/current/.release.json").content_string)
    assert release["version"].startswith("0.32.0")


def test_key_is_on_no_command_line_and_in_no_readable_file(host: Host, api_key: str) -> None:
    assert api_key not in host.check_output("ps -eww -o args")
    found = host.run("grep -rlF %s /etc /opt/vllm/locks /usr/local /run/nvl-vllm /var/lib/nvl-vllm", api_key).stdout
    # /etc/agentic is a client's, of test_agentic_client.py, which looks at its mode.
    there = sorted(path for path in found.split() if not path.startswith("/etc/agentic/"))
    assert there == ["/etc/vllm/gateway/haproxy.cfg", *(f"/etc/vllm/{name}.env" for name in INSTANCES)]
    assert api_key not in host.check_output("journalctl --no-pager")


@pytest.mark.parametrize(
    ("path", "owner", "group", "mode"),
    [
        ("/etc/vllm/primary.env", "root", "root", 0o600),
        ("/etc/vllm/primary.yaml", "root", "vllm", 0o640),
        ("/etc/vllm/gateway", "root", "haproxy", 0o750),
        ("/etc/vllm/gateway/haproxy.cfg", "root", "haproxy", 0o640),
        ("/etc/vllm/gateway/keys", "root", "haproxy", 0o640),
        ("/etc/systemd/system/vllm@.service", "root", "root", 0o644),
        ("/usr/local/libexec/vllm-unit", "root", "root", 0o755),
        ("/opt/vllm", "root", "root", 0o755),
        ("/var/lib/vllm", "vllm", "vllm", 0o750),
    ],
)
def test_owners_and_modes(host: Host, path: str, owner: str, group: str, mode: int) -> None:
    found = host.file(path)
    assert (found.user, found.group, found.mode) == (owner, group, mode)


def test_service_user_cannot_log_in(host: Host) -> None:
    assert host.user("vllm").shell == "/usr/sbin/nologin"
    assert host.user("vllm").password.startswith("!")


@pytest.mark.parametrize("name", INSTANCES)
def test_completes_a_chat(host: Host, api_key: str, name: str) -> None:
    answer = json.loads(chat(host, name, api_key))
    assert answer["model"] == "gpt-oss-120b"
    assert answer["choices"][0]["message"]["content"].startswith("This is a tiny stand-in")
    assert answer["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("name", INSTANCES)
def test_streams_in_more_than_one_chunk(host: Host, api_key: str, name: str) -> None:
    body = chat(host, name, api_key, stream=True)
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events]
    assert len([delta for delta in deltas if delta]) > 1


def test_refuses_a_client_without_the_key(host: Host) -> None:
    status = host.check_output("curl -s -o /dev/null -w %{http_code} http://127.0.0.1:8001/v1/models")
    assert status == "401"


def exposure(report: str) -> float:
    return float(re.search(r"Overall exposure level for \S+: ([\d.]+)", report)[1])  # type: ignore[index]


def test_exposure_of_the_running_unit(host: Host) -> None:
    assert exposure(host.check_output("systemd-analyze security --no-pager vllm@primary.service")) <= 2.5


@pytest.fixture(scope="module")
def gpu_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the templates make for a host with two GPUs."""
    folder = tmp_path_factory.mktemp("gpu")
    rendered = playbook("molecule/shared/render_gpu_files.yml", destination=str(folder))
    assert rendered.returncode == 0, rendered.stdout
    return folder


def test_exposure_of_the_unit_for_gpu_hosts(host: Host, gpu_files: Path) -> None:
    text = (gpu_files / "vllm@gpu.service").read_text()
    assert "DeviceAllow=char-nvidia* rw" in text
    host.run_expect([0], "mkdir -p /tmp/gpu && printf %%s %s >/tmp/gpu/vllm@gpu.service", text)
    report = host.check_output("systemd-analyze security --no-pager --offline=true /tmp/gpu/vllm@gpu.service")
    assert exposure(report) <= 2.5


def test_engines_are_pinned_to_their_gpus_by_uuid(gpu_files: Path) -> None:
    lines = (gpu_files / "secondary.env").read_text().splitlines()
    assert 'CUDA_VISIBLE_DEVICES="GPU-66666666-7777-8888-9999-000000000000"' in lines
    assert 'NVL_VLLM_GPU_MEMORY_UTILIZATION="0.85"' in lines


def test_sandbox_holds(host: Host) -> None:
    """A process in the unit's own sandbox cannot write /etc or see another user's home."""
    host.run_expect([0], "mkdir -p /home/other && echo secret >/home/other/secret && chmod -R a+rX /home/other")
    script = (
        "exec >/var/lib/vllm/said; "
        "touch /etc/written 2>/dev/null && echo wrote-etc; touch /opt/vllm/written 2>/dev/null && echo wrote-opt; "
        "cat /home/other/secret 2>/dev/null && echo saw-home; cat /etc/vllm/primary.env 2>/dev/null && echo saw-key; "
        "ls -d /proc/1 2>/dev/null && echo saw-init; echo end"
    )
    override = "\n".join(
        [
            "[Service]",
            "Type=oneshot",
            "Restart=no",
            "EnvironmentFile=",
            "ExecStartPre=",
            "ExecStartPost=",
            "ExecStopPost=",
            "ExecStart=",
            f"ExecStart=/bin/sh -c '{script}'",
        ]
    )
    folder = "/run/systemd/system/vllm@probe.service.d"
    host.run_expect([0], f"mkdir -p {folder} && printf %%s\\\\n %s >{folder}/probe.conf", override)
    try:
        host.run_expect([0], "systemctl daemon-reload && systemctl start vllm@probe.service")
        said = host.file("/var/lib/vllm/said").content_string.split()
    finally:
        host.run_expect([0], f"rm -rf {folder} /home/other /var/lib/vllm/said && systemctl daemon-reload")
    assert said == ["end"]


def test_known_hosts_pins_the_container(host: Host) -> None:
    assert "[127.0.0.1]:2223 ssh-ed25519" in (SANDBOX / "known_hosts").read_text()
