"""The gateway and the health agent as systemd runs them, in front of real engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTANCES, PORTS, SANDBOX, await_, chat, playbook, show, site
from testinfra.host import Host

DOOR = "http://127.0.0.1:8000"
ALONE = "molecule/shared/gateway_only.yml"
#: What clients may ask for, with a key; GET /health is the only route without one.
DOORS = {("POST", f"/v1/{path}") for path in ("chat/completions", "completions", "responses")} | {("GET", "/v1/models")}
#: Routes of vLLM that its own description leaves out, and ways to write one that is allowed.
UNLISTED = ("/", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/metrics/", "/health/", "//health")
#: Reads lines "METHOD URL" and answers each with the status, or with why there was none.
SCANNER = """
import http.client, sys
from urllib.parse import urlsplit
for line in sys.stdin:
    method, url = line.split()
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    try:
        connection.request(method, url.removeprefix(f"http://{parts.netloc}"), "{}" if method == "POST" else None)
        print(connection.getresponse().status)
    except OSError as error:
        print(type(error).__name__)
    connection.close()
"""


def podman(*arguments: str, stdin: str = "") -> str:
    """What Podman prints, with the settings that the sandbox's containers are made with."""
    settings = SANDBOX / "containers.conf"
    environment = {**os.environ, **({"CONTAINERS_CONF": str(settings)} if settings.exists() else {})}
    done = subprocess.run(
        ["podman", *arguments], input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def address() -> str:
    """Where other containers find the host of the engines."""
    return podman("inspect", "nvl-vllm-molecule", "--format", "{{.NetworkSettings.IPAddress}}").strip()


def scan(requests: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The status of each request (method and URL), asked without a key from another container."""
    image = podman("inspect", "nvl-vllm-molecule", "--format", "{{.Image}}").strip()
    lines = "".join(f"{method} {url}\n" for method, url in requests)
    found = podman("run", "--rm", "-i", image, "/usr/bin/python3", "-c", SCANNER, stdin=lines)
    return dict(zip(requests, found.split(), strict=True))


def statistics(host: Host) -> dict[str, str]:
    """Status of each engine, as the gateway sees it."""
    page = host.check_output("curl -sf 'http://127.0.0.1:8404/;csv'")
    names, *rows = (line.split(",") for line in page.removeprefix("# ").splitlines())
    found = [dict(zip(names, row, strict=False)) for row in rows]
    return {row["svname"]: row["status"] for row in found if row["svname"] in INSTANCES}


@pytest.mark.parametrize(("unit", "highest"), [("vllm-gateway", 2.0), ("vllm-health", 2.0)])
def test_units_run_at_boot_in_a_sandbox(host: Host, unit: str, highest: float) -> None:
    service = host.service(f"{unit}.service")
    assert service.is_running
    assert service.is_enabled
    report = host.check_output("systemd-analyze security --no-pager %s.service", unit)
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", report)[1]) <= highest  # type: ignore[index]


def test_debians_own_haproxy_does_not_run(host: Host) -> None:
    assert show(host, "haproxy.service", "ActiveState", "UnitFileState") == {
        "ActiveState": "inactive",
        "UnitFileState": "disabled",
    }


def test_both_engines_are_used(host: Host) -> None:
    await_(lambda: set(statistics(host).values()) == {"UP"}, 30)
    status = json.loads(host.check_output("curl -sf http://127.0.0.1:8405/status"))
    assert {name: one["word"] for name, one in status["instances"].items()} == dict.fromkeys(INSTANCES, "up ready")


def test_door_answers_a_chat(host: Host, api_key: str) -> None:
    answer = json.loads(chat(host, "gateway", api_key))
    assert answer["choices"][0]["message"]["content"].startswith("This is a tiny stand-in")
    events = chat(host, "gateway", api_key, stream=True).splitlines()
    assert [event for event in events if event][-1] == "data: [DONE]"


def test_a_scan_without_a_key_finds_health_and_nothing_else(host: Host, address: str) -> None:
    described = json.loads(host.check_output("curl -sf http://127.0.0.1:%s/openapi.json", str(PORTS["primary"])))
    paths = [re.sub(r"\{\w+\}", "1", path) for path in described["paths"]]
    assert {"/invocations", "/tokenize", "/metrics", "/v1/chat/completions"} <= set(paths)
    asked = [(method, path) for path in (*paths, *UNLISTED) for method in ("GET", "POST", "DELETE")]

    found = scan([(method, f"http://{address}:8000{path}") for method, path in asked])

    wrong = {}
    for method, path in asked:
        wanted = "401" if (method, path) in DOORS else "200" if (method, path) == ("GET", "/health") else "404"
        status = found[method, f"http://{address}:8000{path}"]
        if status != wanted:
            wrong[method, path] = status
    assert wrong == {}


def test_nothing_but_the_door_is_open_to_another_container(host: Host, address: str) -> None:
    behind = {port: ("GET", f"http://{address}:{port}/metrics") for port in (*PORTS.values(), 8403, 8404, 8405)}
    # They listen, and on this host they answer.
    for port in (*PORTS.values(), 8404, 8405):
        host.check_output("curl -sf http://127.0.0.1:%s/metrics", str(port))
    assert set(scan(list(behind.values())).values()) == {"ConnectionRefusedError"}


def test_access_log_has_neither_prompt_nor_key(host: Host, api_key: str) -> None:
    since = host.check_output("date +%s")
    secret = "the-word-of-this-test-4711"
    messages = [{"role": "user", "content": secret}]
    answer = json.loads(chat(host, "gateway", api_key, messages=messages))
    assert answer["usage"]["completion_tokens"] == 24

    def lines() -> list[dict[str, Any]]:
        journal = host.check_output("journalctl --no-pager -o cat -u vllm-gateway --since @%s", since)
        return [json.loads(line) for line in journal.splitlines() if line.startswith("{")]

    await_(lambda: bool(lines()), 10)
    logged = lines()[-1]
    assert (logged["status"], logged["key"]) == (200, "vllm_api_key")
    assert (logged["method"], logged["path"]) == ("POST", "/v1/chat/completions")
    journal = host.check_output("journalctl --no-pager -o cat -u vllm-gateway -u vllm-health")
    assert secret not in journal
    assert api_key not in journal


@pytest.mark.more
def test_a_stop_by_hand_leaves_the_gateway_first(host: Host, api_key: str) -> None:
    host.run_expect([0], "systemctl stop vllm@secondary.service")
    try:
        assert not statistics(host)["secondary"].startswith("UP")
        chat(host, "gateway", api_key)
    finally:
        host.run_expect([0], "systemctl start vllm@secondary.service")
    # The start job ends when the gateway uses the engine again.
    assert statistics(host)["secondary"] == "UP"
    assert not host.file("/run/nvl-vllm/drain/secondary").exists


def test_a_drained_engine_sends_back_what_the_gateway_still_sends(host: Host, api_key: str) -> None:
    """As the gateway's old process does after a reload. Others have nowhere else to go."""
    body = json.dumps({"model": "gpt-oss-120b", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2})

    def status(*headers: str) -> str:
        named = " ".join(f"-H '{header}'" for header in (f"Authorization: Bearer {api_key}", *headers))
        return host.check_output(
            f"curl -s -m 60 -o /dev/null -w '%%{{http_code}}' {named} -H 'Content-Type: application/json'"
            " http://127.0.0.1:%s/v1/chat/completions -d %s",
            str(PORTS["secondary"]),
            body,
        )

    assert status("X-Request-Id: 1") == "200"
    host.check_output("mkdir -p /run/nvl-vllm/drain && echo test >/run/nvl-vllm/drain/secondary")
    try:
        assert (status("X-Request-Id: 2"), status()) == ("503", "200")
    finally:
        host.check_output("rm /run/nvl-vllm/drain/secondary")
    assert status("X-Request-Id: 3") == "200"
    await_(lambda: set(statistics(host).values()) == {"UP"}, 30)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"vllm_gateway_queue": 0}, "vllm_gateway_queue is 0: wanted a whole number from 1 to 100000"),
        (
            {"vllm_gateway_port": 8499, "vllm_health_agent_port": 8499},
            "vllm_gateway_port is 8499: it is vllm_health_agent_port, too",
        ),
    ],
)
def test_a_refused_variable_changes_nothing(host: Host, variables: dict[str, int], message: str) -> None:
    refused = site(**variables)
    assert refused.returncode != 0
    assert f"molecule: {message}" in refused.stdout
    assert "changed=0" in refused.stdout


def pem(directory: Path, name: str) -> dict[str, str]:
    """A certificate and its key, as text."""
    key, certificate = directory / f"{name}.key", directory / f"{name}.crt"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"]
    command = ["openssl", "req", "-x509", *curve, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return {"certificate": certificate.read_text(), "key": key.read_text()}


def test_a_key_of_another_certificate_changes_nothing(host: Host, api_key: str, tmp_path: Path) -> None:
    ours, other = pem(tmp_path, "ours"), pem(tmp_path, "other")

    def state() -> list[str]:
        digests = host.check_output("cd /etc/vllm/gateway && sha256sum *")
        return [digests, *show(host, "vllm-gateway.service", "MainPID", "NRestarts").values()]

    before = state()
    refused = playbook(
        ALONE,
        vllm_gateway_tls="files",
        vllm_gateway_tls_certificate=ours["certificate"],
        vllm_gateway_tls_key=other["key"],
        vllm_gateway_keys=[{"name": "new", "key": "n" * 32}],
    )
    assert refused.returncode != 0
    assert "the private key that belongs to it, found: inconsistencies between private key and" in " ".join(
        refused.stdout.split()
    )
    assert other["key"].splitlines()[1] not in refused.stdout
    assert state() == before
    # What is on disk is what runs, also after a restart.
    host.check_output("haproxy -c -q -f /etc/vllm/gateway/haproxy.cfg")
    chat(host, "gateway", api_key)


def test_a_taken_port_is_named_before_anything_is_changed(host: Host) -> None:
    host.run_expect([0], "systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8010")
    try:
        await_(lambda: host.run("curl -sf -o /dev/null http://127.0.0.1:8010/").rc == 0, 10)
        refused = site(vllm_gateway_port=8010)
        assert refused.returncode != 0
        assert "port 8010 (vllm_gateway_port) is taken by python3 (process" in refused.stdout
        assert "changed=0" in refused.stdout
    finally:
        host.run_expect([0], "systemctl stop squatter")


def test_keys_rotate_by_a_reload(host: Host, api_key: str) -> None:
    """Both keys are valid at once, the program is not restarted, and the engines are not touched."""
    before = show(host, "vllm-gateway.service", "MainPID", "NRestarts")
    keys = [{"name": "old", "key": "o" * 32}, {"name": "new", "key": "n" * 32}]
    done = playbook(ALONE, vllm_gateway_keys=keys)
    assert done.returncode == 0, done.stdout
    assert show(host, "vllm-gateway.service", "MainPID", "NRestarts") == before
    for key in keys:
        chat(host, "gateway", key["key"])
    assert host.run(f"curl -sf {DOOR}/v1/models -H 'Authorization: Bearer {api_key}'").rc != 0
    on_disk = host.check_output("cat /etc/vllm/gateway/keys")
    assert "n" * 32 not in on_disk

    done = playbook(ALONE)
    assert done.returncode == 0, done.stdout
    chat(host, "gateway", api_key)
    assert show(host, "vllm-gateway.service", "MainPID", "NRestarts") == before
