# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Prints the status of hosts and nothing else."""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible.utils.color import ANSIBLE_COLOR
from ansible_collections.nvl.vllm.plugins.module_utils._status import screen

DOCUMENTATION = r"""
name: screen
type: stdout
short_description: Prints the status of hosts and nothing else
version_added: 0.1.0
description:
  - For C(playbooks/status.yml) and C(watch). Prints what M(nvl.vllm.status) found when the playbook ends, and of
    another task only that it failed.
author: The nvl.vllm authors
requirements:
  - Choose it for one run with C(ANSIBLE_STDOUT_CALLBACK=nvl.vllm.screen).
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Collects, and prints at the end."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "nvl.vllm.screen"

    def __init__(self) -> None:
        super().__init__()
        self.hosts: dict[str, dict[str, Any]] = {}

    def v2_runner_on_ok(self, result: Any) -> None:
        if "instances" in result.result and "agent" in result.result:
            self.hosts[result.host.get_name()] = dict(result.result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self.hosts[result.host.get_name()] = {"msg": f"{result.task.get_name()}: {result.result.get('msg', 'failed')}"}

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self.v2_runner_on_failed(result)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._display.display(screen(self.hosts, bool(ANSIBLE_COLOR)) if self.hosts else "No host to look at.")
