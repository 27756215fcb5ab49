# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Makes a host's verdict the state that Ansible shows and its exit code is made from."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.nvl.vllm.plugins.module_utils._drift import CLEAN, DRIFTED, UNKNOWN


class ActionModule(ActionBase):  # type: ignore[misc]
    """Clean is ok, drifted is failed (2), unknown is unreachable (4)."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "verdict": {"type": "str", "choices": [CLEAN, DRIFTED, UNKNOWN], "required": True},
                "sentence": {"type": "str", "required": True},
            }
        )
        result.update(changed=False, msg=arguments["sentence"])
        if arguments["verdict"] == DRIFTED:
            result["failed"] = True
        if arguments["verdict"] == UNKNOWN:
            result["unreachable"] = True
        return result
