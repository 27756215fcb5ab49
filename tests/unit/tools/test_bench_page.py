"""The tables and the picture of the failover benchmark."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest


@pytest.fixture(scope="session")
def page(load_tool):
    return load_tool("bench_page.py")


def drill(door, fault="kill", lost=0, cut=0, worst=1.0, **more):
    return {
        "door": door,
        "fault": fault,
        "machine_load": 0.5,
        "sent": 100,
        "lost": lost,
        "truncated": cut,
        "latency": {"p50": 0.25, "p99": 0.9, "worst": worst},
        "seconds_to_recover": 30.4,
        "broken": [],
        **more,
    }


def times(p50, **more):
    found = {"count": 9, "p50": p50, "p99": p50 * 2}
    added = {"p50": p50 - 1, "p99": p50 * 2 - 2, "ratio": p50}
    keys = ("gap", "delay", "first_token", "request")
    return {"failed": 0, **dict.fromkeys(keys, found), "added": dict.fromkeys(keys, added), **more}


@pytest.fixture
def results():
    doors = {"direct": times(1.0), "again": times(1.0), "gateway": times(1.5), "haproxy": times(1.25)}
    engines = {name: {**found, "delay": None} for name, found in doors.items()}
    return {
        "state": "abc",
        "machine": {"date": "2026-11-24", "cores": 2, "processor": "CPU", "memory_gib": 8},
        "versions": {"vllm": "1", "haproxy": "2", "nginx": "3"},
        "load": {"concurrency": 8, "max_tokens": 64, "request_timeout": 30, "fault_seconds": 60},
        "absent": {},
        "latency": {"engines": engines, "standins": doors},
        "drills": [drill("gateway", cut=1), drill("haproxy", lost=2, cut=3, worst=0.5), drill("client", cut=1)],
    }


def cells(text, start):
    """The cells of the one row that begins so."""
    (row,) = [line for line in text.splitlines() if line.replace(" ", "").startswith(f"|{start}".replace(" ", ""))]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_drill_is_a_row(page, results):
    row = cells(page.render(results), "engine process killed | HAProxy, plain")
    assert row[2:] == ["100", "2", "3", "0.90", "0.50", "30"]


def test_rows_are_fault_by_fault_in_the_order_of_the_doors(page):
    drills = [drill("client"), drill("gateway"), drill("client", "stop"), drill("gateway", "stop")]
    found = page.drills_by_fault([page.drill_of(each) for each in drills])
    order = [("kill", "gateway"), ("kill", "client"), ("stop", "gateway"), ("stop", "client")]
    assert [(each.fault, each.door) for each in found] == order


def test_others_that_are_equal_or_better_are_named(page, results):
    line = next(line for line in page.render(results).splitlines() if line.startswith("- engine process killed: this"))
    assert "lost 0 and cut 1" in line
    assert "fewer of both together: nobody" in line
    assert "as many: guide's client" in line
    assert "faster slowest answer: HAProxy, plain." in line


def test_a_door_that_loses_less_is_named(page, results):
    results["drills"] = [drill("gateway", lost=1), drill("nginx")]
    assert "fewer of both together: nginx, vLLM's docs; as many: nobody" in page.render(results)


def test_a_cheaper_door_is_named(page, results):
    assert "than this gateway: HAProxy, plain." in page.render(results)


def test_a_drill_without_numbers_is_a_row_of_dashes_and_a_sentence(page, results):
    results["drills"].append({"door": "nginx", "fault": "kill", "machine_load": 0.1, "msg": "Drill refused"})
    text = page.render(results)
    assert cells(text, "engine process killed | nginx, vLLM's docs")[2:] == ["-"] * 6
    assert "- nginx, vLLM's docs, engine process killed: Drill refused." in text


def test_a_drill_that_did_not_end_well_keeps_its_numbers(page, results):
    results["drills"].append(drill("nginx", lost=9, seconds_to_recover=None, broken=["primary did not serve again"]))
    text = page.render(results)
    assert cells(text, "engine process killed | nginx, vLLM's docs")[3:] == ["9", "0", "0.90", "1.00", "-"]
    assert "killed: primary did not serve again." in text


def test_a_door_that_could_not_be_installed_is_named(page, results):
    results["absent"] = {"litellm": "no network"}
    assert "Not measured: LiteLLM proxy, as it could not be installed (no network)." in page.render(results)


def test_latency_rows(page, results):
    text = page.render(results)
    standins, engines = text.split("### What a door costs: the engines")
    assert cells(standins.split("steady pace")[1], "this gateway") == [
        *("this gateway", "1.50", "3.00", "0.50", "1.00", "3.00", "0")
    ]
    assert cells(engines, "this gateway") == [
        *("this gateway", "1.50", "3.00", "0.50", "1.50", "2", "0.5", "2", "0.5", "0")
    ]


def test_a_door_where_all_requests_failed_is_a_row_of_dashes(page, results):
    nothing = dict.fromkeys(("gap", "delay", "first_token", "request"))
    results["latency"]["standins"]["litellm"] = {"failed": 7, **nothing, "added": nothing}
    results["latency"]["engines"]["litellm"] = {"failed": 7, **nothing, "added": nothing}
    text = page.render(results).split("steady pace")[1]
    assert cells(text.split("###")[0], "LiteLLM proxy") == ["LiteLLM proxy", *["-"] * 5, "7"]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (-0.001, "0.00"), (1.234, "1.23"), (-1.5, "-1.50")])
def test_numbers(page, value, text):
    assert page.number(value) == text


def test_tables_go_between_the_marks_and_nowhere_else(page):
    once = page.replace_between(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n", "new\n")
    assert once == f"before\n{page.BEGIN}\n\nnew\n\n{page.END}\nafter\n"
    assert page.replace_between(once, "new\n") == once


@pytest.mark.parametrize("missing", ["BEGIN", "END"])
def test_a_page_without_a_mark_is_refused(page, missing):
    text = f"{page.BEGIN}\n{page.END}\n".replace(getattr(page, missing), "")
    with pytest.raises(ValueError, match="restore it"):
        page.replace_between(text, "new")


def test_the_program_writes_page_and_picture_the_same_each_time(page, results, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "failover-benchmark.md").write_text(f"{page.BEGIN}\n{page.END}\n")
    monkeypatch.setattr(sys, "argv", ["bench_page.py", str(tmp_path / "results.json"), str(tmp_path)])
    pictures = []
    for _ in range(2):
        page.main()
        pictures.append((tmp_path / "images/failover-benchmark.svg").read_text())
    assert pictures[0] == pictures[1]
    text = "".join(ElementTree.fromstring(pictures[0]).itertext())
    assert "HAProxy, plain" in text
    assert "2 + 3" in text
    assert capsys.readouterr().out == 2 * (page.render(results) + "\n")
    assert page.render(results) in (tmp_path / "failover-benchmark.md").read_text()
