# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Where prompts begin to differ."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.nvl.vllm.plugins.module_utils._doctor_prompts import difference

DOCUMENTATION = r"""
name: prompt_difference
short_description: Where prompts begin to differ
version_added: 0.1.0
description:
  - Prompts share in the prefix cache what is the same in them from their first character on.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: One JSON value a line, a prompt as a string or a request with C(messages).
    type: str
    required: true
  show:
    description: Whether to show the text at the first difference.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Show where they differ
  ansible.builtin.debug:
    msg: "{{ lookup('ansible.builtin.file', 'prompts.jsonl') | nvl.vllm.prompt_difference }}"
"""

RETURN = r"""
_value:
  description: One sentence, and with O(show) the text of two prompts around their first difference.
  type: str
"""


def prompt_difference(text: str, show: bool | str = False) -> str:
    """As documented above. What comes by --extra-vars is a string, and "false" must not show prompts."""
    try:
        return difference(text, boolean(show))
    except (TypeError, ValueError) as error:
        raise AnsibleFilterError(f"prompt_difference: {error}") from error


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"prompt_difference": prompt_difference}
