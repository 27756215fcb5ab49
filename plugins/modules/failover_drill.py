#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Kill the engine behind one endpoint under load and measure what the users notice."""

from __future__ import annotations

DOCUMENTATION = r"""
module: failover_drill
short_description: Kill the engine behind one endpoint under load and measure what users notice
version_added: 0.1.0
description:
  - Sends steady load through a client with failover, as the agentic client does it, kills the
    engine process behind one endpoint, and goes on until that endpoint serves again.
  - Then judges what happened by O(budget) and fails when a limit was not kept. All numbers are
    returned either way.
  - Refuses, with nothing touched, unless every endpoint serves first. With one endpoint already
    down, the drill itself would take the service down.
  - Half of the requests stream. A request is lost when it ended without an answer after all its
    retries, and truncated when it failed after output had been streamed; such a request is never
    repeated.
  - Must run on the host of the target's unit, as root.
author: The nvl.vllm authors
options:
  endpoints:
    description: The servers between which the client fails over, two at least.
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
        description: Its systemd unit, such as C(vllm@primary.service). Required of the target.
        type: str
  target:
    description: Name of the endpoint that suffers the fault. Without it, the first one.
    type: str
  model:
    description: Served name to ask for. Without it, the first model that the endpoints list.
    type: str
  api_key:
    description: Key of the C(/v1) interface, where the servers ask for one.
    type: str
  fault:
    description: What happens. V(kill) sends SIGKILL to the engine process below the target's unit.
    type: str
    choices: [kill]
    default: kill
  concurrency:
    description: How many requests are under way at any time.
    type: int
    default: 4
  max_tokens:
    description: Tokens to ask for with each request.
    type: int
    default: 32
  requests_before:
    description: Requests that must complete before the fault. If one is lost, there is no fault.
    type: int
    default: 8
  requests_after:
    description: Requests that must complete after the target serves again.
    type: int
    default: 8
  retries:
    description: Further attempts of a failed request.
    type: int
    default: 4
  backoff_base:
    description:
      - First pause (seconds) before a further attempt, doubled for each one after that. The client
        pauses only once every endpoint has been tried.
    type: float
    default: 2.0
  health_interval:
    description: Seconds between two health checks of an endpoint by the client.
    type: float
    default: 30.0
  request_timeout:
    description: Total deadline (seconds) of one attempt, and of one health check of the client.
    type: float
    default: 60.0
  recovery_timeout:
    description:
      - How long (seconds) the target may take to serve again. Also bounds the time for
        O(requests_before) and that for O(requests_after).
    type: float
    default: 600.0
  budget:
    description: What the fault may cost.
    type: dict
    default: {}
    suboptions:
      lost:
        description: Lost requests.
        type: int
        default: 0
      truncated:
        description: Truncated answers. Without it, as many as O(concurrency).
        type: int
      worst_latency:
        description: Seconds of the slowest completed request, retries included. Not set, no limit.
        type: float
      recovery:
        description: Seconds from the fault until the target serves again. Not set, no limit.
        type: float
  subject:
    description:
      - What the drill proves something about, such as a digest of everything the engines run from.
        With it, a passed drill is recorded in O(proof), and is not repeated for the same subject.
    type: str
  proof:
    description: File on the host where the last passed drill is recorded.
    type: path
    default: /var/lib/nvl-vllm/drill.json
  force:
    description: Drill even where O(proof) records a pass for O(subject).
    type: bool
    default: false
attributes:
  check_mode:
    description: Sends no load and injects no fault; is skipped with a message that says what it
      would do.
    support: partial
  diff_mode:
    description: There is no difference to show.
    support: none
  idempotent:
    description:
      - Each run is a new drill. RV(ignore:changed) is always false, because a drill leaves the host
        as it found it (the unit has restarted its engine) and fails where it does not.
    support: none
seealso:
  - module: nvl.vllm.vllm_health
"""

EXAMPLES = r"""
- name: The primary's engine dies and no user loses a request
  nvl.vllm.failover_drill:
    endpoints:
      - name: primary
        url: http://127.0.0.1:8001
        unit: vllm@primary.service
      - name: secondary
        url: http://127.0.0.1:8002
        unit: vllm@secondary.service
    model: gpt-oss-120b
    budget:
      lost: 0
      worst_latency: 30
      recovery: 300

- name: The other way round
  nvl.vllm.failover_drill:
    endpoints: "{{ vllm_endpoints }}"
    target: secondary
"""

RETURN = r"""
proven:
  description: When (UTC) the drill passed whose numbers these are, where it was an earlier one.
  returned: when there was no new drill
  type: str
  sample: "2026-01-31T12:00:00Z"
target:
  description: Name of the endpoint that suffered the fault.
  returned: when there was a drill
  type: str
fault:
  description: What was done to it, in words.
  returned: when there was a drill
  type: str
verdict:
  description: V(passed), or V(failed) when a limit was not kept.
  returned: when there was a drill
  type: str
broken:
  description: A sentence with the numbers for each limit that was not kept.
  returned: when there was a drill
  type: list
  elements: str
sent:
  description: Requests sent; the sum of RV(completed), RV(lost) and RV(truncated).
  returned: when there was a drill
  type: int
completed:
  description: Requests that were answered in full.
  returned: when there was a drill
  type: int
completed_after:
  description: Those of them that completed after the target served again.
  returned: when there was a drill
  type: int
lost:
  description: Requests that ended without any output.
  returned: when there was a drill
  type: int
truncated:
  description: Requests that failed after output had been streamed.
  returned: when there was a drill
  type: int
retried:
  description: Requests that needed more than one attempt, however they ended.
  returned: when there was a drill
  type: int
attempts:
  description: Attempts of all requests together.
  returned: when there was a drill
  type: int
streamed:
  description: Requests that asked for a stream.
  returned: when there was a drill
  type: int
latency:
  description:
    - Seconds of completed requests, retries and pauses included; null when none completed.
  returned: when there was a drill
  type: dict
  contains:
    p50:
      description: Half of the requests took no longer.
      type: float
    p99:
      description: 99 of 100 requests took no longer.
      type: float
    worst:
      description: The slowest request.
      type: float
seconds_to_eject:
  description:
    - From the fault to the last attempt that failed at the target before it served again.
      Null when no attempt failed there.
  returned: when there was a drill
  type: float
seconds_to_recover:
  description:
    - From the fault until the target, with a new engine, served again. Null when it did not.
  returned: when there was a drill
  type: float
endpoints:
  description: Completed requests by endpoint name.
  returned: when there was a drill
  type: dict
  sample: {primary: 12, secondary: 45}
errors:
  description: The first five distinct errors of attempts, in order of time.
  returned: when there was a drill
  type: list
  elements: dict
  contains:
    endpoint:
      description: Name of the endpoint.
      type: str
    kind:
      description:
        - V(connect), V(http), V(deadline), V(cut) (ended early) or V(failed) (no answer in it).
      type: str
    count:
      description: How often.
      type: int
    first:
      description: The first one in full.
      type: str
"""

import dataclasses
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._drill import (
    DrillRefused,
    Plan,
    run_drill,
)
from ansible_collections.nvl.vllm.plugins.module_utils._drill_report import Budget
from ansible_collections.nvl.vllm.plugins.module_utils._dual_client import RetryPolicy
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import KillEngine
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import read_object, write_object
from ansible_collections.nvl.vllm.plugins.module_utils._openai import endpoints_of

PLAN = ("concurrency", "max_tokens", "requests_before", "requests_after", "recovery_timeout")
POLICY = ("retries", "backoff_base", "health_interval", "request_timeout")


def main() -> None:
    """Run the drill and exit with its numbers, or fail with the limits that were not kept."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    params = module.params
    try:
        endpoints = endpoints_of(params["endpoints"], params["api_key"])
        name, unit = target_of(params["endpoints"], params["target"])
        plan = Plan(**{key: params[key] for key in PLAN})
        policy = RetryPolicy(**{key: params[key] for key in POLICY})
    except ValueError as error:
        module.fail_json(msg=str(error))
    subject, record = params["subject"], read_object(params["proof"])
    if subject and record.get("subject") == subject and not params["force"]:
        module.exit_json(changed=False, proven=record["time"], **record["numbers"])

    target = next(endpoint for endpoint in endpoints if endpoint.name == name)
    fault = KillEngine(unit, module.run_command)
    if module.check_mode:
        through = ", ".join(endpoint.name for endpoint in endpoints)
        module.exit_json(
            changed=False,
            skipped=True,
            msg=f"Would send {plan.concurrency} requests at a time through {through}, and {fault}.",
        )
    try:
        budget = Budget(**params["budget"])
        numbers = run_drill(endpoints, target, fault, plan, budget, policy, params["model"])
    except DrillRefused as error:
        module.fail_json(msg=f"Drill refused, nothing was touched: {error}")
    result = {"target": target.name, "fault": str(fault), **numbers}
    if numbers["broken"]:
        module.fail_json(msg=f"Drill failed: {'; '.join(numbers['broken'])}", **result)
    if subject:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_object(params["proof"], {"subject": subject, "time": when, "numbers": result})
    module.exit_json(changed=False, **result)


def target_of(items: list[dict[str, str]], wanted: str | None) -> tuple[str, str]:
    """Name and unit of the target: the named endpoint or the first. Raises ValueError."""
    names = [item["name"] for item in items]
    target = next((item for item in items if item["name"] == wanted), None) if wanted else items[0]
    if target is None:
        raise ValueError(f"wanted a target of {', '.join(names)}, found {wanted}")
    if not target.get("unit"):
        raise ValueError(
            f"wanted the systemd unit of the target {target['name']}, found none; "
            f"set unit of that endpoint, such as vllm@{target['name']}.service"
        )
    return target["name"], target["unit"]


def argument_spec() -> dict[str, object]:
    """The options; their defaults are those of the objects that they fill."""
    defaults = {**dataclasses.asdict(Plan()), **dataclasses.asdict(RetryPolicy())}
    spec: dict[str, object] = {
        key: {"type": type(defaults[key]).__name__, "default": defaults[key]} for key in (*PLAN, *POLICY)
    }
    spec.update(
        endpoints={
            "type": "list",
            "elements": "dict",
            "required": True,
            "options": {
                "name": {"type": "str", "required": True},
                "url": {"type": "str", "required": True},
                "unit": {"type": "str"},
            },
        },
        target={"type": "str"},
        model={"type": "str"},
        api_key={"type": "str", "no_log": True},
        subject={"type": "str"},
        proof={"type": "path", "default": "/var/lib/nvl-vllm/drill.json"},
        force={"type": "bool", "default": False},
        fault={"type": "str", "choices": ["kill"], "default": "kill"},
        budget={
            "type": "dict",
            "default": {},
            "options": {
                "lost": {"type": "int", "default": 0},
                "truncated": {"type": "int"},
                "worst_latency": {"type": "float"},
                "recovery": {"type": "float"},
            },
        },
    )
    return spec


if __name__ == "__main__":
    main()
