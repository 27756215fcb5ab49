# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""From what was found on each host to a verdict: severities, accepted exceptions, blind tasks, what is new.

Everything here is plain data in, plain data out, except :class:`History`, which keeps the reports on the controller.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ._drift_kinds import KINDS as HOST_KINDS
from ._drift_kinds import SEVERITIES, Kind

SCHEMA = 1
CLEAN, DRIFTED, UNKNOWN = "clean", "drifted", "unknown"
#: From the best to the worst; the last one that a host has is that of the run.
VERDICTS = (CLEAN, DRIFTED, UNKNOWN)
#: Of ansible-playbook, as Ansible makes them from failed and from unreachable hosts; the latter goes first.
EXIT_CODES = {CLEAN: 0, DRIFTED: 2, UNKNOWN: 4}

_DEPLOY = "put it into the inventory where it is meant; otherwise site.yml undoes it"

#: What the roles' tasks find in check mode.
CONFIGURATION: Mapping[str, Kind] = {
    "file_missing": Kind("critical", "A file or directory that a role writes is gone.", "run site.yml"),
    "file_changed": Kind("warning", "A file is not what a role writes.", _DEPLOY),
    "attributes_changed": Kind(
        "warning", "Owner, group, mode or type of a file is not what a role sets.", "run site.yml"
    ),
    "link_changed": Kind("critical", "A link leads elsewhere, so another release is in use.", "run site.yml"),
    "unit_changed": Kind("critical", "A unit is not in the declared state, or runs from other files.", "run site.yml"),
    "package_missing": HOST_KINDS["package_missing"],
    "release_missing": Kind("critical", "There is no release for the declared lock file.", "run site.yml"),
    "checkpoint_changed": Kind("critical", "The checkpoint is not the declared one, or not complete.", "run site.yml"),
    "driver_changed": Kind(
        "warning", "The driver's packages are not those that are declared.", "run playbooks/cuda.yml"
    ),
    "gpu_settings_changed": Kind(
        "warning", "The GPUs' settings are not those that are declared.", "run playbooks/cuda.yml"
    ),
    "deploy_refused": Kind(
        "warning",
        "site.yml would refuse this host before it changes anything.",
        "mend what it names, then run site.yml",
    ),
    "configuration_changed": Kind("warning", "Another task of a role would change something.", "run site.yml"),
}
KINDS: Mapping[str, Kind] = {**HOST_KINDS, **CONFIGURATION}

_BY_ACTION = {
    "systemd_service": "unit_changed",
    "nvl.vllm.units": "unit_changed",
    "apt": "package_missing",
    "nvl.vllm.venv": "release_missing",
    "nvl.vllm.checkpoint": "checkpoint_changed",
    "nvl.vllm.driver_packages": "driver_changed",
    "nvl.vllm.gpu_settings": "gpu_settings_changed",
}
_FILES = ("template", "copy", "file")
_BY_SHAPE = {"missing": "file_missing", "content": "file_changed", "attributes": "attributes_changed"}
_FOUND = {
    "file_missing": "it is not there",
    "file_changed": "its content is another one",
    "attributes_changed": "its attributes are others",
    "link_changed": "it leads elsewhere",
    "package_missing": "not installed",
    "release_missing": "it is not there",
    "checkpoint_changed": "files are missing or changed",
}


def kind_of(event: Mapping[str, Any]) -> str:
    """The kind of a change that a task would make."""
    action = event["action"]
    if action in _FILES:
        if action == "file" and re.search(r"(?m)^[-+]src: ", event.get("diff", "")):
            return "link_changed"
        # Without a difference: it is hidden, as the file holds secrets.
        return _BY_SHAPE.get(event.get("shape", ""), "file_changed")
    return _BY_ACTION.get(action, "configuration_changed")


def finding_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """The finding that a change makes. ``where`` is the task where it names no file or unit."""
    kind = kind_of(event)
    found = event.get("found") or _FOUND.get(kind, "the task would change something")
    if event["action"] in _FILES and event.get("shape") == "hidden":
        found = "it is not as declared (the difference is not shown, as it can hold secrets)"
    finding = {
        "kind": kind,
        "severity": KINDS[kind].severity,
        "source": "configuration",
        "where": event.get("where") or f"{event['role']}: {event['task']}",
        "found": found,
        "wanted": event.get("wanted") or f"as role {event['role']} declares it",
        "remedy": KINDS[kind].remedy,
        "task": f"{event['role']}: {event['task']}",
    }
    diff = event.get("diff", "")
    if kind in ("attributes_changed", "link_changed") and diff:
        # Short enough to be told in words.
        for key, sign in (("found", "-"), ("wanted", "+")):
            finding[key] = ", ".join(line[1:] for line in diff.splitlines() if line.startswith(sign)) or finding[key]
    elif diff and kind != "file_missing":
        finding["diff"] = diff
    return finding


def refusals(objections: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The findings that the objections of roles make, one for each role, by its name."""
    known = KINDS["deploy_refused"]
    return [
        {
            "kind": "deploy_refused",
            "severity": known.severity,
            "source": "configuration",
            "where": role,
            "found": "; ".join(dict.fromkeys(sentences)),
            "wanted": f"nothing that role {role} objects to",
            "remedy": known.remedy,
        }
        for role, sentences in objections.items()
        if sentences
    ]


def severity_errors(severities: Any) -> list[str]:
    """What is wrong with ``vllm_drift_severities``, one sentence each."""
    if not isinstance(severities, Mapping):
        return [f"vllm_drift_severities is {severities}: wanted severities by kind, such as unit_restarts: note"]
    errors = []
    for kind, severity in severities.items():
        if kind not in KINDS:
            errors.append(f"vllm_drift_severities names {kind}, which is no kind of drift: docs/drift.md lists them")
        if severity not in SEVERITIES:
            errors.append(f"vllm_drift_severities has {severity} for {kind}: wanted {', '.join(SEVERITIES)}")
    return errors


def accepted_errors(accepted: Any) -> list[str]:
    """What is wrong with ``vllm_drift_accepted``, one sentence each. What is wrong accepts nothing."""
    if not isinstance(accepted, list):
        return [f"vllm_drift_accepted is {accepted}: wanted a list of exceptions"]
    return [error for number, entry in enumerate(accepted) for error in _entry_errors(number, entry)]


def _entry_errors(number: int, entry: Any) -> list[str]:
    name = f"vllm_drift_accepted[{number}]"
    if not isinstance(entry, Mapping):
        return [f"{name} is {entry}: wanted kind, where, reason and until"]
    errors = [
        f"{name} has no {key}: give it one"
        for key in ("kind", "reason", "until")
        if not str(entry.get(key) or "").strip()
    ]
    unknown = sorted(map(str, set(entry) - {"host", "kind", "where", "reason", "until"}))
    errors += [f"{name} has {key}: wanted host, kind, where, reason and until only" for key in unknown]
    kind = entry.get("kind")
    if kind and str(kind) not in KINDS:
        errors.append(f"{name} has kind {kind}, which is no kind of drift: docs/drift.md lists them")
    if entry.get("until") and _date(entry["until"]) is None:
        errors.append(f"{name} has until {entry['until']}: wanted a date such as 2026-12-31")
    return errors


def _date(value: Any) -> datetime.date | None:
    """A date that YAML has read as one, or as text."""
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.datetime.strptime(str(value), "%Y-%m-%d").date()
    except ValueError:
        return None


def acceptance(
    host: str, finding: Mapping[str, Any], accepted: Iterable[Any], today: datetime.date
) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """The exception that covers a finding, and one that did and has expired; None where there is none.

    The day of ``until`` is the last one that counts. Among several the one that lasts longest is taken.
    """
    covering = []
    for number, entry in enumerate(accepted):
        if _entry_errors(number, entry):
            continue
        matches = (
            entry["kind"] == finding["kind"]
            and fnmatch.fnmatchcase(host, str(entry.get("host") or "*"))
            and fnmatch.fnmatchcase(finding["where"], str(entry.get("where") or "*"))
        )
        until = _date(entry["until"])
        if matches and until is not None:
            covering.append((until, {"reason": str(entry["reason"]), "until": until.isoformat()}))
    if not covering:
        return None, None
    until, found = max(covering, key=lambda one: one[0])
    return (found, None) if today <= until else (None, found)


def blind_errors(events: Iterable[Mapping[str, Any]], reviewed: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each task that check mode does not look at and that nobody has reviewed."""
    known = {(entry["role"], task) for entry in reviewed for task in entry["tasks"]}
    sentences = [
        f'role {event["role"]}: task "{event["task"]}" is not looked at: {event["reason"]}; let check mode look at '
        f"it, or review it in __vllm_drift_blind of role vllm_drift"
        for event in events
        if event["event"] == "blind" and (event["role"], event["task"]) not in known
    ]
    return list(dict.fromkeys(sentences))


def look(
    host: str,
    events: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    reviewed: Iterable[Mapping[str, Any]],
    roles: Iterable[str],
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """What is known about one host: findings, what could not be looked at, facts.

    ``events`` are those of the callback for this host, ``results`` the results of the modules that ran on it, by name.
    A host that was not reached has one sentence, as all others would follow from it.
    """
    findings = [finding_of(event) for event in events if event["event"] == "changed"]
    lost = [
        f'role {event["role"]}: what task "{event["task"]}" told could not be noted: {event["message"]}'
        for event in events
        if event["event"] == "lost"
    ]
    unreachable = [event["message"] for event in events if event["event"] == "unreachable"]
    if unreachable:
        return findings, [f"not reached: {unreachable[0]}", *lost], {}
    unknown = lost + [
        f'role {event["role"]}: task "{event["task"]}" failed: {event["message"]}'
        for event in events
        if event["event"] == "failed"
    ]
    seen = {event["role"] for event in events if event["event"] == "seen"}
    missing = [role for role in roles if role not in seen]
    # After a failure of the declaration no role could begin.
    if missing and not unknown:
        unknown.append(
            f"not looked at: {', '.join(missing)}; run the playbook without --tags, --skip-tags and --start-at-task"
        )
    unknown += blind_errors(events, reviewed)
    facts: dict[str, Any] = {}
    for name, result in results.items():
        if not isinstance(result, Mapping) or not isinstance(result.get("findings"), list):
            if not unknown:
                unknown.append(f"{name} has not run on the host")
            continue
        findings += [dict(finding) for finding in result["findings"]]
        unknown += map(str, result.get("unknown") or ())
        facts[name] = result.get("facts") or {}
    return findings, list(dict.fromkeys(unknown)), facts


#: Kinds that say no more than others which are found with them: at the same place, and of the host.
_SAME_PLACE = {"unit_changed": ("unit_not_active", "unit_not_enabled")}
_SAME_HOST = {"gpu_settings_changed": ("gpu_setting",)}


def told_once(findings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The findings without those that tell what another one tells more exactly."""
    places = {identity(finding) for finding in findings}
    kinds = {finding["kind"] for finding in findings}
    return [
        finding
        for finding in findings
        if not any((kind, finding["where"]) in places for kind in _SAME_PLACE.get(finding["kind"], ()))
        and kinds.isdisjoint(_SAME_HOST.get(finding["kind"], ()))
    ]


def judge(
    host: str,
    findings: Iterable[Mapping[str, Any]],
    unknown: Sequence[str],
    settings: Mapping[str, Any],
    today: datetime.date,
) -> dict[str, Any]:
    """Verdict and findings of one host, the worst first, each finding once.

    ``settings``: ``accepted`` and ``severities`` of the host.
    """
    accepted, severities = settings.get("accepted") or [], settings.get("severities") or {}
    unknown = [*unknown, *accepted_errors(accepted), *severity_errors(severities)]
    accepted = accepted if isinstance(accepted, list) else []
    severities = severities if isinstance(severities, Mapping) else {}
    judged: dict[tuple[str, str], dict[str, Any]] = {}
    for found in told_once(list(findings)):
        finding = dict(found)
        severity = severities.get(finding["kind"])
        if severity in SEVERITIES:
            finding["severity"] = severity
        finding["accepted"], finding["expired"] = acceptance(host, finding, accepted, today)
        judged.setdefault(identity(finding), finding)
    ordered = sorted(judged.values(), key=lambda one: (SEVERITIES.index(one["severity"]), one["kind"], one["where"]))
    verdict = UNKNOWN if unknown else DRIFTED if any(map(counts, ordered)) else CLEAN
    return {"verdict": verdict, "findings": ordered, "unknown": list(unknown)}


def identity(finding: Mapping[str, Any]) -> tuple[str, str]:
    """What a finding of a host is known by from run to run."""
    return finding["kind"], finding["where"]


def counts(finding: Mapping[str, Any]) -> bool:
    """Whether a finding alone makes a host drifted."""
    return finding["severity"] != "note" and not finding["accepted"]


def compare(now: dict[str, Any], before: Mapping[str, Any] | None, time: str) -> None:
    """Marks in ``now`` what is new since ``before`` and adds what is gone. ``time`` is that of this run.

    ``before`` is the host in the last report in which all of it was looked at, with ``time``; None where there is none.
    """
    known = {identity(finding): finding for finding in before["findings"]} if before else {}
    for finding in now["findings"]:
        earlier = known.pop(identity(finding), None)
        finding["new"] = before is not None and earlier is None
        finding["since"] = earlier["since"] if earlier else time
    now["compared_with"] = before["time"] if before else None
    # What was not looked at is not gone.
    kept = ("kind", "severity", "source", "where", "since")
    gone = [] if now["verdict"] == UNKNOWN else known.values()
    now["gone"] = [{key: finding[key] for key in kept} for finding in gone]


def report(
    hosts: Mapping[str, dict[str, Any]], previous: Mapping[str, Mapping[str, Any]], time: str, seconds: float | None
) -> dict[str, Any]:
    """The whole report of a run, as docs/drift.md describes it."""
    for name, host in hosts.items():
        compare(host, previous.get(name), time)
    verdict = max((host["verdict"] for host in hosts.values()), key=VERDICTS.index, default=UNKNOWN)
    return {
        "schema": SCHEMA,
        "time": time,
        "seconds": seconds,
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "hosts": dict(hosts),
    }


def sentence(host: Mapping[str, Any]) -> str:
    """The verdict of a host in one sentence, for the place where Ansible shows it."""
    if host["verdict"] == UNKNOWN:
        more = len(host["unknown"]) - 1
        return f"unknown: {host['unknown'][0]}" + (f" (and {more} more)" if more else "")
    if host["verdict"] == CLEAN:
        return "clean"
    drifted = [finding for finding in host["findings"] if counts(finding)]
    first = f"{drifted[0]['kind']} at {drifted[0]['where']}"
    return f"drifted: {first}" + (f" (and {len(drifted) - 1} more)" if len(drifted) > 1 else "")


def doubt(report: dict[str, Any], sentence: str) -> None:
    """Makes a report, and each host in it, unknown for this reason."""
    report.update(verdict=UNKNOWN, exit_code=EXIT_CODES[UNKNOWN])
    for host in report["hosts"].values():
        host.update(verdict=UNKNOWN, unknown=[*host["unknown"], sentence])


_NAME = re.compile(r"\d{8}T\d{6}Z(?:-\d+)?\.json")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_TEXTS = ("kind", "where", "source", "since")


def _whole(host: Any) -> bool:
    """Whether a host of an earlier report has what is read of it later on."""
    return (
        isinstance(host, dict)
        and host.get("verdict") in VERDICTS
        and isinstance(host.get("findings"), list)
        and all(
            isinstance(finding, dict)
            and all(isinstance(finding.get(key), str) for key in _TEXTS)
            and finding.get("severity") in SEVERITIES
            and "accepted" in finding
            for finding in host["findings"]
        )
    )


class History:
    """The reports of earlier runs, a file each, in a directory that belongs to the user who runs the playbook."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.folder = os.path.join(directory, "history")

    def names(self) -> list[str]:
        """The files' names, the newest first."""
        try:
            found = [name for name in os.listdir(self.folder) if _NAME.fullmatch(name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=_age, reverse=True)

    def reports(self) -> Iterator[dict[str, Any]]:
        """The reports, the newest first. What is damaged, or of another schema, is passed over."""
        for name in self.names():
            try:
                with open(os.path.join(self.folder, name), encoding="utf-8") as stream:
                    found = json.load(stream)
            except (OSError, ValueError):
                continue
            if (
                isinstance(found, dict)
                and found.get("schema") == SCHEMA
                and isinstance(found.get("hosts"), dict)
                and _TIME.fullmatch(str(found.get("time")))
            ):
                yield {**found, "hosts": {name: host for name, host in found["hosts"].items() if _whole(host)}}

    def save(self, report: Mapping[str, Any], html: str, keep: int) -> str:
        """Write the report to the history and as latest.json and latest.html; returns the path in the history.

        Raises OSError where the directory cannot be written. What is there is as before then.
        """
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        text = json.dumps(report, indent=2, sort_keys=True) + "\n"
        stem = re.sub(r"[-:]", "", report["time"])
        taken, number = set(self.names()), 1
        name = f"{stem}.json"
        while name in taken:
            number += 1
            name = f"{stem}-{number}.json"
        path = os.path.join(self.folder, name)
        for old in self.names()[max(keep, 1) - 1 :]:
            # Another run may be at it, too.
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, old))
        write({path: text, self.latest("json"): text, self.latest("html"): html})
        return path

    def latest(self, suffix: str) -> str:
        """Path of the last report, ``json`` or ``html``."""
        return os.path.join(self.directory, f"latest.{suffix}")


def _age(name: str) -> tuple[str, int]:
    """Sorts the files of a history by time; several of one second by their number."""
    stem, _, number = name[: -len(".json")].partition("-")
    return stem, int(number or 1)


def previous_of(reports: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Each host in the newest report in which all of it was looked at, with that report's ``time``."""
    wanted, found = set(names), {}
    for one in reports:
        for name in sorted(wanted):
            host = one["hosts"].get(name)
            if host is not None and host["verdict"] != UNKNOWN:
                found[name] = {**host, "time": one["time"]}
                wanted.discard(name)
        if not wanted:
            break
    return found


def last_of(reports: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Each host as it was found last, whatever the verdict, with the report's ``time``."""
    wanted, found = set(names), {}
    for one in reports:
        for name in sorted(wanted & set(one["hosts"])):
            found[name] = {**one["hosts"][name], "time": one["time"]}
            wanted.discard(name)
        if not wanted:
            break
    return found


def turn_of(reports: Iterable[Mapping[str, Any]], name: str) -> int:
    """How often the disk of a host was looked at: which part of what is read in parts is the next."""
    turn = last_of(reports, [name]).get(name, {}).get("turn", 0)
    return turn if isinstance(turn, int) else 0


def write(texts: Mapping[str, str], mode: int = 0o600) -> None:
    """Replace files, by path, each in one step and none before all are on the disk. Raises OSError."""
    written: dict[str, str] = {}
    try:
        for path, text in texts.items():
            handle, written[path] = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".drift.")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(written[path], mode)
        for path, temporary in written.items():
            os.replace(temporary, path)
    except OSError:
        for temporary in written.values():
            # Some are in their place already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
