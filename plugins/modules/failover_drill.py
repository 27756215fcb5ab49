#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Break one thing of the service under load and measure what the users notice."""

from __future__ import annotations

DOCUMENTATION = r"""
module: failover_drill
short_description: Break one thing of the service under load and measure what users notice
version_added: 0.1.0
description:
  - Sends steady load, breaks one thing (O(fault)), and goes on until what was broken serves again.
  - Then judges what happened by O(budget) and fails when a limit was not kept. All numbers are
    returned either way.
  - Refuses, with nothing touched, unless every endpoint serves first. With one endpoint already
    down, the drill itself would take the service down.
  - Half of the requests stream. A request is lost when it ended without an answer after all its
    retries, and truncated when it failed after output had been streamed (a stream without C([DONE]),
    with an error in it, or broken off); such a request is never repeated.
  - Leaves the host as it found it. What does not end by itself is undone at the end, also after
    SIGTERM; should the drill be killed, a transient timer of systemd undoes it.
  - Must run on the host of the target's unit, as root.
author: The nvl.vllm authors
options:
  endpoints:
    description: The engines, two at least unless O(via=single) or the fault is the gateway's.
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
        description:
          - Its systemd unit, such as C(vllm@primary.service). Required of the target of V(kill),
            V(kill_server), V(hang) and V(stop), and of all endpoints for V(both_down).
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
  via:
    description:
      - What the load goes through. V(client) is a client with failover between all endpoints, as the
        agentic client has it. V(gateway) is a plain client of O(gateway_url) with O(gateway_retries);
        users of the gateway notice the same. V(single) is a plain client of the target alone, without
        retries, the control.
    type: str
    choices: [client, gateway, single]
    default: client
  gateway_url:
    description: Base URL of the gateway, such as C(http://127.0.0.1:8000). Required by O(via=gateway).
    type: str
  gateway_key:
    description: Key that the gateway asks for. Without it, O(api_key).
    type: str
  gateway_retries:
    description:
      - Further attempts of a request with O(via=gateway), after a failed connection or a status of 5xx,
        and never after the first output. They come after 0.5 s, doubled each time, at most 8 s.
      - OpenAI's library makes 2. With V(kill) they matter, because a server whose engine dies answers
        500 to what it had under way. A gateway has to pass that on, as the request itself may be what
        the engine died of.
    type: int
    default: 0
  gateway_unit:
    description: The gateway's systemd unit, for its faults.
    type: str
    default: vllm-gateway.service
  gateway_socket:
    description:
      - The gateway's admin socket. With O(via=gateway) the gateway is told there to look for the target at the relay
        of V(storm503), V(slow) and V(reset), and afterwards where it looked before. Its servers must be named as
        O(endpoints).
    type: path
    default: /run/vllm-gateway/admin.sock
  stats_url:
    description:
      - CSV page of the gateway's statistics, such as C(http://127.0.0.1:8404/;csv). With it,
        RV(seconds_to_eject) is when the gateway took the target out of use, and a recovery includes
        that the gateway uses it again. Its servers must be named as O(endpoints). Only with
        O(via=gateway).
    type: str
  fault:
    description:
      - What happens.
      - V(kill) sends SIGKILL to the engine process below the target's unit, V(kill_server) to the
        unit's main process.
      - V(hang) sends SIGSTOP to the engine process (to the main process where there is none), and
        SIGCONT after O(fault_seconds).
      - V(stop) stops the target's unit gracefully, then starts it.
      - V(drain) makes the target's drain file, for O(fault_seconds). Only with O(via=gateway).
      - V(storm503), V(slow) and V(reset) disturb completions in a relay in front of the target, for
        O(fault_seconds). All are refused with 503, each piece of an answer comes 0.5 s late, or
        connections are reset in the middle of answers.
      - V(gateway_reload) reloads the gateway's unit, V(gateway_kill) sends SIGKILL to its main
        process. Only with O(via=gateway).
      - V(both_down) is V(kill) of all endpoints at once. Meanwhile the gateway must refuse with HTTP
        503 and C(Retry-After), fast.
    type: str
    choices: [kill, kill_server, hang, stop, drain, storm503, slow, reset, gateway_reload, gateway_kill, both_down]
    default: kill
  fault_seconds:
    description: How long (seconds) a fault lasts that does not end by itself.
    type: float
    default: 20.0
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
  prompt_tokens:
    description:
      - Words of about one token each that every prompt is padded with. For the largest legal request
        take max-model-len less O(max_tokens) less 200 for the rest of the prompt.
    type: int
    default: 0
  retries:
    description:
      - Further attempts of a failed request, with O(via=client). At most one of them follows an engine that had taken
        the request and failed with it, as the request may be the reason.
    type: int
    default: 4
  backoff_base:
    description:
      - First pause (seconds) before a further attempt, doubled for each one after that. The client
        pauses only once every endpoint has been tried. After a lost request it pauses as long, too.
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
        description:
          - Lost requests. Those refused with 503 while V(both_down) takes all engines from the
            gateway do not count.
        type: int
        default: 0
      truncated:
        description: Truncated answers. Without it, as many as O(concurrency).
        type: int
      worst_latency:
        description: Seconds of the slowest completed request, retries included. Not set, no limit.
        type: float
      eject:
        description: RV(seconds_to_eject). Not set, no limit.
        type: float
      recovery:
        description: Seconds from the fault until the target serves again. Not set, no limit.
        type: float
      refusal:
        description: Seconds of the slowest refusal while V(both_down) takes all engines from the gateway.
        type: float
        default: 5.0
  subject:
    description:
      - What the drill proves something about, such as a digest of everything the engines run from.
        With it, a passed drill is recorded in O(proof), and is not repeated for the same subject,
        fault and O(via). The file holds one record.
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

- name: The primary dies, and no user of OpenAI's library who goes through the gateway loses a request
  nvl.vllm.failover_drill:
    endpoints: "{{ vllm_endpoints }}"
    via: gateway
    gateway_url: http://127.0.0.1:8000
    gateway_retries: 2
    stats_url: http://127.0.0.1:8404/;csv
    budget:
      lost: 0
      eject: 5

- name: The primary hangs, and no user of the gateway loses a request
  nvl.vllm.failover_drill:
    endpoints: "{{ vllm_endpoints }}"
    via: gateway
    gateway_url: http://127.0.0.1:8000
    stats_url: http://127.0.0.1:8404/;csv
    fault: hang
    fault_seconds: 20
    budget:
      lost: 0
      eject: 10
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
via:
  description: What the load went through.
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
refused:
  description: Those of RV(lost) whose last attempt was answered with HTTP 503.
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
retried_by_gateway:
  description:
    - Times that the gateway sent a request once more since the fault, as far as its statistics showed
      it. Null without O(stats_url).
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
    - With O(stats_url), from the fault until the gateway took the target out of use. Null when it
      never did.
    - Else from the fault to the last attempt that failed at the target before it served again. Null
      when no attempt failed there.
  returned: when there was a drill
  type: float
seconds_to_first_success:
  description: From the fault until the first request that was sent after it was answered in full.
  returned: when there was a drill
  type: float
seconds_to_recover:
  description:
    - From the fault until it had ended and the target served again (and the gateway used it again,
      with O(stats_url)). Null when it did not.
  returned: when there was a drill
  type: float
refusals:
  description: How the gateway refused requests of one token while all engines were down; else null.
  returned: when there was a drill
  type: dict
  contains:
    count:
      description: Refusals with HTTP 503 and C(Retry-After).
      type: int
    slowest:
      description: Seconds of the slowest; null where there was none.
      type: float
    improper:
      description: What came instead between the first and the last 503.
      type: list
      elements: str
    retry_after:
      description: Value of that header.
      type: str
endpoints:
  description: Completed requests by endpoint name, or by V(gateway).
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
import os
import time
from collections.abc import Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _faults
from ansible_collections.nvl.vllm.plugins.module_utils._drill import (
    CLIENT,
    GATEWAY,
    SINGLE,
    VIA,
    DrillRefused,
    Interrupted,
    Plan,
    Scene,
    run_drill,
)
from ansible_collections.nvl.vllm.plugins.module_utils._drill_report import Budget
from ansible_collections.nvl.vllm.plugins.module_utils._dual_client import RetryPolicy
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import EngineError
from ansible_collections.nvl.vllm.plugins.module_utils._gateway_socket import ADMIN_SOCKET, ServerAddress
from ansible_collections.nvl.vllm.plugins.module_utils._host import Runner
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import read_object, write_object
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint, endpoints_of

PLAN = (
    *("concurrency", "max_tokens", "requests_before", "requests_after", "prompt_tokens"),
    *("gateway_retries", "recovery_timeout"),
)
POLICY = ("retries", "backoff_base", "health_interval", "request_timeout")


def main() -> None:
    """Run the drill and exit with its numbers, or fail with the limits that were not kept."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    params = module.params
    try:
        scene = scene_of(params)
        fault = fault_of(params, scene, module.run_command)
        plan = Plan(**{key: params[key] for key in PLAN})
        policy = RetryPolicy(**{key: params[key] for key in POLICY})
    except ValueError as error:
        module.fail_json(msg=str(error))
    what = {"target": ", ".join(target.name for target in scene.targets), "fault": str(fault), "via": scene.via}
    subject, record = params["subject"], read_object(params["proof"])
    if subject and record.get("subject") == subject and not params["force"] and proves(record, what):
        module.exit_json(changed=False, proven=record["time"], **record["numbers"])
    if module.check_mode:
        through = ", ".join(endpoint.name for endpoint in scene.loaded)
        module.exit_json(
            changed=False,
            skipped=True,
            msg=f"Would send {plan.concurrency} requests at a time through {through}, and {fault}.",
        )
    name = f"nvl-vllm-drill-{os.getpid()}"
    try:
        budget = Budget(**params["budget"])
        timer = _faults.DeadMan(module.run_command, name)
        numbers = run_drill(scene, fault, plan, budget, policy, timer, params["model"])
    except DrillRefused as error:
        module.fail_json(msg=f"Drill refused, nothing was touched: {error}")
    except EngineError as error:
        module.fail_json(
            msg=f"Drill not undone, look at {what['target']}: {error}; the timer {name}.timer tries once more "
            f"(undo by hand: {' '.join(fault.undo)})"
        )
    except Interrupted as interrupted:
        module.fail_json(msg=f"Drill interrupted by {interrupted}; what it had done is undone")
    result = {**what, **numbers}
    if numbers["broken"]:
        module.fail_json(msg=f"Drill failed: {'; '.join(numbers['broken'])}", **result)
    if subject:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_object(params["proof"], {"subject": subject, "time": when, "numbers": result})
    module.exit_json(changed=False, **result)


def proves(record: Mapping[str, Any], what: Mapping[str, str]) -> bool:
    """Whether the recorded drill was this one."""
    return all(record["numbers"].get(key, CLIENT) == value for key, value in what.items())


def scene_of(params: Mapping[str, Any]) -> Scene:
    """Who takes part. Raises ValueError for options that do not go together."""
    fault, via = params["fault"], params["via"]
    endpoints = endpoints_of(params["endpoints"], params["api_key"])
    names = [endpoint.name for endpoint in endpoints]
    wanted = params["target"] or names[0]
    if wanted not in names:
        raise ValueError(f"wanted a target of {', '.join(names)}, found {wanted}")
    if via != GATEWAY and fault in (*_faults.GATEWAY_KINDS, _faults.DRAIN):
        raise ValueError(f"wanted via of gateway for the fault {fault}, found {via}; no other client notices it")
    if via == SINGLE and fault == _faults.BOTH_DOWN:
        raise ValueError("wanted via of client or gateway for the fault both_down, found single")
    gateway = statistics = None
    if via == GATEWAY:
        if not params["gateway_url"]:
            raise ValueError("wanted gateway_url for via of gateway, found none; set it, such as http://127.0.0.1:8000")
        gateway = Endpoint("gateway", params["gateway_url"], params["gateway_key"] or params["api_key"])
        if params["stats_url"]:
            statistics = Endpoint("statistics", params["stats_url"])
    targets = [endpoint for endpoint in endpoints if endpoint.name == wanted]
    if fault == _faults.BOTH_DOWN:
        targets = endpoints
    elif gateway is not None and fault in _faults.GATEWAY_KINDS:
        targets = [gateway]
    return Scene(endpoints, targets, via, gateway, statistics)


def fault_of(params: Mapping[str, Any], scene: Scene, run: Runner) -> _faults.Fault:
    """The fault that is asked for. Raises ValueError where an endpoint lacks what it takes."""
    kind, seconds = params["fault"], params["fault_seconds"]
    if seconds <= 0:
        raise ValueError(f"wanted fault_seconds above 0, found {seconds:g}")
    target = scene.targets[0]
    items = {item["name"]: item for item in params["endpoints"]}
    if kind == _faults.BOTH_DOWN:
        units = [unit_of(items[endpoint.name]) for endpoint in scene.targets]
        return _faults.AllOf([_faults.KillEngine(unit, run) for unit in units])
    if kind == _faults.GATEWAY_RELOAD:
        return _faults.GatewayReload(params["gateway_unit"], run)
    if kind == _faults.GATEWAY_KILL:
        return _faults.KillServer(params["gateway_unit"], run)
    if kind == _faults.DRAIN:
        return _faults.Drain(target.name, seconds)
    if kind in _faults.RELAY_KINDS:
        door = ServerAddress(target.name, params["gateway_socket"]) if scene.via == GATEWAY else None
        return _faults.Relayed(kind, target, seconds, door, params["gateway_unit"])
    unit = unit_of(items[target.name])
    if kind == _faults.HANG:
        return _faults.Hang(unit, run, seconds)
    if kind == _faults.STOP:
        return _faults.Stop(unit, run)
    return (_faults.KillServer if kind == _faults.KILL_SERVER else _faults.KillEngine)(unit, run)


def unit_of(item: Mapping[str, Any]) -> str:
    """The endpoint's systemd unit. Raises ValueError."""
    unit = item["unit"]
    if not unit:
        raise ValueError(
            f"wanted the systemd unit of the target {item['name']}, found none; "
            f"set unit of that endpoint, such as vllm@{item['name']}.service"
        )
    return str(unit)


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
        via={"type": "str", "choices": list(VIA), "default": CLIENT},
        gateway_url={"type": "str"},
        gateway_key={"type": "str", "no_log": True},
        gateway_unit={"type": "str", "default": "vllm-gateway.service"},
        gateway_socket={"type": "path", "default": ADMIN_SOCKET},
        stats_url={"type": "str"},
        subject={"type": "str"},
        proof={"type": "path", "default": "/var/lib/nvl-vllm/drill.json"},
        force={"type": "bool", "default": False},
        fault={"type": "str", "choices": list(_faults.KINDS), "default": _faults.KILL},
        fault_seconds={"type": "float", "default": 20.0},
        budget={
            "type": "dict",
            "default": {},
            "options": {
                "lost": {"type": "int", "default": 0},
                "truncated": {"type": "int"},
                "worst_latency": {"type": "float"},
                "eject": {"type": "float"},
                "recovery": {"type": "float"},
                "refusal": {"type": "float", "default": 5.0},
            },
        },
    )
    return spec


if __name__ == "__main__":
    main()
