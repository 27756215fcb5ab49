#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Check what the operator declares and work out every instance from it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: declaration
short_description: Check what the operator declares and work out every instance from it
version_added: 0.1.0
description:
  - Checks names, ports, GPUs, profiles, environment variables and every engine argument against what
    the pinned vLLM knows, and lays the arguments of profile and instance over each other.
  - Reads nothing but its arguments, so it runs on the controller before any host is touched.
  - All mistakes are reported at once, each with variable, value, what is wanted and host.
author: The nvl.vllm authors
options:
  inventory_hostname:
    description: Host that the declaration is for; it begins each error.
    type: str
    required: true
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  version:
    description: Version of vLLM that O(help_text) was captured from.
    type: str
    required: true
  help_text:
    description: Output of C(vllm serve --help=all) of that version.
    type: str
    required: true
  host:
    description: Address that the engines listen on.
    type: str
    required: true
  home:
    description: Home directory of the engines' user.
    type: path
    required: true
  model_path:
    description: Directory of the checkpoint.
    type: path
    required: true
  served_model_name:
    description: Name under which clients ask for the model.
    type: str
    required: true
  api_key:
    description: Key that clients must send; empty for none.
    type: str
    default: ""
  instances:
    description:
      - List of instances, each with C(name), C(port), C(gpus) and optionally C(profile), C(arguments) and
        C(environment).
    type: raw
    required: true
  profile:
    description: Profile of the instances that name none.
    type: str
    required: true
  profiles:
    description: Named sets of engine arguments.
    type: dict
    required: true
  arguments:
    description: Engine arguments of all instances.
    type: dict
    default: {}
  environment_variables:
    description: Environment variables of all engines.
    type: dict
    default: {}
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
  diff_mode:
    support: none
    description: Changes nothing.
  idempotent:
    support: full
    description: The same declaration gives the same instances.
"""

EXAMPLES = r"""
- name: Check the declaration
  nvl.vllm.declaration:
    inventory_hostname: "{{ inventory_hostname }}"
    device: cuda
    version: 0.32.0
    help_text: "{{ lookup('ansible.builtin.file', 'vllm-serve-help-0.32.0.txt') }}"
    host: 127.0.0.1
    home: /var/lib/vllm
    model_path: /srv/models/gpt-oss-120b
    served_model_name: gpt-oss-120b
    instances: "{{ vllm_instances }}"
    profile: guide
    profiles: "{{ vllm_profiles }}"
  delegate_to: localhost
"""

RETURN = r"""
instances:
  description: The complete instances, in the order declared.
  returned: success
  type: list
  elements: dict
  contains:
    name: {description: Name of the instance., type: str}
    unit: {description: systemd unit., type: str}
    port: {description: TCP port., type: int}
    url: {description: Base URL as seen on the host., type: str}
    gpus: {description: GPU indexes or UUIDs as declared., type: list}
    profile: {description: Name of the profile., type: str}
    arguments: {description: Engine arguments for vLLM's configuration file., type: dict}
    environment: {description: Environment of the engine without key and GPUs., type: dict}
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._declaration import Declaration, resolve
from ansible_collections.nvl.vllm.plugins.module_utils._serve_help import ServeOptions


def main():
    module = AnsibleModule(
        argument_spec={
            "inventory_hostname": {"type": "str", "required": True},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "version": {"type": "str", "required": True},
            "help_text": {"type": "str", "required": True},
            "host": {"type": "str", "required": True},
            "home": {"type": "path", "required": True},
            "model_path": {"type": "path", "required": True},
            "served_model_name": {"type": "str", "required": True},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "instances": {"type": "raw", "required": True},
            "profile": {"type": "str", "required": True},
            "profiles": {"type": "dict", "required": True},
            "arguments": {"type": "dict", "default": {}},
            "environment_variables": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = dict(module.params)
    try:
        options = ServeOptions.parse(params.pop("help_text"))
    except ValueError as problem:
        host, version = params["inventory_hostname"], params["version"]
        module.fail_json(msg=f"{host}: help_text for vLLM {version} is {problem}")
    declared = Declaration(environment=params.pop("environment_variables"), **params)
    instances, errors = resolve(declared, options)
    if errors:
        module.fail_json(msg="\n".join(errors), errors=errors)
    module.exit_json(changed=False, instances=[asdict(instance) for instance in instances])


if __name__ == "__main__":
    main()
