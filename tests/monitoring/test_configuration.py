"""The configurations of Prometheus and Alertmanager, read by the programs themselves."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

RECEIVERS = [
    {"name": "on-call", "webhook_configs": [{"url": "http://127.0.0.1:1/", "send_resolved": True}]},
    {"name": "mail", "email_configs": [{"to": "a@b.example", "from": "c@d.example", "smarthost": "mail.example:25"}]},
]
HASH = "$2y$10$" + "a" * 53


@pytest.fixture
def checked(rendered, tmp_path):
    """Renders a template and has a program check it; returns what it parses to."""

    def check(template: str, command: list[str], **variables: object):
        path = tmp_path / template.removesuffix(".j2")
        path.write_text(rendered(template, **variables))
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return yaml.safe_load(path.read_text())

    return check


def prometheus(checked, promtool, **variables):
    return checked("prometheus.yml.j2", [promtool, "check", "config", "--syntax-only"], **variables)


def test_prometheus_with_defaults(checked, promtool):
    made = prometheus(checked, promtool)
    assert made["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["127.0.0.1:9093"]}]}]
    assert "remote_write" not in made


def test_prometheus_that_sends_its_figures(checked, promtool):
    remote = [{"url": "https://metrics.example/write", "basic_auth": {"username": "u", "password": "p"}}]
    made = prometheus(
        checked,
        promtool,
        vllm_monitoring_remote_write=remote,
        vllm_monitoring_external_labels={"site": "a"},
        vllm_monitoring_alertmanager="existing",
        __vllm_monitoring_install_alertmanager=False,
        vllm_monitoring_alertmanagers=["10.0.0.5:9093"],
        vllm_monitoring_scrape_interval=2,
    )
    assert made["remote_write"] == remote
    assert made["global"]["scrape_timeout"] == "2s"
    assert made["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["10.0.0.5:9093"]}]}]


def test_prometheus_without_an_alertmanager(checked, promtool):
    variables = {"vllm_monitoring_alertmanager": "none", "__vllm_monitoring_install_alertmanager": False}
    assert "alerting" not in prometheus(checked, promtool, **variables)


def test_targets_are_labelled(rendered):
    target = {"address": "127.0.0.1:8001", "job": "vllm", "instance": "primary"}
    made = yaml.safe_load(rendered("targets.yml.j2", __vllm_monitoring_targets=[target]))
    labels = {"job": "vllm", "host": "h1", "instance": "primary"}
    assert made == [{"targets": ["127.0.0.1:8001"], "labels": labels}]


@pytest.mark.parametrize(
    "tls", [{}, {"vllm_monitoring_tls_certificate": "/c.pem", "vllm_monitoring_tls_key": "/k.pem"}]
)
def test_users(checked, promtool, tmp_path, tls):
    files = {name: str(tmp_path / path.strip("/")) for name, path in tls.items()}
    if files:
        key, certificate = files["vllm_monitoring_tls_key"], files["vllm_monitoring_tls_certificate"]
        request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subprocess.run([*request, "-subj", "/CN=a", "-keyout", key, "-out", certificate], check=True, stderr=-3)
    users = [{"name": "grafana", "password_hash": HASH}]
    made = checked("web.yml.j2", [promtool, "check", "web-config"], vllm_monitoring_users=users, **files)
    assert made["basic_auth_users"] == {"grafana": HASH}
    assert ("tls_server_config" in made) == bool(tls)


def test_alertmanager_that_tells_nobody(checked, amtool):
    made = checked("alertmanager.yml.j2", [amtool, "check-config"])
    assert made["receivers"] == [{"name": "nobody"}]
    assert made["route"]["receiver"] == "nobody"


def test_alertmanager_with_receivers(checked, amtool):
    route = {"repeat_interval": "1h", "routes": [{"matchers": ['severity="warning"'], "receiver": "mail"}]}
    variables = {"vllm_monitoring_receivers": RECEIVERS, "vllm_monitoring_route": route}
    made = checked("alertmanager.yml.j2", [amtool, "check-config"], **variables)
    assert made["receivers"] == RECEIVERS
    assert made["route"]["receiver"] == "on-call"
    assert made["route"]["repeat_interval"] == "1h"


def test_inhibitions_name_alerts_that_there_are(checked, amtool, rules):
    alerts = set(re.findall(r"- alert: (\w+)", "".join(path.read_text() for path in rules.glob("*.yml"))))
    for rule in checked("alertmanager.yml.j2", [amtool, "check-config"])["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            for name in re.search(r'alertname=~?"([^"]+)"', matcher)[1].split("|"):
                assert any(re.fullmatch(name, alert) for alert in alerts), name


@pytest.mark.parametrize("gpus", [True, False])
def test_units_have_no_capability_and_those_of_gpus_wait_for_the_driver(rendered, gpus):
    item = {"name": "a", "description": "A", "program": "/usr/bin/a", "arguments": [], "paths": [], "gpus": gpus}
    unit = rendered("unit.service.j2", item=item)
    assert "\nCapabilityBoundingSet=\n" in unit
    assert ("\nDeviceAllow=char-nvidia* rw\n" in unit) == gpus
    assert ("nvidia-gpu-settings.service" in unit) == gpus
