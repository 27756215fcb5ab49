"""Prometheus, Alertmanager and the exporters on the container: what they see, and what they say when an engine fails.

Nothing is deployed to a virgin host in the tests before; this file does it, in the order of its tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers import await_, main_pid, playbook
from testinfra.host import Host

PLAYBOOK = "playbooks/monitoring.yml"
UNITS = ("vllm-prometheus", "vllm-alertmanager", "vllm-node-exporter")
RULES = "/etc/vllm/monitoring/rules"
#: So that the tests need not wait for what people are to be spared.
QUICK = {
    "vllm_monitoring_scrape_interval": 2,
    "vllm_monitoring_certificates": ["/srv/of-a-test.pem"],
    "vllm_monitoring_for": {"EngineDown": "2s", "EngineHung": "2s", "OneEndpointLeft": "0s"},
}
#: Alerts and targets are there within seconds; a loaded machine takes longer.
SECONDS = 60.0


def get(host: Host, address: str) -> Any:
    return json.loads(
        host.check_output("curl --silent --show-error --fail --max-time 10 %s", f"http://127.0.0.1:{address}")
    )


def alerts(host: Host) -> dict[tuple[str, str], dict[str, Any]]:
    """What Alertmanager would tell somebody, by alert and instance."""
    found = get(host, "9093/api/v2/alerts?active=true")
    return {(one["labels"]["alertname"], one["labels"].get("instance", "")): one for one in found}


def units(host: Host) -> list[str]:
    return host.check_output(
        "cd /etc/systemd/system && ls | grep -E 'prometheus|alertmanager|exporter|textfile' || true"
    ).split()


@pytest.fixture(scope="module")
def monitored(host: Host) -> None:
    """The role with its defaults, but in a hurry, and with a certificate that ends soon."""
    host.run_expect(
        [0],
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 5 -subj /CN=test"
        " -keyout /srv/of-a-test.pem -out /srv/of-a-test.crt && cat /srv/of-a-test.crt >>/srv/of-a-test.pem",
    )
    done = playbook(PLAYBOOK, **QUICK)
    assert done.returncode == 0, done.stdout


def test_check_mode_on_a_host_without_monitoring(host: Host) -> None:
    before = units(host)
    done = playbook(PLAYBOOK, "--check", "--diff")
    assert done.returncode == 0, done.stdout
    assert "vllm-prometheus" in done.stdout
    assert units(host) == before == []
    assert not host.file("/etc/vllm/monitoring").exists


def test_an_existing_prometheus_gets_targets_and_rules_and_nothing_is_installed(host: Host) -> None:
    here = "/srv/of-the-operator"
    directories = {f"vllm_monitoring_{name}_directory": f"{here}/{name}" for name in ("targets", "rules", "dashboards")}
    done = playbook(PLAYBOOK, vllm_monitoring_prometheus="existing", vllm_monitoring_prometheus_unit="", **directories)
    assert done.returncode == 0, done.stdout
    targets = yaml.safe_load(host.file(f"{here}/targets/nvl-vllm.yml").content_string)
    assert {target["labels"]["job"] for target in targets} == {"vllm", "gateway", "health", "node"}
    assert host.file(f"{here}/rules/nvl-vllm-engines.yml").exists
    assert host.file(f"{here}/dashboards/nvl-vllm-overview.json").exists
    assert units(host) == []
    host.run_expect([0], f"rm -r {here}")


@pytest.mark.usefixtures("monitored")
def test_a_second_run_changes_nothing() -> None:
    done = playbook(PLAYBOOK, **QUICK)
    assert done.returncode == 0, done.stdout
    assert "changed=0" in done.stdout, done.stdout


@pytest.mark.usefixtures("monitored")
def test_all_targets_are_up(host: Host) -> None:
    wanted = {(job, job) for job in ("gateway", "health", "node", "alertmanager")}
    wanted |= {("vllm", "primary"), ("vllm", "secondary")}

    def up() -> bool:
        found = get(host, "9090/api/v1/targets?state=active")["data"]["activeTargets"]
        labels = [target["labels"] for target in found if target["health"] == "up"]
        return {(each["job"], each["instance"]) for each in labels} == wanted

    await_(up, SECONDS)


@pytest.mark.usefixtures("monitored")
def test_rules_are_evaluated(host: Host) -> None:
    def evaluated() -> bool:
        groups = get(host, "9090/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
        return len(rules) > 25 and all(rule["health"] == "ok" for rule in rules)

    await_(evaluated, SECONDS)


@pytest.mark.usefixtures("monitored")
def test_only_loopback_listens(host: Host) -> None:
    lines = host.check_output("ss --listening --tcp --udp --numeric --no-header").splitlines()
    # 9094 is where Alertmanager would look for others like it.
    mine = {line.split()[4] for line in lines if line.split()[4].endswith((":9090", ":9093", ":9094", ":9100"))}
    assert mine == {"127.0.0.1:9090", "127.0.0.1:9093", "127.0.0.1:9100"}
    for unit in ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter"):
        assert not host.service(unit).is_running
    for unit in UNITS:
        assert host.service(unit).is_running
        assert host.service(unit).is_enabled


@pytest.mark.usefixtures("monitored")
def test_changed_rules_are_read_without_a_restart(host: Host) -> None:
    pids = host.check_output(f"systemctl show --property=MainPID {' '.join(UNITS)}")
    state = "/usr/local/libexec/vllm-monitoring state vllm-prometheus"
    host.run_expect([0], f"touch {RULES}/of-a-test.yml")
    assert host.check_output(state) == "reloaded"
    host.run_expect([0], "systemctl reload vllm-prometheus")
    assert host.check_output(state) == "started"
    host.run_expect([0], f"printf 'groups: nonsense' >{RULES}/of-a-test.yml")
    assert host.run("systemctl reload vllm-prometheus").rc != 0
    host.run_expect([0], f"rm {RULES}/of-a-test.yml && systemctl reload vllm-prometheus")
    assert host.check_output(state) == "started"
    assert host.check_output(f"systemctl show --property=MainPID {' '.join(UNITS)}") == pids


@pytest.mark.usefixtures("monitored")
def test_a_certificate_that_ends_soon_is_an_alert(host: Host) -> None:
    await_(lambda: ("CertificateExpires", "node") in alerts(host), SECONDS)
    assert alerts(host)["CertificateExpires", "node"]["labels"]["file"] == "/srv/of-a-test.pem"


def well(host: Host) -> bool:
    """Nothing of what these tests do is in alarm. Tests before may have left other alerts."""
    return not alerts(host).keys() & {("EngineHung", "secondary"), ("EngineDown", "secondary"), ("OneEndpointLeft", "")}


@pytest.fixture
def whole_again(host: Host) -> Iterator[None]:
    await_(lambda: well(host), SECONDS)
    yield
    host.run_expect([0], "systemctl kill --signal=SIGCONT vllm@secondary; systemctl start vllm@secondary")
    await_(lambda: well(host), SECONDS)


@pytest.mark.usefixtures("monitored", "whole_again")
def test_an_engine_that_hangs_is_an_alert_that_ends(host: Host) -> None:
    """Its API server answers /health and /metrics on, as if nothing were wrong."""
    core = host.check_output(f"pgrep --parent {main_pid(host, 'secondary')} --full VLLM::EngineCore")
    host.run_expect([0], f"kill -STOP {core}")
    await_(lambda: ("EngineHung", "secondary") in alerts(host), SECONDS)
    told = alerts(host)
    assert ("EngineDown", "secondary") not in told
    assert ("EngineHung", "primary") not in told
    annotations = told["EngineHung", "secondary"]["annotations"]
    assert annotations["summary"].startswith("Engine secondary on ")
    assert annotations["runbook_url"] == "docs/runbook.md#enginehung"
    host.run_expect([0], f"kill -CONT {core}")


@pytest.mark.usefixtures("monitored", "whole_again")
def test_an_engine_that_is_killed_and_stays_away_is_an_alert_that_ends(host: Host) -> None:
    host.run_expect(
        [0], "systemctl kill --signal=SIGKILL vllm@secondary.service; systemctl stop vllm@secondary.service"
    )
    await_(lambda: ("EngineDown", "secondary") in alerts(host), SECONDS)
    await_(lambda: ("OneEndpointLeft", "") in alerts(host), SECONDS)
    assert ("EngineDown", "primary") not in alerts(host)
