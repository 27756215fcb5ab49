# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Records what check mode tells of each host, for the module nvl.vllm.drift_report."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible import constants
from ansible.playbook.handler import Handler
from ansible.plugins.callback import CallbackBase
from ansible.utils.vars import load_options_vars
from ansible_collections.nvl.vllm.plugins.module_utils._drift import EXIT_CODES, UNKNOWN
from ansible_collections.nvl.vllm.plugins.module_utils._drift_record import (
    EVENTS,
    blind_reason,
    changes,
    failure,
    hide,
    short,
    starred,
)

DOCUMENTATION = r"""
name: drift
type: aggregate
short_description: Records what check mode tells of each host
version_added: 0.1.0
description:
  - Keeps in memory what tasks in check mode would change, which of them failed and which were not looked at.
    M(nvl.vllm.drift_report) reads it; it is gone when the run ends.
  - Secrets in differences are hidden. Nothing is taken from results that are hidden by C(no_log) but the path of the
    file that the task is about.
  - What it cannot note is kept, too, and makes the host unknown. A run that was to look at hosts and gave no verdict,
    as none is in the inventory or the report was left out, ends with 4.
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
#: The task that each host gets its verdict from.
VERDICT = "nvl.vllm.drift_verdict"
NO_VERDICT = (
    "Verdict  unknown: no host was judged; the inventory has no host in the groups that are looked at, or --limit, "
    "--tags or --skip-tags leave out all of them or the report"
)


def guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """Notes that a hook failed, which is no more than a warning to Ansible: what it was to note would be missing."""

    @functools.wraps(hook)
    def guard(self: CallbackModule, about: Any, *more: Any, **named: Any) -> None:
        try:
            hook(self, about, *more, **named)
        except Exception as error:
            self.lose(about, error)

    return guard


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Keeps an event for each thing that a task tells; see :mod:`_drift_record` for what they hold."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "nvl.vllm.drift"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        #: Whether a play of this playbook was to be recorded, and whether a host got its verdict.
        self.asked = False
        self.told = False
        #: What the command line says of check mode.
        self.check_mode: bool | None = None
        self.seen: set[tuple[str, str]] = set()
        self.aliases: dict[str, list[str]] = {}

    def v2_playbook_on_start(self, playbook: Any) -> None:
        EVENTS.clear()
        self.asked = self.told = False

    @guarded
    def v2_playbook_on_play_start(self, play: Any) -> None:
        options = load_options_vars(None)
        if self.check_mode is None:
            self.check_mode = bool(options[CHECK_MODE])
        self.recording = play.check_mode is True and play.get_vars().get("__vllm_drift_recorded") is True
        options[CHECK_MODE] = self.recording or self.check_mode
        if self.recording:
            self.asked = True
            self._keep([{"event": "play", "time": time.time()}])

    def v2_playbook_on_stats(self, stats: Any) -> None:
        if self.asked and not self.told:
            self._display.display(NO_VERDICT, color=constants.COLOR_UNREACHABLE)
            # Nothing failed, so Ansible would end with 0; no other exception gets past it.
            raise SystemExit(EXIT_CODES[UNKNOWN])

    def lose(self, about: Any, error: Exception) -> None:
        """Note what a hook could not: of which host and task, as far as it can be told, and why."""
        event = {"event": "lost", "host": "", "role": "", "task": "", "message": type(error).__name__}
        EVENTS.append(event)
        # Each by itself, so that one which cannot be told leaves the others.
        told: dict[str, Callable[[], str]] = {
            "message": lambda: hide(f"{type(error).__name__}: {error}"),
            "host": lambda: str(about.host.get_name()),
            "role": lambda: self._role(about.task),
            "task": lambda: self._name(about.task),
        }
        for key, read in told.items():
            with contextlib.suppress(Exception):
                event[key] = read()

    # A task with a loop tells of each item first, and then of all together.

    @guarded
    def v2_runner_item_on_ok(self, result: Any) -> None:
        self._changed(result)

    @guarded
    def v2_runner_item_on_skipped(self, result: Any) -> None:
        self._skipped(result)

    @guarded
    def v2_runner_on_ok(self, result: Any) -> None:
        self._looked(result)
        if not self._looped(result):
            self._changed(result)

    @guarded
    def v2_runner_on_skipped(self, result: Any) -> None:
        self._looked(result)
        if not self._looped(result):
            self._skipped(result)

    @guarded
    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._looked(result)
        self._event(result, "failed", message=failure(result.result))

    @guarded
    def v2_runner_on_unreachable(self, result: Any) -> None:
        self.told = self.told or result.task.action == VERDICT
        self._event(result, "unreachable", message=failure(result.result))

    def _looped(self, result: Any) -> bool:
        """Whether this is the sum of items that were told of before."""
        return bool(result.result.get("results")) and (result.task.loop is not None)

    def _looked(self, result: Any) -> None:
        """That a role's own tasks ran, to tell a role without drift from one that was left out."""
        self.told = self.told or result.task.action == VERDICT
        key = (result.host.get_name(), self._role(result.task))
        if self.recording and key not in self.seen and short(result.task.action) != "validate_argument_spec":
            self.seen.add(key)
            self._event(result, "seen")

    def _counts(self, result: Any) -> bool:
        """Whether this is to be noted. What a handler does follows from a change that is told already."""
        return self.recording and not isinstance(result.task, Handler)

    def _changed(self, result: Any) -> None:
        if not self._counts(result) or not result.is_changed():
            return
        told = result.result
        arguments = result.task_fields.get("args") or {}
        if "censored" in told:
            arguments = {key: arguments[key] for key in ("dest", "path") if key in arguments}
        self._keep(
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
        if self._counts(result):
            reason = blind_reason(
                short(result.task.action), result.result, result.task.when, self._aliases_of(result.task)
            )
            if reason:
                self._event(result, "blind", reason=reason)

    def _event(self, result: Any, event: str, **more: str) -> None:
        if self.recording:
            host, task = result.host.get_name(), result.task
            self._keep([{"event": event, "host": host, "role": self._role(task), "task": self._name(task), **more}])

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

    def _keep(self, events: Iterable[dict[str, Any]]) -> None:
        # Through JSON, so that nothing is kept which the report cannot write.
        EVENTS.extend([json.loads(json.dumps(event)) for event in events])
