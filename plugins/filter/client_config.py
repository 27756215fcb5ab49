# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The configuration of the agent platform, from what the servers declare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.nvl.vllm.plugins.module_utils._client_config import (
    ClientConfigError,
    Wanted,
    client_config,
)

DOCUMENTATION = r"""
name: client_config
short_description: The configuration of the agent platform, from what the servers declare
version_added: 0.1.0
description:
  - Works out endpoints, timeouts, window and concurrency for one client host, and checks the result against the JSON
    schema of role C(agentic_client).
  - Fails with a sentence for each mistake.
author: The nvl.vllm authors
requirements:
  - jsonschema on the controller
positional: _input, client, clients, wanted
options:
  _input:
    description: Facts of the servers, as role C(agentic_client) collects them.
    type: list
    elements: dict
    required: true
  client:
    description: Name of the client host.
    type: str
    required: true
  clients:
    description: Number of client hosts.
    type: int
    required: true
  wanted:
    description: Variables of role C(agentic_client), without their prefix.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what would be written
  ansible.builtin.debug:
    msg: "{{ (servers | nvl.vllm.client_config(inventory_hostname, 1, {'mode': 'gateway'})).config }}"
"""

RETURN = r"""
_value:
  description: C(config) as the file has it (times in seconds, lengths in tokens), and C(reasons) of its numbers.
  type: dict
"""

SCHEMA = Path(__file__).resolve().parents[2] / "roles/agentic_client/files/config.schema.json"


def checked(
    servers: Sequence[Mapping[str, Any]], client: str, clients: int, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration, valid by its schema. Raises AnsibleFilterError."""
    try:
        import jsonschema
    except ImportError as error:
        raise AnsibleFilterError(
            "role agentic_client needs jsonschema on the controller: pip install jsonschema"
        ) from error
    try:
        made = client_config(client, servers, clients, Wanted(**wanted))
        jsonschema.validate(made["config"], json.loads(SCHEMA.read_text()))
    except ClientConfigError as error:
        raise AnsibleFilterError(str(error)) from error
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        raise AnsibleFilterError(f"{client}: {where} is {error.instance!r}: {error.message}") from error
    return made


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"client_config": checked}
