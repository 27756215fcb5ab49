# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Judges what a drift run has found, shows it, and keeps it on the controller."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from typing import Any

from ansible import constants
from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.nvl.vllm.plugins.module_utils._drift import (
    CLEAN,
    DRIFTED,
    UNKNOWN,
    History,
    doubt,
    judge,
    last_of,
    look,
    previous_of,
    refusals,
    report,
    sentence,
    turn_of,
    write,
)
from ansible_collections.nvl.vllm.plugins.module_utils._drift_html import page, strips
from ansible_collections.nvl.vllm.plugins.module_utils._drift_output import prometheus, table
from ansible_collections.nvl.vllm.plugins.module_utils._drift_record import EVENTS

COLOURS = {CLEAN: constants.COLOR_OK, DRIFTED: constants.COLOR_ERROR, UNKNOWN: constants.COLOR_UNREACHABLE}
NOT_ENABLED = (
    "the callback nvl.vllm.drift is not enabled, so nothing was recorded: add callbacks_enabled = nvl.vllm.drift to "
    "[defaults] of ansible.cfg, or set ANSIBLE_CALLBACKS_ENABLED=nvl.vllm.drift"
)


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs on the controller, once for all hosts; reaches no host."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "hosts": {"type": "list", "elements": "str", "required": True},
                "expected": {"type": "dict", "required": True},
                "refusals": {"type": "str", "required": True},
                "reviewed": {"type": "list", "elements": "dict", "required": True},
                "directory": {"type": "path", "required": True},
                "keep": {"type": "int", "default": 100},
                "textfile": {"type": "path", "default": ""},
            }
        )
        variables = task_vars or {}
        now = datetime.datetime.now(datetime.timezone.utc)
        hosts = {name: judged(name, variables["hostvars"][name], arguments, now.date()) for name in arguments["hosts"]}
        history = History(os.path.abspath(arguments["directory"]))
        reports = list(history.reports())
        for name, host in hosts.items():
            # What was not reached was not read, and its part is still to come.
            host["turn"] = turn_of(reports, name) + bool(host["facts"])
        began = [event["time"] for event in EVENTS if event["event"] == "play"]
        made = report(
            hosts,
            previous_of(reports, hosts),
            now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            round(time.time() - began[0], 1) if began else None,
        )
        known = {name for group in arguments["expected"] for name in variables["groups"].get(group, ())}
        kept = keep(history, made, reports, known, arguments)
        for line, verdict in table(made):
            self._display.display(line, color=COLOURS.get(verdict))
        if kept:
            self._display.display(f"Report   {history.latest('html')}")
        verdicts = {
            name: {"verdict": host["verdict"], "sentence": sentence(host)} for name, host in made["hosts"].items()
        }
        result.update(changed=False, verdict=made["verdict"], hosts=verdicts, json=history.latest("json"))
        return result


def judged(name: str, variables: Any, arguments: dict[str, Any], today: datetime.date) -> dict[str, Any]:
    """What is known about one host, with its verdict."""
    if not EVENTS:
        return {**judge(name, [], [NOT_ENABLED], {}, today), "facts": {}}
    # What was lost before a host was known may be any host's.
    own = [event for event in EVENTS if event.get("host") in (name, "")]
    parts = [part for group, part in arguments["expected"].items() if group in variables["group_names"]]
    roles = [role for part in parts for role in part["roles"]]
    results = {module: variables.get(register) for part in parts for module, register in part["results"].items()}
    findings, unknown, facts = look(name, own, results, arguments["reviewed"], roles)
    findings += refusals(variables.get(arguments["refusals"]) or {})
    settings = {}
    for key in ("accepted", "severities"):
        try:
            settings[key] = variables.get(f"vllm_drift_{key}")
        except AnsibleError as error:
            unknown.append(f"vllm_drift_{key} cannot be read: {error}")
    return {**judge(name, findings, unknown, settings, today), "facts": facts}


def keep(
    history: History, made: dict[str, Any], reports: list[dict[str, Any]], known: set[str], arguments: dict[str, Any]
) -> bool:
    """Write the report, and the text file for Prometheus where one is wanted; returns whether there is a report.

    What cannot be written makes the report unknown, and what is written after it tells so.
    """

    def tell_prometheus() -> None:
        if arguments["textfile"]:
            # A run with --limit looks at some hosts, and the file tells of all.
            write({arguments["textfile"]: prometheus(last_of([made, *reports], known))}, mode=0o644)

    try:
        tell_prometheus()
    except OSError as error:
        doubt(
            made,
            f"the text file for Prometheus cannot be written: {error}; the directory of vllm_drift_textfile must be "
            "there, and belong to the user who runs ansible-playbook",
        )
    try:
        history.save(made, page(made, strips([made, *reports])), arguments["keep"])
    except OSError as error:
        doubt(
            made,
            f"the report cannot be kept: {error}; vllm_drift_directory must belong to the user who runs "
            "ansible-playbook, and there must be room",
        )
        with contextlib.suppress(OSError):
            tell_prometheus()
        return False
    return True
