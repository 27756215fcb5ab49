# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Whether driver, CUDA toolkit and vLLM fit together. Each filter is documented in the file of its name."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.nvl.vllm.plugins.module_utils import _compatibility


def driver_complaint(driver_version: Any, vllm_version: Any) -> str:
    """Why a driver does not run a release of vLLM. Raises AnsibleFilterError for what cannot be judged."""
    try:
        return _compatibility.driver_complaint(str(vllm_version), str(driver_version))
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from error


def toolkit_complaint(toolkit: Any, driver_version: Any) -> str:
    """Why a driver may not run what a toolkit compiles. Raises AnsibleFilterError for what cannot be judged."""
    try:
        return _compatibility.toolkit_complaint(str(toolkit), str(driver_version))
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The filters for Ansible."""

    def filters(self) -> dict[str, Any]:
        return {"driver_complaint": driver_complaint, "toolkit_complaint": toolkit_complaint}
