# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Runs the module of the same name, which may take an hour, and shows how far it is."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.nvl.vllm.plugins.module_utils._progress import describe

MODULE = "nvl.vllm.checkpoint"
#: What the module writes on the host, removed when it ends. One a checkpoint would only hide that two runs meet.
PROGRESS = "/run/nvl-vllm/checkpoint.json"
#: Pauses (s) between two looks at the host: short at first, as a small checkpoint takes a moment.
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)

#: What a job's result has besides the module's own.
JOB_KEYS = ("ansible_job_id", "finished", "started", "results_file", "stderr", "stderr_lines", "stdout", "stdout_lines")


class ActionModule(ActionBase):  # type: ignore[misc]
    """In check mode the module itself; otherwise a job on the host that outlives the connection."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        if self._task.check_mode:
            result.update(self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars))
            return result
        arguments.setdefault("progress", PROGRESS)
        # The wrapper of Ansible's own asynchronous tasks takes its time limit from here.
        self._task.async_val = int(arguments.get("timeout", 86400))
        try:
            job = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars, wrap_async=True)
        finally:
            self._task.async_val = 0
        result.update(self._await(job, arguments["progress"], task_vars) if "ansible_job_id" in job else job)
        return result

    def _await(self, job: dict[str, Any], progress: str, task_vars: dict[str, Any] | None) -> dict[str, Any]:
        """The job's result, when it has one."""
        arguments = {"jid": job["ansible_job_id"], "_async_dir": os.path.dirname(job["results_file"])}
        host = (task_vars or {}).get("inventory_hostname", "")
        pauses = iter(PAUSES)
        pause = next(pauses)
        before: dict[str, Any] = {}
        since, shown = time.monotonic(), ""
        while True:
            time.sleep(pause)
            pause = next(pauses, PAUSES[-1])
            status: dict[str, Any] = self._execute_module(
                module_name="ansible.legacy.async_status", module_args=arguments, task_vars=task_vars
            )
            if status.get("finished") or status.get("failed"):
                self._execute_module(
                    module_name="ansible.legacy.async_status",
                    module_args=dict(arguments, mode="cleanup"),
                    task_vars=task_vars,
                )
                for key in (
                    "ansible_job_id",
                    "finished",
                    "started",
                    "results_file",
                    "stderr",
                    "stderr_lines",
                    "stdout",
                ):
                    status.pop(key, None)
                return status
            now = self._progress(progress)
            line = describe(now, before, time.monotonic() - since)
            if line and line != shown:
                self._display.display(f"  {host}: {line}")
            before, since, shown = now, time.monotonic(), line

    def _progress(self, path: str) -> dict[str, Any]:
        """What the module wrote last; empty where it has not begun or has ended."""
        found = self._low_level_execute_command(f"cat {path}", sudoable=True)
        try:
            counts = json.loads(found.get("stdout", ""))
        except ValueError:
            return {}
        return counts if isinstance(counts, dict) else {}
