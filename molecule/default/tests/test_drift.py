"""Drift on real engines: a host as declared is clean, an admin's deeds are found and named, site.yml mends them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTANCES, await_, playbook, show, site
from testinfra.host import Host

pytestmark = pytest.mark.drift
CLEAN, DRIFTED, UNKNOWN = 0, 2, 4
SITE_PACKAGES = "/opt/vllm/current/lib/python3.11/site-packages"
#: What site.yml may cost is the measure of what a look may: the same roles, and two modules more.
COST = 1.3
#: Folders that roles write to or that a look could leave something in. Not in it: logs, journals and caches, which
#: programs that merely run write to, and Ansible's own temporary folders, which are gone with the connection.
FOLDERS = "/etc /opt /srv /usr/local /var/lib/nvl-vllm /var/lib/apt /run/nvl-vllm /run/vllm-gateway /root /tmp"
ANSIBLES_OWN = r"\( -name .ansible -o -name 'ansible*' -path '/tmp/*' \) -prune -o"
#: Names, sizes, owners, modes and times; content; units. No ctime, which a mere link count changes, and not the time of
#: /tmp and /root themselves, in which Ansible makes and removes its folders.
SNAPSHOT = (
    "export TMPDIR=/dev/shm;"  # where sort has its temporary files
    f"find {FOLDERS} -mindepth 1 -xdev {ANSIBLES_OWN}"
    r" \( -type f -o -type d -o -type l \) -printf '%p %s %U:%G %m %T@\n' | sort;"
    f"find {FOLDERS} -xdev {ANSIBLES_OWN} -type f -print0 | xargs -0 sha256sum | sort;"
    "systemctl show 'vllm*' 'haproxy*' 'hand*' --all"
    " --property=Id,LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,NeedDaemonReload;"
    "dpkg --get-selections"
)
ADMIN_SOCKET = (
    "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/vllm-gateway/admin.sock');"
    " s.sendall(b'%s\\n'); print(s.recv(999))\""
)
#: What follows from the deeds below besides the finding that names each: units whose files changed would be restarted,
#: one without a declaration removed, or run from others than those on disk, the gateway has the keys from before, the
#: role sees the changed shard, too.
CONSEQUENCES = {
    *((kind, f"vllm@{name}.service") for kind in ("stale_process", "unit_changed") for name in INSTANCES),
    *((kind, "vllm-gateway.service") for kind in ("stale_process", "unit_changed", "unit_not_reloaded")),
    *(("unit_changed", unit) for unit in ("vllm-health.service", "vllm@tertiary.service")),
    ("gateway_keys", ""),
    ("checkpoint_changed", ""),
}


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


def unexpected(found: set[tuple[str, str]], wanted: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """False alarms: what is found and neither wanted nor a consequence. Places need to hold the wanted one only."""
    known = [*wanted, *CONSEQUENCES]
    return {one for one in found if not any(one[0] == kind and where in one[1] for kind, where in known)}


def missed(found: set[tuple[str, str]], wanted: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Deeds that are not found, not named, or not located."""
    return {
        deed: (kind, where)
        for deed, (kind, where) in wanted.items()
        if not any(one[0] == kind and where in one[1] for one in found)
    }


def shard_of(host: Host) -> str:
    return host.check_output("find -L /srv/models/tiny-gpt-oss -name '*.safetensors' | sort | head -n 1")


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


def test_a_look_costs_little_more_than_a_deploy_that_changes_nothing(drift: Drift) -> None:
    """The best of three pairs, each back to back, as other work on the machine slows one of the two at times."""
    ratios = []
    for _ in range(3):
        times = []
        for run in (site, drift.run):
            began = time.monotonic()
            done = run()
            times.append(time.monotonic() - began)
            assert done.returncode == CLEAN, done.stdout + done.stderr
        ratios.append(times[1] / times[0])
        if ratios[-1] < COST:
            break
    assert min(ratios) < COST, ratios


@pytest.fixture(scope="module")
def tampered(host: Host) -> Iterator[dict[str, tuple[str, str]]]:
    """What an admin might do by hand, each with the kind and the place that must be named."""
    wheel_file = f"{SITE_PACKAGES}/vllm/version.py"
    shard = shard_of(host)
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
            ADMIN_SOCKET % "set server engines/primary weight 50%",
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
    for command in by_hand():
        host.run(command)


#: Deeds that site.yml does not undo: an admin's own files and processes, the inside of a complete release, and what was
#: said at HAProxy's socket, which a reload keeps.
NOT_OWNED = (
    *("systemctl edit", "file of its own", "patched wheel", "planted code", "listener"),
    "weight at the socket",
)


def by_hand() -> tuple[str, ...]:
    """What mends those."""
    return (
        "systemctl stop hand.service",
        "rm -rf /etc/systemd/system/vllm@secondary.service.d /etc/vllm/tertiary.yaml",
        f"cp -p /tmp/version.py {SITE_PACKAGES}/vllm/version.py && rm -f {SITE_PACKAGES}/hand.pth",
        "systemctl daemon-reload",
        "systemctl restart vllm-gateway.service vllm@secondary.service",
    )


def test_tampering_is_found_and_named(host: Host, drift: Drift, tampered: dict[str, tuple[str, str]]) -> None:
    before = host.check_output(SNAPSHOT)
    looked = drift.run()
    assert looked.returncode == DRIFTED, looked.stdout + looked.stderr
    report = drift.report()
    assert report["verdict"] == "drifted", report["unknown"]
    found = {(one["kind"], one["where"]) for one in report["findings"]}
    assert missed(found, tampered) == {}, sorted(found)
    assert unexpected(drift.counted(), tampered.values()) == set()
    assert host.check_output(SNAPSHOT) == before
    page = (drift.directory / "latest.html").read_text()
    assert all(kind in page for kind, _ in tampered.values())


def test_site_mends_what_it_owns_and_a_person_the_rest(
    host: Host, drift: Drift, tampered: dict[str, tuple[str, str]]
) -> None:
    # The work that it was drained for is done; a deploy would wait for it.
    host.run_expect([0], "rm /run/nvl-vllm/drain/secondary")
    done = site()
    assert done.returncode == 0, done.stdout
    await_(lambda: whole(host), 60)
    looked = drift.run()
    assert looked.returncode == DRIFTED, looked.stdout + looked.stderr
    left = {deed: tampered[deed] for deed in NOT_OWNED}
    assert unexpected(drift.counted(), left.values()) == set()
    mended = {deed: found for deed, found in tampered.items() if deed not in left}
    assert missed(drift.counted(), mended) == mended
    assert show(host, "vllm-health.service", "UnitFileState") == {"UnitFileState": "enabled"}
    assert drift.report()["gone"]

    for command in by_hand():
        host.run_expect([0], command)
    assert site().returncode == 0
    await_(lambda: whole(host), 60)
    looked = drift.run()
    assert looked.returncode == CLEAN, looked.stdout + looked.stderr


def test_what_stops_requests_and_damage_that_hides_are_found_and_mended(host: Host, drift: Drift) -> None:
    # A drain at HAProxy's socket is no deed here: the health agent's next word, a second later, takes it back.
    shard = shard_of(host)
    deeds = {
        "stopped": ("systemctl stop vllm@secondary.service", ("unit_not_active", "vllm@secondary.service")),
        # Size and time are as before: reading it is what finds it.
        "hidden byte": (
            f"cp -p {shard} /tmp/shard && printf '\\377' | dd of={shard} bs=1 seek=4000 conv=notrunc status=none"
            f" && touch -r /tmp/shard {shard}",
            ("model_file_damaged", shard.rpartition("/")[2]),
        ),
    }
    for command, _ in deeds.values():
        host.run_expect([0], command)
    try:
        looked = drift.run(vllm_drift_hash_budget=1024)
        assert looked.returncode == DRIFTED, looked.stdout + looked.stderr
        wanted = {deed: found for deed, (_, found) in deeds.items()}
        assert missed(drift.counted(), wanted) == {}, sorted(drift.counted())
        # A stopped engine is drained first, and down for the agent and the gateway, too.
        down = ("gateway_server_down", "engine_drained", "engine_ejected")
        known = [*wanted.values(), *((kind, "secondary") for kind in down)]
        assert unexpected(drift.counted(), known) == set()
    finally:
        host.run_expect([0], f"cp -p /tmp/shard {shard} && systemctl restart vllm-gateway.service")
    done = site()
    assert done.returncode == 0, done.stdout
    await_(lambda: whole(host), 60)
    # The file was copied back by hand: as it was, but for its inode, which this reads and takes note of.
    assert playbook("playbooks/verify_model.yml").returncode == 0
    looked = drift.run()
    assert looked.returncode == CLEAN, looked.stdout + looked.stderr


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
