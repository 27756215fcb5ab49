"""What rules, dashboards and the page for a person on call ask for, put to the real Prometheus of the container.

It runs after test_monitoring.py, whose first look is at a host without monitoring.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import INSTANCES, ROOT, await_, chat, playbook
from testinfra.host import Host

sys.path += [str(ROOT / "tools"), str(ROOT / ".collections")]

from ansible_collections.nvl.vllm.plugins.module_utils import (
    _drift_output,
    _gpu_info,
    _gpu_metrics,
    _monitoring_textfile,
)

from metric_names import filled, names_on, of_consoles, of_dashboards, of_rules, unknown

PROMETHEUS = "http://127.0.0.1:9090"
RULES = "/etc/vllm/monitoring/rules"
#: What node exporter adds to its page.
TEXTFILES = "/var/lib/prometheus/node-exporter"
FILES = ROOT / "roles/vllm_monitoring/files"
CAPTURED = ROOT / "tests/unit/data/metrics"
#: The figures that the stand-in for nvidia-smi does not know, and a real one does.
UNKNOWN = {
    "DCGM_FI_DEV_MEM_COPY_UTIL",
    "DCGM_FI_DEV_MEMORY_TEMP",
    "DCGM_FI_DEV_MEM_CLOCK",
    "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL",
}
#: What node exporter shows on each kernel; the rest of its page depends on that, and on devices.
EVERYWHERE = re.compile(r"node_(boot|exporter|filesystem|forks|load\d|scrape|textfile|time_|uname)\w*")


def api(host: Host, path: str, **parameters: str) -> Any:
    """What Prometheus answers a question with; one that it refuses fails."""
    options = " ".join("--data-urlencode %s" for _ in parameters)
    answer = host.run(
        f"curl --silent --show-error --max-time 30 --get {options} {PROMETHEUS}/api/v1/{path}",
        *(f"{name}={value}" for name, value in parameters.items()),
    )
    found = json.loads(answer.stdout)
    assert found["status"] == "success", (parameters, found)
    return found["data"]


def numbers(host: Host, query: str) -> list[float]:
    """The values that a query has now."""
    values = (float(one["value"][1]) for one in api(host, "query", query=filled(query))["result"])
    return [value for value in values if not math.isnan(value)]


def pages(host: Host) -> dict[str, str]:
    """The page of each target, as Prometheus finds it, by job."""
    targets = api(host, "targets", state="active")["activeTargets"]
    return {one["labels"]["job"]: host.check_output("curl -sf --max-time 10 %s", one["scrapeUrl"]) for one in targets}


def all_serve(host: Host) -> bool:
    """Both engines are in use, also where the test before this one broke one."""
    status = json.loads(host.check_output("curl -sf http://127.0.0.1:8405/status"))
    return {one["word"] for one in status["instances"].values()} == {"up ready"}


@pytest.fixture(scope="module")
def gpu_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the stand-in for dcgm-exporter writes of two H100 NVL, as the stand-in for nvidia-smi shows them."""
    programs: Path = tmp_path_factory.mktemp("programs")
    for name in ("nvidia-smi", "dmesg"):
        (programs / name).symlink_to(ROOT / "tests/fakes/nvidia-smi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("NVIDIA_SMI_STATE", "busy")
        page = _monitoring_textfile.gpus_page("gpu-1", _gpu_info.run_command)
    silent = {name for name, _, _ in _gpu_metrics.METRICS if f"\n{name}{{" not in page}
    assert silent == UNKNOWN
    return page + "".join(f'{name}{{gpu="0"}} 0\n' for name in sorted(silent))


@pytest.fixture(scope="module", autouse=True)
def monitored(host: Host, gpu_page: str) -> Iterator[None]:
    """Prometheus runs, and shows GPUs."""
    if host.run(f"curl -sf -o /dev/null {PROMETHEUS}/-/ready").rc != 0:
        done = playbook("playbooks/monitoring.yml")
        assert done.returncode == 0, done.stdout
    await_(lambda: all_serve(host), 120)
    path = f"{TEXTFILES}/gpus_of_a_test.prom"
    host.run_expect([0], "printf %s >%s", gpu_page, path)
    yield
    host.run_expect([0], "rm %s", path)


@pytest.fixture(scope="module")
def offered(host: Host, gpu_page: str) -> set[str]:
    """The names on the pages of this host, and of what it has no device, no certificate or no run for."""
    elsewhere = (_drift_output.prometheus({}), _monitoring_textfile.certificates_page([], _gpu_info.run_command))
    return set().union(*map(names_on, [*pages(host).values(), gpu_page, *elsewhere]))


def test_rules_ask_for_what_there_is(host: Host, offered: set[str]) -> None:
    queries: dict[str, str] = {}
    made: set[str] = set()
    for path in host.check_output(f"find {RULES} -name '*.yml'").splitlines():
        of_file, made_there = of_rules(yaml.safe_load(host.check_output("cat %s", path)))
        queries |= of_file
        made |= made_there
    assert len(queries) > 20, queries
    assert unknown(queries, offered | made) == {}


def test_rules_of_gpus_are_understood_and_ask_for_what_there_is(host: Host, gpu_page: str) -> None:
    """They are not on a host without GPUs, so the real Prometheus is asked what each of them asks."""
    spec = importlib.util.spec_from_file_location("monitoring_conftest", ROOT / "tests/monitoring/conftest.py")
    assert spec
    assert spec.loader
    templates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(templates)
    queries, _ = of_rules(yaml.safe_load(templates.render("rules/gpus.yml.j2")))
    assert len(queries) > 5, queries
    for query in queries.values():
        api(host, "query", query=query)
    assert unknown(queries, names_on(gpu_page)) == {}


def test_dashboards_and_the_page_ask_for_what_there_is(offered: set[str]) -> None:
    assert unknown(of_dashboards(FILES / "dashboards"), offered) == {}
    assert unknown(of_consoles(FILES / "consoles"), offered) == {}


def test_captured_pages_are_what_the_container_shows(offered: set[str]) -> None:
    """Else the unit tests compare with a release that is not the pinned one."""
    for path in (CAPTURED.parent / "metrics-0.32.0.txt", CAPTURED / "haproxy-2.6.txt", CAPTURED / "health-agent.txt"):
        assert names_on(path.read_text()) - offered == set(), path.name
    of_node = {
        name for name in names_on((CAPTURED / "node-exporter-1.5.txt").read_text()) if EVERYWHERE.fullmatch(name)
    }
    assert len(of_node) > 15
    assert of_node - offered == set()


def test_each_panel_has_data(host: Host, api_key: str) -> None:
    waiting = of_dashboards(FILES / "dashboards")

    def all_have_data() -> bool:
        # Rates need something that moves, and the cache a prompt that it has seen.
        for name in (*INSTANCES, "gateway"):
            chat(host, name, api_key)
        for place in [place for place, query in waiting.items() if numbers(host, query)]:
            del waiting[place]
        # In the table of alerts a row is an alert.
        return all("Firing alerts" in place for place in waiting) and not (waiting and firing(host))

    try:
        await_(all_have_data, 120)
    finally:
        print("without data:", *waiting, sep="\n")


def firing(host: Host) -> list[float]:
    return numbers(host, 'ALERTS{alertstate="firing"}')


def test_the_page_for_a_person_on_call(host: Host) -> None:
    page = host.check_output(f"curl -sf --max-time 30 {PROMETHEUS}/consoles/nvl.html")
    assert re.search(r"<h1>Serving <span>2 of 2 engines</span></h1>", page), page
    for name in (*INSTANCES, "gateway"):
        assert re.search(rf"<h3><span>{name} <small>\w+</small></span><b>serves</b></h3>", page), page
    assert len(re.findall("<tr><td>", page)) == 2, "the two GPUs"
    assert "<dd>\N{EN DASH}</dd>" not in page, "a figure of an engine or of the gateway has no value"
    assert "<no value>" not in page
    assert "NaN" not in page
