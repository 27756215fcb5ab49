"""A drift report for people in a terminal, in a browser, and for Prometheus."""

from __future__ import annotations

import datetime
import re
from html.parser import HTMLParser

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift as drift
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_html, _drift_output

TIME = "2026-06-15T12:00:00Z"
TODAY = datetime.date(2026, 6, 15)
ACCEPTED = [
    {"kind": "undeclared_file", "reason": "the auditors' <script>", "until": "2026-12-31"},
    {"kind": "attributes_changed", "reason": "a trial", "until": "2026-01-31"},
]


def finding(kind, where, severity="warning", source="configuration", **more) -> dict:
    found = {"kind": kind, "severity": severity, "source": source, "where": where, "found": "is another <one>"}
    return {**found, "wanted": "as declared", "remedy": "run site.yml", **more}


@pytest.fixture
def report() -> dict:
    diff = "\n".join(["@@ -1,2 +1,2 @@", " a", "-b & c", "+d", *(f"+{number}" for number in range(20))])
    before = drift.judge("h1", [finding("file_changed", "/etc/old")], [], {}, TODAY)
    drift.compare(before, None, "2026-06-01T00:00:00Z")
    findings = [
        finding("file_changed", "/etc/vllm/primary.yaml", diff=diff),
        finding("stale_process", "vllm@primary.service", "critical", "runtime"),
        finding("undeclared_file", "/etc/vllm/x", source="content"),
        finding("attributes_changed", "/etc/vllm"),
        finding("unit_restarts", "vllm@primary.service", "note", "runtime"),
    ]
    hosts = {
        "h1": drift.judge("h1", findings, [], {"accepted": ACCEPTED}, TODAY),
        "h2": drift.judge("h2", [], [], {}, TODAY),
        "h3": drift.judge("h3", [], ["not reached: <no> route\nat all", "another"], {}, TODAY),
    }
    return drift.report(hosts, {"h1": {**before, "time": "2026-06-01T00:00:00Z"}}, TIME, 12.34)


def text(report) -> str:
    return "\n".join(line for line, _ in _drift_output.table(report))


def test_the_answer_is_in_the_first_lines_and_in_the_last(report):
    lines = text(report).splitlines()
    assert lines[0].split() == ["HOST", "VERDICT", "FINDINGS", "SINCE", "THE", "LAST", "RUN"]
    assert re.split("  +", lines[1]) == ["h1", "drifted", "1 critical, 2 warnings, 1 note, 1 accepted", "5 new, 1 gone"]
    assert re.split("  +", lines[2]) == ["h2", "clean", "-", "first look"]
    assert lines[-1] == (
        "Verdict  unknown: 1 host is as declared, 1 host drifted, 1 host could not be looked at in full (12 s)"
    )


def test_each_line_carries_the_verdict_that_it_is_about(report):
    told = [verdict for _, verdict in _drift_output.table(report)]
    assert told[:4] == ["", "drifted", "clean", "unknown"]
    assert told[-1] == "unknown"


def test_details_say_what_was_found_and_what_to_do(report):
    lines = text(report).splitlines()
    start = lines.index("  critical  vllm@primary.service: is another <one> (new)")
    assert lines[start + 1 : start + 3] == [
        "            wanted as declared [stale_process]",
        "            run site.yml",
    ]
    assert "            its exception expired on 2026-01-31: a trial" in lines
    assert "            accepted until 2026-12-31: the auditors' <script>" in lines
    assert "            | -b & c" in lines
    assert "            | ... 12 more lines" in lines
    assert "  gone      /etc/old [file_changed], which was there since 2026-06-01" in lines
    assert "  unknown   not reached: <no> route" in lines
    assert "            at all" in lines
    assert "h2" not in [line for line in lines[4:] if not line.startswith(" ")]


def test_of_an_unknown_host_nobody_says_that_nothing_changed(report):
    host = {**report["hosts"]["h3"], "compared_with": TIME}
    assert _drift_output.since(host) == "-"


def test_a_clean_run_is_three_lines(report):
    made = drift.report({"h2": report["hosts"]["h2"]}, {"h2": {**report["hosts"]["h2"], "time": TIME}}, TIME, None)
    assert text(made).splitlines() == [
        "HOST  VERDICT  FINDINGS  SINCE THE LAST RUN",
        "h2    clean    -         no change",
        "",
        "Verdict  clean: 1 host is as declared",
    ]


def test_numbers_for_prometheus(report):
    hosts = {name: {**host, "time": TIME} for name, host in report["hosts"].items()}
    hosts['with "quotes"\\'] = {**hosts.pop("h2")}
    lines = _drift_output.prometheus(hosts).splitlines()
    assert [line for line in lines if line.startswith("drift_")] == [
        'drift_findings{host="h1",kind="attributes_changed"} 1',
        'drift_findings{host="h1",kind="file_changed"} 1',
        'drift_findings{host="h1",kind="stale_process"} 1',
        'drift_check_failed{host="h1"} 0',
        'drift_check_failed{host="h3"} 1',
        'drift_check_failed{host="with \\"quotes\\"\\\\"} 0',
        'drift_last_run_timestamp_seconds{host="h1"} 1781524800',
        'drift_last_run_timestamp_seconds{host="h3"} 1781524800',
        'drift_last_run_timestamp_seconds{host="with \\"quotes\\"\\\\"} 1781524800',
    ]
    assert [line for line in lines if line.startswith("# TYPE")] == [
        "# TYPE drift_findings gauge",
        "# TYPE drift_check_failed gauge",
        "# TYPE drift_last_run_timestamp_seconds gauge",
    ]


class Page(HTMLParser):
    """Collects what a page is made of, and checks that what opens closes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_is_whole_and_needs_nothing_else(report):
    source = _drift_html.page(report, _drift_html.strips([report]))
    page = Page(source)
    assert page.open == []
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"} == set()
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src")]
    assert addresses == ["#h1", "#h2", "#h3", "latest.json"]
    assert "url(" not in source
    assert "@import" not in source


def test_the_page_tells_all_and_escapes_it(report):
    page = Page(_drift_html.page(report, _drift_html.strips([report])))
    for told in ("is another <one>", "the auditors' <script>", "not reached: <no> route", "+19", "/etc/old", "-b & c"):
        assert told in page.text
    assert page.text.count("new") >= 5


def test_the_strip_of_a_host_ends_with_its_last_run(report):
    reports = [{**report, "time": f"2026-06-{day:02}T00:00:00Z"} for day in range(30, 0, -1)] * 2
    runs = _drift_html.strips(reports)["h2"]
    assert len(runs) == _drift_html.RUNS
    assert runs[-1] == ("2026-06-30T00:00:00Z", "clean", "-")
