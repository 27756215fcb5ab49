"""The Grafana dashboards: the committed files are what the source says, and Grafana can make something of them."""

from __future__ import annotations

import itertools
import json
import re

import pytest

import dashboards

FILES = {path.stem: json.loads(text) for path, text in dashboards.files().items()}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']} {panel['id']}")
    for name, board in FILES.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]

#: The labels that an aggregation at the beginning of a query keeps.
KEPT = re.compile(
    r"(?:sum|max|count) by \(([^)]*)\)|1000 \* max by \(([^)]*)\)|histogram_quantile\([^,]*, sum by \(([^)]*)\)"
)


def test_the_committed_files_are_what_the_source_says():
    wanted = dashboards.files()
    assert set(dashboards.DIRECTORY.iterdir()) == set(wanted)
    stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run tools/dashboards.py"


def test_the_tool_tells_stale_files_and_writes_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dashboards, "DIRECTORY", tmp_path)
    monkeypatch.setattr("sys.argv", ["dashboards.py", "--check"])
    with pytest.raises(SystemExit, match=r"nvl-vllm-overview\.json.*run tools/dashboards\.py"):
        dashboards.main()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.argv", ["dashboards.py"])
    dashboards.main()
    monkeypatch.setattr("sys.argv", ["dashboards.py", "--check"])
    dashboards.main()
    assert len(list(tmp_path.iterdir())) == len(FILES)


def test_each_dashboard_has_a_title_and_an_identifier_of_its_own():
    assert {name: board["uid"] for name, board in FILES.items()} == {name: name for name in FILES}
    assert len({board["title"] for board in FILES.values()}) == len(FILES)


@pytest.mark.parametrize("board", FILES.values(), ids=FILES)
def test_a_dashboard_can_be_imported(board):
    assert board["description"]
    assert "id" not in board, "Grafana gives it; one from elsewhere replaces another dashboard"
    assert board["schemaVersion"] >= 36
    assert board["refresh"] == "30s"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("board", FILES.values(), ids=FILES)
def test_dashboards_link_to_each_other(board):
    assert [(link["type"], link["tags"], link["keepTime"]) for link in board["links"]] == [
        ("dashboards", board["tags"], True)
    ]


@pytest.mark.parametrize("board", FILES.values(), ids=FILES)
def test_variables_are_chosen_before_they_are_used(board):
    defined = [variable["name"] for variable in board["templating"]["list"]]
    assert defined[:2] == ["datasource", "host"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == set(defined)
    for variable in board["templating"]["list"][1:]:
        assert variable["datasource"]["uid"] == "${datasource}"
        assert variable["includeAll"]
        assert variable["multi"]


@pytest.mark.parametrize("board", FILES.values(), ids=FILES)
def test_panels_lie_on_the_grid_beside_each_other(board):
    places = [panel["gridPos"] for panel in board["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert isinstance(panel["options"], dict)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_queries_for_the_chosen_prometheus(panel):
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert 'host=~"$host"' in target["expr"]
        assert target["instant"] != target["range"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("panel", PANELS)
def test_legends_name_labels_that_the_query_keeps(panel):
    for target in panel["targets"]:
        kept = KEPT.match(target["expr"])
        asked = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        if kept:
            assert asked <= set(re.split(r",\s*", kept[kept.lastindex])), target
        else:
            assert not asked or not re.match(r"(sum|max|count|histogram_quantile)\b", target["expr"]), target


@pytest.mark.parametrize("panel", PANELS)
def test_thresholds_begin_anywhere_and_rise(panel):
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    values = [step.get("value") for step in steps]
    assert values[:1] in ([], [None])
    assert values[1:] == sorted(values[1:])
