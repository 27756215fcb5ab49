# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Judges what a drift run has found, shows it, and keeps it on the controller."""

from __future__ import annotations

import datetime
import json
import os
import time
from typing import Any

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible_collections.nvl.vllm.plugins.module_utils._drift import (
    CLEAN,
    DRIFTED,
    EXIT_CODES,
    UNKNOWN,
    History,
    judge,
    last_of,
    look,
    previous_of,
    refusal,
    report,
    sentence,
    write,
)
from ansible_collections.nvl.vllm.plugins.module_utils._drift_html import page, strips
from ansible_collections.nvl.vllm.plugins.module_utils._drift_output import prometheus, table
from ansible_collections.nvl.vllm.plugins.module_utils._drift_record import record_path

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
                "known_hosts": {"type": "list", "elements": "str", "required": True},
                "results": {"type": "dict", "required": True},
                "refusals": {"type": "str", "required": True},
                "roles": {"type": "list", "elements": "str", "required": True},
                "reviewed": {"type": "list", "elements": "dict", "required": True},
                "directory": {"type": "path", "required": True},
                "keep": {"type": "int", "default": 100},
                "textfile": {"type": "path", "default": ""},
            }
        )
        events = recorded()
        hostvars = (task_vars or {})["hostvars"]
        now = datetime.datetime.now(datetime.timezone.utc)
        hosts = {name: self._judged(name, events, hostvars[name], arguments, now.date()) for name in arguments["hosts"]}
        history = History(os.path.abspath(arguments["directory"]))
        reports = list(history.reports())
        began = [event["time"] for event in events or () if event["event"] == "play"]
        made = report(
            hosts,
            previous_of(reports, hosts),
            now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            round(time.time() - began[0], 1) if began else None,
        )
        problem = keep(history, made, reports, arguments)
        if problem:
            made.update(verdict=UNKNOWN, exit_code=EXIT_CODES[UNKNOWN])
            for host in made["hosts"].values():
                host.update(verdict=UNKNOWN, unknown=[*host["unknown"], problem])
        for line, verdict in table(made):
            self._display.display(line, color=COLOURS.get(verdict))
        if not problem:
            self._display.display(f"Report   {history.latest('html')}")
        verdicts = {
            name: {"verdict": host["verdict"], "sentence": sentence(host)} for name, host in made["hosts"].items()
        }
        result.update(changed=False, verdict=made["verdict"], hosts=verdicts, json=history.latest("json"))
        return result

    def _judged(
        self,
        name: str,
        events: list[dict[str, Any]] | None,
        variables: Any,
        arguments: dict[str, Any],
        today: datetime.date,
    ) -> dict[str, Any]:
        """What is known about one host, with its verdict."""
        if events is None:
            return judge(name, [], [NOT_ENABLED], {}, today)
        own = [event for event in events if event.get("host") == name]
        results = {module: variables.get(register) for module, register in arguments["results"].items()}
        findings, unknown, facts = look(name, own, results, arguments["reviewed"], arguments["roles"])
        refusals = variables.get(arguments["refusals"])
        if refusals:
            findings.append(refusal(refusals))
        settings = {key: variables.get(f"vllm_drift_{key}") for key in ("accepted", "severities")}
        return {**judge(name, findings, unknown, settings, today), "facts": facts}


def recorded() -> list[dict[str, Any]] | None:
    """What the callback wrote in this run; None where it did not run."""
    try:
        with open(record_path(constants.DEFAULT_LOCAL_TMP), encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except FileNotFoundError:
        return None


def keep(history: History, made: dict[str, Any], reports: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    """Write the report, and the text file for Prometheus where one is wanted; returns what is wrong, else nothing."""
    # A run with --limit looks at some hosts, and the files tell of all.
    latest = last_of([made, *reports], arguments["known_hosts"])
    try:
        history.save(made, page(made, strips([made, *reports])), arguments["keep"])
        if arguments["textfile"]:
            write(arguments["textfile"], prometheus(latest), mode=0o644)
    except OSError as error:
        return (
            f"the report cannot be kept: {error}; vllm_drift_directory and the directory of vllm_drift_textfile must "
            f"belong to the user who runs ansible-playbook"
        )
    return ""
