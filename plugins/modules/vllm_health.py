#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Ask vLLM endpoints whether they are alive, serve, or make progress."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_health
short_description: Ask vLLM endpoints whether they are alive, serve, or make progress
version_added: 0.1.0
description:
  - Looks at all endpoints at the same time, at one of three depths, and fails when one is not well.
    The message names each such endpoint and says what was wanted and what was found.
  - C(/health) of a vLLM whose engine hangs still answers 200. Only a generated token, or token
    counters that rise while requests run, show that an engine works.
author: The nvl.vllm authors
options:
  endpoints:
    description: The servers to look at. Names and URLs must differ.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: What to call it in results and messages.
        type: str
        required: true
      url:
        description: Base URL such as C(http://127.0.0.1:8001), without C(/v1).
        type: str
        required: true
      unit:
        description: Its systemd unit; the message about an endpoint that is not well says how to
          read the journal of that unit.
        type: str
  model:
    description: Served name that must be listed. Without it the first listed model is taken.
    type: str
  api_key:
    description: Key of the C(/v1) interface, where the servers ask for one.
    type: str
  version:
    description: Version that C(/version) must report, local part (C(+cpu)) aside. Without it, it is not asked.
    type: str
  depth:
    description:
      - How deep to look. Each depth begins with C(alive).
      - V(alive) wants C(/health) to answer 200.
      - V(serves) wants the model listed and O(max_tokens) tokens generated. A busy server may not
        get to it within O(timeout).
      - V(progresses) wants token counters that rise while requests run; where they do not move, or
        nothing runs, a generated token decides as in V(serves). Tells a busy server from a hung
        one.
    type: str
    choices: [alive, serves, progresses]
    default: serves
  timeout:
    description: Total deadline (seconds) of one look at an endpoint.
    type: float
    default: 30.0
  wait:
    description:
      - Look again, once a second, until all endpoints are well in the same round. No new round
        begins after this many seconds. With V(0) there is one round.
    type: float
    default: 0.0
  max_tokens:
    description: Tokens to ask for.
    type: int
    default: 1
attributes:
  check_mode:
    description: Nothing on the host is changed, so check mode does the same.
    support: full
  diff_mode:
    description: Nothing is changed, so there is no difference to show.
    support: none
  idempotent:
    description: Nothing is changed; RV(ignore:changed) is always false.
    support: full
seealso:
  - module: nvl.vllm.failover_drill
"""

EXAMPLES = r"""
- name: Both endpoints generate
  nvl.vllm.vllm_health:
    endpoints:
      - name: primary
        url: http://127.0.0.1:8001
      - name: secondary
        url: http://127.0.0.1:8002
    model: gpt-oss-120b

- name: Neither engine hangs, however busy it is
  nvl.vllm.vllm_health:
    endpoints: "{{ vllm_endpoints }}"
    depth: progresses
    timeout: 60

- name: Wait until both are back
  nvl.vllm.vllm_health:
    endpoints: "{{ vllm_endpoints }}"
    wait: 600
"""

RETURN = r"""
endpoints:
  description: What was found at each endpoint, in the order given. Also returned on failure.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the endpoint.
      type: str
    url:
      description: Base URL of the endpoint.
      type: str
    healthy:
      description: Whether the wanted depth was reached and well.
      type: bool
    alive:
      description: The look at C(/health).
      type: dict
      contains: &probe
        ok:
          description: Whether this depth was well.
          type: bool
        seconds:
          description: How long the look took.
          type: float
        reason:
          description: One sentence; what was wanted, what was found, and where.
          type: str
        model:
          description: Served name that was asked.
          type: str
          returned: when the model list was good
        ttft_seconds:
          description: Seconds to the first generated token.
          type: float
          returned: when a token was generated for this look
        running:
          description: Requests that were running.
          type: int
          returned: for RV(endpoints[].progresses)
        tokens:
          description: By how much the token counters rose while they were watched.
          type: int
          returned: for RV(endpoints[].progresses)
    serves:
      description: The look at the model; empty unless O(depth=serves) and alive.
      type: dict
      contains: *probe
    progresses:
      description: The look at the counters; empty unless O(depth=progresses) and alive.
      type: dict
      contains: *probe
  sample:
    - name: primary
      url: http://127.0.0.1:8001
      healthy: true
      alive:
        ok: true
        seconds: 0.002
        reason: primary (http://127.0.0.1:8001) answers /health with 200
      serves:
        ok: true
        seconds: 0.11
        reason: primary (http://127.0.0.1:8001) answers as gpt-oss-120b
        model: gpt-oss-120b
        ttft_seconds: 0.1
      progresses: {}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._health import (
    DEPTHS,
    Look,
    examine_all,
    healthy,
)
from ansible_collections.nvl.vllm.plugins.module_utils._openai import (
    Endpoint,
    EndpointError,
    endpoints_of,
    version,
)


def main() -> None:
    """Look at all endpoints and exit, or fail with one sentence for each that is not well."""
    module = AnsibleModule(
        argument_spec={
            "endpoints": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "url": {"type": "str", "required": True},
                    "unit": {"type": "str"},
                },
            },
            "model": {"type": "str"},
            "api_key": {"type": "str", "no_log": True},
            "version": {"type": "str"},
            "depth": {"type": "str", "choices": list(DEPTHS), "default": "serves"},
            "timeout": {"type": "float", "default": 30.0},
            "wait": {"type": "float", "default": 0.0},
            "max_tokens": {"type": "int", "default": 1},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        endpoints = endpoints_of(params["endpoints"], params["api_key"])
        look = Look(params["depth"], params["model"], params["timeout"], params["max_tokens"])
    except ValueError as error:
        module.fail_json(msg=str(error))

    found = examine_all(endpoints, look, params["wait"])
    results = []
    unwell = []
    for endpoint, probes, item in zip(endpoints, found, params["endpoints"]):
        reason = "" if healthy(probes, look) else list(probes.values())[-1].reason
        if not reason and params["version"]:
            reason = other_version(endpoint, params["version"], params["timeout"])
        if reason:
            hint = f" (see journalctl -u {item['unit']})" if item["unit"] else ""
            unwell.append(reason + hint)
        results.append(
            {
                "name": endpoint.name,
                "url": endpoint.url,
                "healthy": not reason,
                **{depth: probes[depth].as_dict() if depth in probes else {} for depth in DEPTHS},
            }
        )
    if unwell:
        count = f"{len(unwell)} of {len(endpoints)} endpoints not healthy: "
        module.fail_json(msg=count + "; ".join(unwell), endpoints=results)
    module.exit_json(changed=False, endpoints=results)


def other_version(endpoint: Endpoint, wanted: str, timeout: float) -> str:
    """Why the endpoint does not run the wanted version of vLLM, or the empty string."""
    try:
        found = version(endpoint, timeout)
    except EndpointError as error:
        return str(error)
    return "" if found.partition("+")[0] == wanted else f"{endpoint}: wanted vLLM {wanted}, found {found}: restart it"


if __name__ == "__main__":
    main()
