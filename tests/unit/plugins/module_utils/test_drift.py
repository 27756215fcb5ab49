"""From findings to verdicts, and from run to run."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import stat

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift as drift
from hypothesis import given
from hypothesis import strategies as st

TODAY = datetime.date(2026, 6, 15)
TIME = "2026-06-15T12:00:00Z"


def changed(**more) -> dict:
    event = {"event": "changed", "host": "h", "role": "vllm", "task": "Write", "action": "template", "where": "/etc/x"}
    return {**event, "shape": "content", "diff": "-a\n+b", **more}


def finding(kind="file_changed", where="/etc/x", severity="warning", **more) -> dict:
    found = {"kind": kind, "severity": severity, "source": "configuration", "where": where}
    return {**found, "found": "f", "wanted": "w", "remedy": "r", **more}


def exception(**more) -> dict:
    return {"kind": "file_changed", "reason": "a trial", "until": "2026-06-15", **more}


def judged(findings=(), unknown=(), **settings) -> dict:
    return drift.judge("h", findings, list(unknown), settings, TODAY)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({}, "file_changed"),
        ({"shape": "missing"}, "file_missing"),
        ({"shape": "attributes", "action": "file"}, "attributes_changed"),
        ({"shape": "attributes", "action": "file", "diff": "@@\n-src: /opt/a\n+src: /opt/b"}, "link_changed"),
        ({"shape": "hidden", "diff": ""}, "file_changed"),
        ({"action": "nvl.vllm.units"}, "unit_changed"),
        ({"action": "systemd_service"}, "unit_changed"),
        ({"action": "apt"}, "package_missing"),
        ({"action": "nvl.vllm.venv"}, "release_missing"),
        ({"action": "nvl.vllm.checkpoint"}, "checkpoint_changed"),
        ({"action": "nvl.vllm.driver_packages"}, "driver_changed"),
        ({"action": "nvl.vllm.gpu_settings"}, "gpu_settings_changed"),
        ({"action": "user"}, "configuration_changed"),
    ],
)
def test_kinds_of_changes(event, kind):
    found = drift.finding_of(changed(**event))
    assert found["kind"] == kind
    assert found["severity"] == drift.KINDS[kind].severity
    assert found["remedy"]


def test_a_change_without_a_place_is_known_by_its_task():
    assert drift.finding_of(changed(where=""))["where"] == "vllm: Write"


def test_attributes_are_told_in_words():
    diff = "@@ -1,2 +1,2 @@\n-group: 997\n-mode: 0777\n+group: 0\n+mode: 0755"
    found = drift.finding_of(changed(shape="attributes", action="file", diff=diff))
    assert (found["found"], found["wanted"]) == ("group: 997, mode: 0777", "group: 0, mode: 0755")
    assert "diff" not in found


def test_of_a_file_that_is_gone_the_declared_content_is_no_difference():
    assert "diff" not in drift.finding_of(changed(shape="missing"))
    assert drift.finding_of(changed())["diff"] == "-a\n+b"


def test_a_hidden_difference_says_so():
    assert "not shown" in drift.finding_of(changed(shape="hidden", diff=""))["found"]


@pytest.mark.parametrize("kind", drift.CONFIGURATION)
def test_every_kind_has_a_severity_and_a_remedy(kind):
    known = drift.CONFIGURATION[kind]
    assert known.severity in drift.SEVERITIES
    assert known.meaning.endswith(".")
    assert known.remedy


@pytest.mark.parametrize(
    ("findings", "unknown", "verdict"),
    [
        ([], [], "clean"),
        ([finding(severity="note")], [], "clean"),
        ([finding()], [], "drifted"),
        ([finding(severity="critical")], [], "drifted"),
        ([finding()], ["x"], "unknown"),
        ([], ["x"], "unknown"),
    ],
)
def test_verdicts(findings, unknown, verdict):
    assert judged(findings, unknown)["verdict"] == verdict


def test_findings_are_once_and_the_worst_first():
    found = judged([finding(), finding(where="b", severity="critical"), finding(found="again")])
    assert [(one["where"], one["found"]) for one in found["findings"]] == [("b", "f"), ("/etc/x", "f")]


def test_severities_are_overridden():
    assert judged([finding()], severities={"file_changed": "note"})["verdict"] == "clean"
    assert judged([finding(severity="note")], severities={"file_changed": "critical"})["verdict"] == "drifted"


@pytest.mark.parametrize(
    ("severities", "error"),
    [
        ({"no_such_kind": "note"}, "no_such_kind, which is no kind"),
        ({"file_changed": "bad"}, "has bad for file_changed"),
    ],
)
def test_severities_that_make_no_sense_are_told(severities, error):
    found = judged(severities=severities)
    assert found["verdict"] == "unknown"
    assert error in found["unknown"][0]


@pytest.mark.parametrize(
    ("entry", "accepted"),
    [
        ({}, True),
        ({"until": datetime.date(2026, 6, 15)}, True),
        ({"until": "2026-06-14"}, False),
        ({"host": "h*"}, True),
        ({"host": "other"}, False),
        ({"where": "/etc/*"}, True),
        ({"where": "/opt/*"}, False),
        ({"kind": "file_missing"}, False),
    ],
)
def test_an_exception_covers_kind_host_and_place_until_its_day(entry, accepted):
    found = judged([finding()], accepted=[exception(**entry)])
    assert found["verdict"] == ("clean" if accepted else "drifted")
    assert bool(found["findings"][0]["accepted"]) is accepted


def test_an_expired_exception_is_named():
    found = judged([finding()], accepted=[exception(until="2026-06-01")])["findings"][0]
    assert found["expired"] == {"reason": "a trial", "until": "2026-06-01"}
    # One that is still good goes first.
    found = judged([finding()], accepted=[exception(until="2026-06-01"), exception(until="2026-07-01")])["findings"][0]
    assert (found["accepted"]["until"], found["expired"]) == ("2026-07-01", None)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"kind": "file_changed", "until": "2026-12-31"}, "has no reason"),
        ({"kind": "file_changed", "reason": "  ", "until": "2026-12-31"}, "has no reason"),
        ({"kind": "file_changed", "reason": "x"}, "has no until"),
        ({"reason": "x", "until": "2026-12-31"}, "has no kind"),
        (exception(until="soon"), "until soon: wanted a date"),
        (exception(kind="no_such"), "no kind of drift"),
        (exception(place="x"), "has place"),
        ("file_changed", "wanted kind, where, reason and until"),
    ],
)
def test_an_exception_that_is_not_whole_is_refused(entry, error):
    found = judged([finding()], accepted=[entry])
    assert found["verdict"] == "unknown"
    assert any(error in sentence for sentence in found["unknown"])
    assert not found["findings"][0]["accepted"]


def blind(task="T", role="vllm") -> dict:
    return {"event": "blind", "host": "h", "role": role, "task": task, "reason": "so"}


def test_a_blind_task_that_is_reviewed_is_fine():
    reviewed = [{"role": "vllm", "tasks": ["T", "U"], "why": "w"}]
    assert drift.blind_errors([blind(), blind("U"), changed()], reviewed) == []
    told = drift.blind_errors([blind("V"), blind("V"), blind("T", "other")], reviewed)
    assert [sentence.partition(" is not")[0] for sentence in told] == ['role vllm: task "V"', 'role other: task "T"']


SEEN = [{"event": "seen", "host": "h", "role": role, "task": "t"} for role in ("a", "b")]
RESULTS = {"m": {"findings": [finding()], "unknown": ["no nvidia-smi"], "facts": {"x": 1}}}


def look(events, results, roles=("a", "b")):
    return drift.look("h", events, results, [], roles)


def test_a_look_joins_all_that_is_known():
    findings, unknown, facts = look([*SEEN, changed(where="/etc/y")], RESULTS)
    assert [one["where"] for one in findings] == ["/etc/y", "/etc/x"]
    assert unknown == ["no nvidia-smi"]
    assert facts == {"m": {"x": 1}}


@pytest.mark.parametrize(
    ("events", "results", "unknown"),
    [
        (SEEN[:1], RESULTS, "not looked at: b; run the playbook without --tags"),
        (SEEN, {"m": None}, "m has not run on the host"),
        (SEEN, {"m": {"msg": "failed"}}, "m has not run on the host"),
        ([{"event": "failed", "role": "a", "task": "t", "message": "no"}], {"m": None}, 'role a: task "t" failed: no'),
        ([{"event": "unreachable", "message": "no route"}, *SEEN], {"m": None}, "not reached: no route"),
    ],
)
def test_what_was_not_looked_at_is_one_sentence(events, results, unknown):
    told = look(events, results)[1]
    assert told[0].startswith(unknown)
    assert len([one for one in told if one != "no nvidia-smi"]) == 1


def test_the_first_look_calls_nothing_new():
    host = judged([finding()])
    drift.compare(host, None, TIME)
    assert (host["compared_with"], host["findings"][0]["new"], host["gone"]) == (None, False, [])
    assert host["findings"][0]["since"] == TIME


def test_what_is_new_and_what_is_gone():
    before = judged([finding(), finding(where="/old")])
    drift.compare(before, None, "2026-06-01T00:00:00Z")
    now = judged([finding(found="else"), finding(where="/new")])
    drift.compare(now, {**before, "time": "2026-06-01T00:00:00Z"}, TIME)
    assert {one["where"]: (one["new"], one["since"]) for one in now["findings"]} == {
        "/etc/x": (False, "2026-06-01T00:00:00Z"),
        "/new": (True, TIME),
    }
    assert [one["where"] for one in now["gone"]] == ["/old"]
    assert now["compared_with"] == "2026-06-01T00:00:00Z"


def test_of_an_unknown_host_nothing_is_gone():
    before = judged([finding()])
    drift.compare(before, None, TIME)
    now = judged([], ["not reached"])
    drift.compare(now, {**before, "time": TIME}, TIME)
    assert now["gone"] == []


identities = st.sets(st.sampled_from([("file_changed", "a"), ("file_missing", "a"), ("file_changed", "b")]))


@given(identities, identities)
def test_new_kept_and_gone_are_all_there_is(earlier, later):
    before = judged([finding(kind, where) for kind, where in earlier])
    drift.compare(before, None, "2026-01-01T00:00:00Z")
    now = judged([finding(kind, where) for kind, where in later])
    drift.compare(now, {**before, "time": "2026-01-01T00:00:00Z"}, TIME)
    assert {drift.identity(one) for one in now["findings"] if one["new"]} == later - earlier
    assert {drift.identity(one) for one in now["gone"]} == earlier - later
    assert all((one["since"] == TIME) is one["new"] for one in now["findings"])


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        (["clean"], "clean", 0),
        (["clean", "drifted"], "drifted", 2),
        (["unknown", "drifted", "clean"], "unknown", 4),
        ([], "unknown", 4),
    ],
)
def test_the_verdict_of_a_run_is_the_worst_of_its_hosts(verdicts, verdict, code):
    hosts = {f"h{number}": {"verdict": one, "findings": []} for number, one in enumerate(verdicts)}
    made = drift.report(hosts, {}, TIME, 1.5)
    assert (made["schema"], made["verdict"], made["exit_code"]) == (1, verdict, code)


def test_sentences():
    assert drift.sentence(judged()) == "clean"
    assert drift.sentence(judged([finding(), finding(severity="note", where="n")])) == "drifted: file_changed at /etc/x"
    assert drift.sentence(judged([finding(), finding(where="b")])).endswith("(and 1 more)")
    assert drift.sentence(judged([], ["a", "b"])) == "unknown: a (and 1 more)"


def run(time=TIME, verdict="clean", **hosts) -> dict:
    hosts = hosts or {"h": judged([], ["x"] if verdict == "unknown" else [])}
    return drift.report(hosts, {}, time, None)


def test_a_history_keeps_the_newest(tmp_path):
    history = drift.History(str(tmp_path / "d"))
    for minute in (3, 1, 2):
        history.save(run(f"2026-06-15T12:0{minute}:00Z"), "<html>", keep=2)
    assert history.names() == ["20260615T120300Z.json", "20260615T120200Z.json"]
    assert [one["time"] for one in history.reports()] == ["2026-06-15T12:03:00Z", "2026-06-15T12:02:00Z"]
    assert json.loads((tmp_path / "d/latest.json").read_text())["time"] == "2026-06-15T12:02:00Z"
    assert (tmp_path / "d/latest.html").read_text() == "<html>"
    assert stat.S_IMODE((tmp_path / "d/latest.json").stat().st_mode) == 0o600


def test_runs_of_one_second_are_all_kept_in_their_order(tmp_path):
    history = drift.History(str(tmp_path))
    paths = [os.path.basename(history.save(run(), "", keep=20)) for _ in range(11)]
    assert history.names() == paths[::-1]


def test_what_does_not_belong_to_a_history_is_left_alone(tmp_path):
    history = drift.History(str(tmp_path))
    (tmp_path / "history").mkdir()
    (tmp_path / "history/notes.json").write_text("{}")
    (tmp_path / "history/20250101T000000Z.json").write_text("half a f")
    (tmp_path / "history/20250102T000000Z.json").write_text('{"schema": 99, "hosts": {}}')
    assert list(history.reports()) == []
    history.save(run(), "", keep=1)
    assert sorted(path.name for path in (tmp_path / "history").iterdir()) == ["20260615T120000Z.json", "notes.json"]


def test_a_history_that_is_not_there_yet_is_empty(tmp_path):
    assert list(drift.History(str(tmp_path / "none")).reports()) == []


def test_a_host_is_compared_with_its_last_whole_look():
    reports = [
        run("2026-06-14T00:00:00Z", h=judged([], ["away"]), other=judged()),
        run("2026-06-13T00:00:00Z", h=judged([finding()])),
        run("2026-06-12T00:00:00Z", h=judged()),
    ]
    previous = drift.previous_of(reports, ["h", "other", "new"])
    assert {name: host["time"] for name, host in previous.items()} == {
        "h": "2026-06-13T00:00:00Z",
        "other": "2026-06-14T00:00:00Z",
    }
    last = drift.last_of(reports, ["h", "new"])
    assert {name: (host["time"], host["verdict"]) for name, host in last.items()} == {
        "h": ("2026-06-14T00:00:00Z", "unknown")
    }


def test_files_are_replaced_all_together_or_not_at_all(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    target.chmod(0o600)
    drift.write({str(target): "new"}, mode=0o644)
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    with pytest.raises(OSError, match="No such file"):
        drift.write({str(target): "newer", str(tmp_path / "nowhere/x"): "newer"})
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_the_turn_of_a_host_is_that_of_its_last_report():
    reports = [{"time": TIME, "hosts": hosts} for hosts in ({"a": {"turn": 7}}, {"a": {"turn": 6}, "b": {}})]
    assert [drift.turn_of(reports, name) for name in "abc"] == [7, 0, 0]


def test_one_fact_is_told_once():
    units = [finding("unit_changed", f"{name}.service") for name in "abc"]
    exact = [finding("unit_not_active", "a.service", "critical"), finding("unit_not_enabled", "b.service")]
    gpus = [finding("gpu_settings_changed", "cuda: Set"), finding("gpu_setting", "GPU 0 mig")]
    kept = judged([*units, *exact, *gpus])["findings"]
    assert sorted(map(drift.identity, kept)) == sorted(map(drift.identity, [units[2], *exact, gpus[1]]))
    assert len(judged(gpus[:1])["findings"]) == 1


def test_each_role_that_refuses_is_a_finding():
    found = drift.refusals({"gpu_preflight": ["no room", "no room"], "cuda": []})
    assert [(one["kind"], one["where"], one["found"]) for one in found] == [
        ("deploy_refused", "gpu_preflight", "no room")
    ]


@pytest.mark.parametrize("value", ["all", {"kind": "file_changed"}, 3])
def test_exceptions_that_are_no_list_are_told(value):
    assert drift.accepted_errors(value) == [f"vllm_drift_accepted is {value}: wanted a list of exceptions"]
    assert judged([finding()], accepted=value)["verdict"] == "unknown"


def test_an_exception_of_odd_types_is_told_and_breaks_nothing():
    odd = {"kind": ["file_changed"], "reason": 1, "until": datetime.datetime(2026, 6, 15, 10), 5: "x"}
    assert len(drift.accepted_errors([odd])) == 2
    assert judged([finding()], accepted=[exception(until=odd["until"])])["verdict"] == "clean"


@pytest.mark.parametrize(
    "damage",
    [
        lambda host: host.pop("findings"),
        lambda host: host.update(verdict="well"),
        lambda host: host.update(findings=["x"]),
        lambda host: host["findings"][0].pop("since"),
        lambda host: host["findings"][0].update(severity="bad"),
    ],
)
def test_a_damaged_host_of_the_history_is_passed_over(tmp_path, damage):
    history = drift.History(str(tmp_path))
    hosts = {name: {**judged([finding()]), "facts": {}} for name in ("a", "b")}
    made = drift.report(hosts, {}, TIME, 1.0)
    damage(made["hosts"]["b"])
    history.save(made, "", 5)
    (kept,) = history.reports()
    assert list(kept["hosts"]) == ["a"]


@pytest.mark.parametrize("kind", drift.KINDS)
def test_every_kind_is_documented_as_it_is(kind):
    severity, meaning, remedy = drift.KINDS[kind]
    page = (pathlib.Path(__file__).parents[4] / "docs/drift.md").read_text()
    assert f"| `{kind}` | {severity} | {meaning} | {remedy} |\n" in page + "\n"
