# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Records what check mode tells of each host, for the module nvl.vllm.drift_report."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ansible import constants
from ansible.plugins.callback import CallbackBase
from ansible.utils.vars import load_options_vars
from ansible_collections.nvl.vllm.plugins.module_utils._drift_record import (
    blind_reason,
    changes,
    failure,
    record_path,
    short,
    starred,
)

DOCUMENTATION = r"""
name: drift
type: aggregate
short_description: Records what check mode tells of each host
version_added: 0.1.0
description:
  - Writes what tasks in check mode would change, which of them failed and which were not looked at, into a file in
    Ansible's own temporary directory of the run. M(nvl.vllm.drift_report) reads it; it is gone when the run ends.
  - Secrets in differences are hidden. Nothing is taken from results that are hidden by C(no_log) but the path of the
    file that the task is about.
  - Is active only in plays that are in check mode (C(check_mode), true) and ask for it with the variable
    C(__vllm_drift_recorded). There C(ansible_check_mode) is true, too, as with C(--check); Ansible alone sets it from
    the command line only.
author: The nvl.vllm authors
requirements:
  - Enable it with C(callbacks_enabled = nvl.vllm.drift) in C(ansible.cfg).
"""

#: What the collection's own roles are called by, inside of it.
COLLECTION = "nvl.vllm."
CHECK_MODE = "ansible_check_mode"


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Writes a line for each event; see :mod:`_drift_record` for what they hold."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "nvl.vllm.drift"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        #: What the command line says of check mode.
        self.check_mode: bool | None = None
        self.seen: set[tuple[str, str]] = set()
        self.aliases: dict[str, list[str]] = {}

    def v2_playbook_on_play_start(self, play: Any) -> None:
        options = load_options_vars(None)
        if self.check_mode is None:
            self.check_mode = bool(options[CHECK_MODE])
        self.recording = play.check_mode is True and play.get_vars().get("__vllm_drift_recorded") is True
        options[CHECK_MODE] = self.recording or self.check_mode
        if self.recording:
            self._write([{"event": "play", "time": time.time()}])

    # A task with a loop tells of each item first, and then of all together.

    def v2_runner_item_on_ok(self, result: Any) -> None:
        self._changed(result)

    def v2_runner_item_on_skipped(self, result: Any) -> None:
        self._skipped(result)

    def v2_runner_on_ok(self, result: Any) -> None:
        self._looked(result)
        if not self._looped(result):
            self._changed(result)

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._looked(result)
        if not self._looped(result):
            self._skipped(result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._looked(result)
        self._event(result, "failed", message=failure(result.result))

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._event(result, "unreachable", message=failure(result.result))

    def _looped(self, result: Any) -> bool:
        """Whether this is the sum of items that were told of before."""
        return bool(result.result.get("results")) and (result.task.loop is not None)

    def _looked(self, result: Any) -> None:
        """That a role's own tasks ran, to tell a role without drift from one that was left out."""
        key = (result.host.get_name(), self._role(result.task))
        if self.recording and key not in self.seen and short(result.task.action) != "validate_argument_spec":
            self.seen.add(key)
            self._event(result, "seen")

    def _changed(self, result: Any) -> None:
        if not self.recording or not result.is_changed():
            return
        told = result.result
        arguments = result.task_fields.get("args") or {}
        if "censored" in told:
            arguments = {key: arguments[key] for key in ("dest", "path") if key in arguments}
        self._write(
            changes(
                result.host.get_name(),
                self._role(result.task),
                self._name(result.task),
                short(result.task.action),
                arguments,
                told,
            )
        )

    def _skipped(self, result: Any) -> None:
        if self.recording:
            reason = blind_reason(
                short(result.task.action), result.result, result.task.when, self._aliases_of(result.task)
            )
            if reason:
                self._event(result, "blind", reason=reason)

    def _event(self, result: Any, event: str, **more: str) -> None:
        if self.recording:
            host, task = result.host.get_name(), result.task
            self._write([{"event": event, "host": host, "role": self._role(task), "task": self._name(task), **more}])

    def _role(self, task: Any) -> str:
        role = task._role.get_name() if task._role else ""
        return str(role[len(COLLECTION) :] if role.startswith(COLLECTION) else role)

    def _name(self, task: Any) -> str:
        """The task's name as it is written, with a star for each variable in it: what the reviewed list holds."""
        written = task.get_ds()
        name = written.get("name") if isinstance(written, Mapping) else None
        return starred(str(name or task.name or task.action))

    def _aliases_of(self, task: Any) -> list[str]:
        """Variables of the task's role that hold more than a plain value and name check mode."""
        role = self._role(task)
        if role not in self.aliases:
            variables = task._role.get_vars(include_params=False) if task._role else {}
            names = re.compile(rf"\b{CHECK_MODE}\b")
            self.aliases[role] = [name for name, value in variables.items() if names.search(str(value))]
        return self.aliases[role]

    def _write(self, events: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
        handle = os.open(record_path(constants.DEFAULT_LOCAL_TMP), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(event) + "\n" for event in events)
