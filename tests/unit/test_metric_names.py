"""Every metric that rules, dashboards and console pages ask for is on a page captured from what is pinned."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_output, _gpu_metrics, _monitoring_textfile

from metric_names import filled, names_in, names_on, of_consoles, of_dashboards, of_rules, unknown

ROOT = Path(__file__).parents[2]
FILES = ROOT / "roles/vllm_monitoring/files"
DATA = ROOT / "tests/unit/data"


def captured(*names: str) -> set[str]:
    """The names on captured pages."""
    return set().union(*(names_on((DATA / name).read_text(encoding="utf-8")) for name in names))


def counters() -> set[str]:
    """What the role has dcgm-exporter show."""
    text = (FILES / "gpu-counters.csv").read_text(encoding="utf-8")
    return set(re.findall(r"^(DCGM_\w+),", text, re.MULTILINE))


def ours() -> set[str]:
    """What this collection writes for node exporter, of GPUs too."""
    pages = (
        _drift_output.prometheus({}),
        _monitoring_textfile.certificates_page([], run=lambda argv, timeout: (1, "", "")),
    )
    return set().union(*map(names_on, pages)) | {name for name, _, _ in _gpu_metrics.METRICS}


@pytest.fixture(scope="module")
def offered() -> set[str]:
    """The names on the captured pages, and those that this collection makes."""
    pages = (
        "metrics-0.32.0.txt",
        "metrics/haproxy-2.6.txt",
        "metrics/health-agent.txt",
        "metrics/node-exporter-1.5.txt",
    )
    return captured(*pages) | ours()


@pytest.fixture(scope="module")
def render():
    """The function that renders the role's templates, of the tests that give them to promtool."""
    spec = importlib.util.spec_from_file_location("monitoring_conftest", ROOT / "tests/monitoring/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render


def test_rules_ask_for_what_there_is(offered, render):
    queries: dict[str, str] = {}
    made: set[str] = set()
    for path in (FILES.parent / "templates/rules").glob("*.yml.j2"):
        of_file, made_there = of_rules(yaml.safe_load(render(f"rules/{path.name}")))
        queries |= of_file
        made |= made_there
    assert len(queries) > 30
    assert unknown(queries, offered | made) == {}


def test_dcgm_exporter_and_its_stand_in_show_what_is_asked_for(render):
    """The stand-in's names are among those above; the exporter's own have to be too, and NVIDIA has to know them."""
    queries = of_dashboards(FILES / "dashboards") | of_consoles(FILES / "consoles")
    queries |= of_rules(yaml.safe_load(render("rules/gpus.yml.j2")))[0]
    asked = {name for query in queries.values() for name in names_in(query) if name.startswith("DCGM_")}
    assert asked - counters() == set()
    assert counters() - captured("metrics/dcgm-exporter.txt") == set()


def test_dcgm_exporter_is_asked_for_nothing_that_takes_a_capability():
    assert [name for name in counters() if name.startswith("DCGM_FI_PROF_")] == []


def test_dashboards_ask_for_what_there_is(offered):
    queries = of_dashboards(FILES / "dashboards")
    assert len({place.partition(":")[0] for place in queries}) == 4
    assert unknown(queries, offered) == {}


def test_console_pages_ask_for_what_there_is(offered):
    queries = of_consoles(FILES / "consoles")
    assert len(queries) > 40
    assert unknown(queries, offered) == {}


def test_each_captured_page_says_where_it_is_from():
    for path in (DATA / "metrics").glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        assert re.match(r"# Names and types .{20}", text), path.name
        assert names_on(text), path.name


def test_a_name_that_nothing_offers_is_seen(offered):
    gone = {"old": "rate(vllm:time_per_output_token_seconds_bucket[5m])", "well": 'up{job="vllm"} == 0'}
    assert unknown(gone, offered) == {"old": ["vllm:time_per_output_token_seconds_bucket"]}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum by (le) (rate(a_bucket{le="b"}[5m])) / on (x) group_left (y) c', {"a_bucket", "c"}),
        ('label_replace(up{job="a"}, "c", "$1", "d", "(.*)")', {"up"}),
        ("max_over_time(sum(vllm:a)[30m:1m] offset 5m) or vector(0)", {"vllm:a"}),
        ('rate(a{host=~"$host"}[$__rate_interval])', {"a"}),
        ("sum(rate(a[2m] %s)) / sum(b %[1]s)", {"a", "b"}),
        ('a{host="%s"} unless on () absent(b)', {"a", "b"}),
        ("vector(1 + 2) * time()", set()),
    ],
)
def test_names_are_found_in_promql(query, names):
    assert names_in(query) == names


@pytest.mark.parametrize("query", ["sum(", "rate(a[5m]", "a b", ""])
def test_what_is_no_promql_is_refused(query):
    with pytest.raises(ValueError):  # noqa: PT011  (the parser's own words)
        names_in(query)


def test_a_selector_without_a_name_is_refused():
    with pytest.raises(ValueError, match="names no metric"):
        names_in('sum({__name__=~"vllm:.*"})')


def test_placeholders_of_grafana_cover_everything():
    assert filled('a{host=~"$host"}[$__rate_interval]') == 'a{host=~".*"}[5m]'


def test_a_page_offers_series_and_those_of_types_without_samples():
    page = '# TYPE h histogram\n# TYPE s summary\n# TYPE g gauge\n# HELP x y\nc_total{a="z 1"} 3\nbare 1\n'
    assert names_on(page) == {*("h_bucket", "h_sum", "h_count"), *("s", "s_sum", "s_count"), "g", "c_total", "bare"}


def test_queries_of_rules_and_the_names_they_make():
    rules = [{"record": "job:up:sum", "expr": "sum(up)"}, {"alert": "Down", "expr": "job:up:sum == 0"}]
    queries, made = of_rules({"groups": [{"name": "engines", "rules": rules}]})
    assert queries == {"engines: job:up:sum": "sum(up)", "engines: Down": "job:up:sum == 0"}
    assert made == {"job:up:sum"}
    assert unknown(queries, made) == {}


def test_console_pages_need_nothing_from_elsewhere():
    for path in (FILES / "consoles").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"https?:|//\w|<script|<link|@import|url\(|src=", text) == [], path.name
        assert '<meta http-equiv="refresh"' in text
        assert "prefers-color-scheme: dark" in text
