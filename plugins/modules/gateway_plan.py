#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Work out the gateway's numbers from the engines' arguments."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_plan
short_description: Work out the gateway's numbers from the engines' arguments
version_added: 0.1.0
description:
  - Buffers, limits and timeouts of the gateway (HAProxy), each with a sentence that says why, and the hashes of the
    clients' keys.
  - Every mistake is in the message. Each sentence names the variable, the value found and what is wanted.
  - Touches no host. Run it on the controller, so that keys which are given in clear do not reach hosts.
author: The nvl.vllm authors
options:
  inventory_hostname:
    description: Name of the host, for messages.
    type: str
    required: true
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  instances:
    description: The instances of C(vllm_declared), each with C(name), C(url) and C(arguments).
    type: list
    elements: dict
    required: true
  host:
    description: Address that the gateway listens on. Beyond loopback a key is required.
    type: str
    default: 127.0.0.1
  port:
    description: Port that the gateway listens on.
    type: int
    default: 8000
  affinity:
    description: C(none) or C(session).
    type: str
    default: none
  queue:
    description: Requests that may wait for an engine.
    type: int
    default: 256
  queue_timeout:
    description: Time (s) that a request may wait for an engine.
    type: int
    default: 300
  max_model_len:
    description: Tokens of the longest request, for engines whose arguments do not say it. 0 for none.
    type: int
    default: 0
  body_limit:
    description: Largest body (bytes). 0 for what follows from the engines' arguments.
    type: int
    default: 0
  server_timeout:
    description: Time (s) without a byte from an engine. 0 for what follows from the engines' arguments.
    type: int
    default: 0
  retry_after:
    description: Time (s) after which clients that were refused are asked to come back.
    type: int
    default: 5
  tls:
    description: C(off), C(files) or C(self_signed).
    type: str
    default: "off"
  tls_certificate:
    description: Certificate with its chain, as the path of a PEM file on the host, or as text.
    type: str
    default: ""
  tls_key:
    description: Private key, as the path of a PEM file on the host, or as text.
    type: str
    default: ""
  keys:
    description: Keys of clients, each with C(sha256) or C(key). Several are valid at once.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the key in the log.
        type: str
        required: true
      sha256:
        description: Hash of the key (hexadecimal).
        type: str
      key:
        description: The key itself; only its hash is returned.
        type: str
  api_key:
    description: Key of the engines. Without O(keys) clients use it too.
    type: str
    default: ""
attributes:
  check_mode:
    support: full
    description: Changes nothing at any time.
  diff_mode:
    support: none
    description: Changes nothing.
  idempotent:
    support: full
    description: The same input gives the same result.
"""

EXAMPLES = r"""
- name: Plan the gateway (on the controller)
  nvl.vllm.gateway_plan:
    inventory_hostname: "{{ inventory_hostname }}"
    device: cuda
    instances: "{{ vllm_declared.instances }}"
    keys:
      - name: team-a
        sha256: 3b3f1c1bd1ea6a0d1b7b5a1b0f6a3ce3c5e4a1f0f7e5f7a6b9cbb0a3f6d9b7c1
  delegate_to: localhost
"""

RETURN = r"""
plan:
  description: What the configuration is made from. Times in seconds, sizes in bytes.
  returned: success
  type: dict
  contains:
    bind: {description: Address and port., type: str, sample: "127.0.0.1:8000"}
    servers: {description: Each engine's name, address, maxconn and maxqueue., type: list, elements: dict}
    bufsize: {description: Size of a buffer., type: int, sample: 2097152}
    body_limit: {description: Largest body that is taken., type: int, sample: 2064384}
    maxconn: {description: Connections of clients., type: int}
    queue: {description: Requests that may wait., type: int}
    worst_memory: {description: What all buffers take with the largest body in every request., type: int}
    open_files: {description: Open files that the unit is allowed., type: int}
    timeouts: {description: By HAProxy's names., type: dict}
    keys: {description: Lines of SHA-256 and name., type: list, elements: str}
    key_names: {description: Names of the keys., type: list, elements: str}
    reasons: {description: Why each number is what it is., type: dict}
    warnings: {description: What is allowed and still worth a thought., type: list, elements: str}
errors:
  description: Every mistake, one sentence each.
  returned: failure
  type: list
  elements: str
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._gateway import Wanted, plan


def main():
    module = AnsibleModule(
        argument_spec={
            "inventory_hostname": {"type": "str", "required": True},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "instances": {"type": "list", "elements": "dict", "required": True},
            "host": {"type": "str", "default": "127.0.0.1"},
            "port": {"type": "int", "default": 8000},
            "affinity": {"type": "str", "default": "none"},
            "queue": {"type": "int", "default": 256},
            "queue_timeout": {"type": "int", "default": 300},
            "max_model_len": {"type": "int", "default": 0},
            "body_limit": {"type": "int", "default": 0},
            "server_timeout": {"type": "int", "default": 0},
            "retry_after": {"type": "int", "default": 5},
            "tls": {"type": "str", "default": "off"},
            "tls_certificate": {"type": "str", "default": ""},
            "tls_key": {"type": "str", "default": "", "no_log": True},
            "keys": {
                "type": "list",
                "elements": "dict",
                "default": [],
                # The list as a whole is no secret: names and hashes are in the result.
                "no_log": False,
                "options": {
                    "name": {"type": "str", "required": True},
                    "sha256": {"type": "str"},
                    "key": {"type": "str", "no_log": True},
                },
            },
            "api_key": {"type": "str", "default": "", "no_log": True},
        },
        supports_check_mode=True,
    )
    params = dict(module.params)
    made, errors = plan(
        Wanted(**{key: value for key, value in params.items() if key != "instances"}), params["instances"]
    )
    if made is None:
        module.fail_json(msg="\n".join(errors), errors=errors)
    assert made is not None  # fail_json does not return
    for warning in made.warnings:
        module.warn(warning)
    module.exit_json(changed=False, plan=asdict(made))


if __name__ == "__main__":
    main()
