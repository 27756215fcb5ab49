"""Drift on real engines: a host as declared is clean, an admin's deeds are found and named, site.yml mends them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTANCES, await_, playbook, show, site
from testinfra.host import Host

pytestmark = pytest.mark.drift
CLEAN, DRIFTED, UNKNOWN = 0, 2, 4
SITE_PACKAGES = "/opt/vllm/current/lib/python3.11/site-packages"
#: Everything that these roles write, by name, size, owner, mode and time.
SNAPSHOT = (
    "find /etc /opt /srv /usr/local /var/lib/nvl-vllm /run/nvl-vllm /run/vllm-gateway -xdev"
    r" \( -type f -o -type d -o -type l \) -printf '%p %s %U:%G %m %T@\n' | sort"
)


class Drift:
    """Runs of the playbook with a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, **variables: Any) -> subprocess.CompletedProcess[str]:
        return playbook("playbooks/drift.yml", vllm_drift_directory=str(self.directory), **variables)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "latest.json").read_text())["hosts"]["molecule"]
        return found

    def counted(self) -> set[tuple[str, str]]:
        """Kind and place of each finding that counts."""
        findings = self.report()["findings"]
        return {(one["kind"], one["where"]) for one in findings if one["severity"] != "note" and not one["accepted"]}


@pytest.fixture(scope="module")
def drift(tmp_path_factory: pytest.TempPathFactory) -> Drift:
    return Drift(tmp_path_factory.mktemp("drift"))


def whole(host: Host) -> bool:
    """Both engines serve, and the gateway uses them."""
    status = json.loads(host.check_output("curl -sf http://127.0.0.1:8405/status"))
    return {one["word"] for one in status["instances"].values()} == {"up ready"}


def test_a_host_as_declared_is_clean_and_stays_untouched(host: Host, drift: Drift) -> None:
    done = site()
    assert done.returncode == 0, done.stdout
    await_(lambda: whole(host), 60)
    before = host.check_output(SNAPSHOT)
    looked = drift.run()
    assert looked.returncode == CLEAN, looked.stdout + looked.stderr
    assert drift.report()["verdict"] == "clean"
    assert drift.counted() == set()
    assert host.check_output(SNAPSHOT) == before


@pytest.fixture
def tampered(host: Host) -> Iterator[dict[str, tuple[str, str]]]:
    """What an admin might do by hand, each with the kind and the place that must be named."""
    wheel_file = f"{SITE_PACKAGES}/vllm/version.py"
    shard = host.check_output("find -L /srv/models/tiny-gpt-oss -name '*.safetensors' | sort | head -n 1")
    extension = f"{SITE_PACKAGES}/hand.pth"
    deeds = {
        "edited arguments": (
            "sed -i 's/^max-model-len: .*/max-model-len: 2048/' /etc/vllm/primary.yaml",
            ("file_changed", "/etc/vllm/primary.yaml"),
        ),
        "restarted with them": (
            "systemctl restart vllm@primary.service",
            ("engine_configuration", "vllm@primary.service max-model-len"),
        ),
        "edited unit": (
            "printf '# by hand\\n' >>/etc/systemd/system/vllm-gateway.service",
            ("file_changed", "/etc/systemd/system/vllm-gateway.service"),
        ),
        "systemctl edit": (
            "mkdir -p /etc/systemd/system/vllm@secondary.service.d && printf '[Service]\\nNice=5\\n'"
            " >/etc/systemd/system/vllm@secondary.service.d/override.conf && systemctl daemon-reload",
            ("unit_override", "/etc/systemd/system/vllm@secondary.service.d/override.conf"),
        ),
        "disabled at boot": (
            "systemctl disable --quiet vllm-health.service",
            ("unit_not_enabled", "vllm-health.service"),
        ),
        "edited gateway": (
            "printf '# by hand\\n' >>/etc/vllm/gateway/haproxy.cfg",
            ("file_changed", "/etc/vllm/gateway/haproxy.cfg"),
        ),
        "extra key": (
            "printf '%s hand\\n' $(printf x | sha256sum | cut -d' ' -f1) >>/etc/vllm/gateway/keys",
            ("file_changed", "/etc/vllm/gateway/keys"),
        ),
        "weight at the socket": (
            "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/vllm-gateway/admin.sock');"
            " s.sendall(b'set server engines/primary weight 50%\\n'); print(s.recv(999))\"",
            ("gateway_server_changed", "primary weight"),
        ),
        "drained": (
            "mkdir -p /run/nvl-vllm/drain && echo 'new cables' >/run/nvl-vllm/drain/secondary",
            ("engine_drained", "secondary"),
        ),
        "owner": ("chown vllm /etc/vllm/secondary.yaml", ("attributes_changed", "/etc/vllm/secondary.yaml")),
        # Its difference is never shown, so its mode is not told apart from its content.
        "readable key": ("chmod 0644 /etc/vllm/secondary.env", ("file_changed", "/etc/vllm/secondary.env")),
        "changed helper": (
            "printf '# by hand\\n' >>/usr/local/libexec/vllm-unit",
            ("file_changed", "/usr/local/libexec/vllm-unit"),
        ),
        "file of its own": ("touch /etc/vllm/tertiary.yaml", ("undeclared_file", "/etc/vllm/tertiary.yaml")),
        "patched wheel": (
            f"cp -p {wheel_file} /tmp/version.py && printf '# by hand\\n' >>{wheel_file}",
            ("release_file_changed", "vllm/version.py"),
        ),
        "planted code": (f"printf 'import os\\n' >{extension}", ("release_file_added", "hand.pth")),
        "flipped byte": (
            f"cp -p {shard} /tmp/shard && printf '\\377' | dd of={shard} bs=1 seek=4000 conv=notrunc status=none",
            ("model_file_changed", shard.rpartition("/")[2]),
        ),
        "listener": (
            "systemd-run --quiet --unit=hand --uid=vllm python3 -m http.server --bind 127.0.0.1 9999",
            ("undeclared_socket", "user vllm 9999"),
        ),
    }
    for command, _ in deeds.values():
        host.run_expect([0], command)
    await_(lambda: host.run("curl -sf -o /dev/null http://127.0.0.1:9999/").rc == 0, 20)
    yield {deed: found for deed, (_, found) in deeds.items()}
    # What site.yml does not own: an admin's own files, and the inside of a complete release.
    for command in (
        "systemctl stop hand.service",
        "rm -rf /etc/systemd/system/vllm@secondary.service.d /etc/vllm/tertiary.yaml /run/nvl-vllm/drain/secondary",
        f"cp -p /tmp/version.py {wheel_file} && rm -f {extension} && systemctl daemon-reload",
        "systemctl restart vllm-gateway.service",
    ):
        host.run_expect([0], command)


def test_tampering_is_found_and_named(host: Host, drift: Drift, tampered: dict[str, tuple[str, str]]) -> None:
    before = host.check_output(SNAPSHOT)
    looked = drift.run()
    assert looked.returncode == DRIFTED, looked.stdout + looked.stderr
    report = drift.report()
    assert report["verdict"] == "drifted", report["unknown"]
    found = {(one["kind"], one["where"]) for one in report["findings"]}
    missed = {
        deed: wanted
        for deed, wanted in tampered.items()
        if not any(kind == wanted[0] and wanted[1] in where for kind, where in found)
    }
    assert missed == {}, sorted(found)
    assert host.check_output(SNAPSHOT) == before
    page = (drift.directory / "latest.html").read_text()
    assert all(kind in page for kind, _ in tampered.values())


def test_site_mends_what_it_owns_and_the_next_look_is_clean(host: Host, drift: Drift) -> None:
    done = site()
    assert done.returncode == 0, done.stdout
    await_(lambda: whole(host), 60)
    looked = drift.run()
    assert looked.returncode == CLEAN, looked.stdout + looked.stderr
    assert show(host, "vllm-health.service", "UnitFileState") == {"UnitFileState": "enabled"}
    assert drift.report()["gone"]


def test_an_accepted_exception_counts_again_when_it_has_expired(host: Host, drift: Drift) -> None:
    host.run_expect([0], "touch /etc/vllm/notes.txt")
    try:
        assert drift.run().returncode == DRIFTED
        accepted = {
            "kind": "undeclared_file",
            "where": "/etc/vllm/notes.txt",
            "reason": "a test",
            "until": "2099-12-31",
        }
        assert drift.run(vllm_drift_accepted=[accepted]).returncode == CLEAN
        assert drift.run(vllm_drift_accepted=[accepted | {"until": "2020-01-01"}]).returncode == DRIFTED
    finally:
        host.run_expect([0], "rm /etc/vllm/notes.txt")


def test_a_host_that_is_away_or_cannot_be_looked_at_is_unknown(host: Host, drift: Drift) -> None:
    away = drift.run(ansible_port=1)
    assert away.returncode == UNKNOWN, away.stdout
    assert drift.report()["verdict"] == "unknown"
    wrong = drift.run(vllm_gateway_port=8001)
    assert wrong.returncode == UNKNOWN, wrong.stdout
    assert "vllm_gateway_port is 8001" in json.dumps(drift.report()["unknown"])
    assert all(host.service(f"vllm@{name}.service").is_running for name in INSTANCES)
