#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Measure engines, or their gateway, with vLLM's own benchmark."""

from __future__ import annotations

DOCUMENTATION = r"""
module: benchmark
short_description: Measure engines, or their gateway, with vLLM's own benchmark
version_added: 0.1.0
description:
  - Runs C(vllm bench serve) of the release that is in use, and looks at the engines' metrics and the GPUs twice a
    second meanwhile.
  - V(parallel) asks the same question several times, one after the other and all at once. V(prefix) asks groups of
    requests whose prompts begin alike, with a beginning that no earlier prompt had, and proves the hits of the prefix
    cache by the engines' counters. V(sweep) has 1, 2, 4, ... users ask at the same time.
  - Each scenario is warmed up and repeated; steps that are compared take turns.
  - Refuses before any load where an engine does not serve, where this vLLM cannot benchmark, where another benchmark
    runs or where there is no room for results. Where others sent requests, RV(alone) is false and RV(notes) say it.
  - Must run on the engines' host, as root. The load itself runs as O(user), with the key in its environment.
author: The nvl.vllm authors
options:
  path:
    description: What to call what is loaded, such as the name of an engine.
    type: str
    required: true
  kind:
    description: Whether that is one V(engine), all of them V(together), or their V(gateway).
    type: str
    choices: [engine, together, gateway]
    default: engine
  targets:
    description: Where the load goes, at the same time.
    type: list
    elements: dict
    required: true
    suboptions: &endpoint
      name:
        description: What to call it in messages.
        type: str
        required: true
      url:
        description: Base URL such as C(http://127.0.0.1:8001), without C(/v1).
        type: str
        required: true
  engines:
    description: The engines behind the targets, which are watched.
    type: list
    elements: dict
    required: true
    suboptions: *endpoint
  api_key:
    description: Key of the engines, where they ask for one.
    type: str
  target_key:
    description: Key of the targets. Without it, O(api_key).
    type: str
  model:
    description: Served name to ask for.
    type: str
    required: true
  tokenizer:
    description: Directory of the checkpoint, whose tokenizer makes the prompts.
    type: path
    required: true
  root:
    description: Directory whose C(current) is the release in use.
    type: path
    default: /opt/vllm
  user:
    description: User that the load runs as.
    type: str
    default: vllm
  directory:
    description: Directory on the host for the latest result of each path, C(PATH.json). It must be there.
    type: path
    default: /var/lib/nvl-vllm/benchmark
  device:
    description: What the engines run on. With V(cuda) nvidia-smi is asked, too.
    type: str
    choices: [cuda, cpu]
    required: true
  timeout:
    description: How long (seconds) a single run may take.
    type: float
    default: 3600.0
  scenarios:
    description: What to run.
    type: list
    elements: str
    choices: [parallel, prefix, sweep]
    default: [parallel, prefix, sweep]
  repetitions:
    description: How often each step is measured, after a warm-up.
    type: int
    default: 3
  parallel_requests:
    description: Requests of V(parallel).
    type: int
    default: 4
  parallel_output_tokens:
    description: Length (tokens) of each of its answers.
    type: int
    default: 128
  prefix_tokens:
    description: Length (tokens) of the beginning that a group shares.
    type: int
    default: 1946
  prefix_groups:
    description: Groups of V(prefix) that are measured in each repetition. One more warms up.
    type: int
    default: 4
  prefix_group:
    description: Requests of a group; the first one finds a cold cache. 2 or more.
    type: int
    default: 4
  prefix_output_tokens:
    description: Length (tokens) of each of its answers.
    type: int
    default: 4
  sweep_limit:
    description:
      - Most users of V(sweep) on each engine. It ends earlier at O(max_num_seqs), and where the requests of all users
        would not fit into the KV cache.
    type: int
    default: 64
  sweep_input_tokens:
    description: Length (tokens) of its prompts, which share nothing; more than 40.
    type: int
    default: 256
  sweep_output_tokens:
    description: Length (tokens) of each of its answers.
    type: int
    default: 128
  sweep_requests_per_user:
    description: Requests of each user at each level.
    type: int
    default: 4
  max_num_seqs:
    description: Most requests that each engine runs at once; 0 where it is not declared.
    type: int
    default: 0
attributes:
  check_mode:
    description: Sends no load; is skipped with a message that says what it would do.
    support: partial
  diff_mode:
    description: There is no difference to show.
    support: none
  idempotent:
    description: Each run measures anew. RV(ignore:changed) is always false, as nothing but the result is left.
    support: none
seealso:
  - module: nvl.vllm.benchmark_report
"""

EXAMPLES = r"""
- name: Measure an engine
  nvl.vllm.benchmark:
    path: primary
    targets: [{name: primary, url: "http://127.0.0.1:8001"}]
    engines: [{name: primary, url: "http://127.0.0.1:8001"}]
    model: gpt-oss-120b
    tokenizer: /srv/models/gpt-oss-120b/current
    device: cuda
    max_num_seqs: 8
"""

RETURN = r"""
path:
  description: As given.
  returned: when it ran
  type: str
kind:
  description: As given.
  returned: when it ran
  type: str
engines:
  description:
    - Of each engine C(block_size), C(kv_tokens), the size of its KV cache, and C(max_model_len), 0 where it does not
      tell; all in tokens.
  returned: when it ran
  type: dict
hardware:
  description: Kind and number of the GPUs, or the processor and its cores.
  returned: when it ran
  type: str
  sample: 2 x NVIDIA H100 NVL
driver:
  description: Version of the NVIDIA driver; empty without one.
  returned: when it ran
  type: str
vllm:
  description: Version that the engines tell.
  returned: when it ran
  type: str
time:
  description: When it ended (UTC).
  returned: when it ran
  type: str
  sample: "2026-01-31T12:00:00Z"
alone:
  description: Whether the engines had nothing else to do, probes of one token aside.
  returned: when it ran
  type: bool
notes:
  description: Sentences about what else they had to do.
  returned: when it ran
  type: list
  elements: str
missed:
  description: Looks at engines, twice a second, that came to nothing.
  returned: when it ran
  type: int
seconds:
  description: How long all of it took (s).
  returned: when it ran
  type: float
steps:
  description: Each step with its C(runs).
  returned: when it ran
  type: list
  elements: dict
  contains:
    scenario:
      description: V(parallel), V(prefix) or V(sweep).
      type: str
    name:
      description: Name of the step, such as V(sequential) or V(4 users).
      type: str
    kind:
      description: What was asked - V(question), V(prefix) or V(load).
      type: str
    concurrency:
      description: Requests under way at any time, on each target.
      type: int
    users:
      description: The same on all targets together.
      type: int
    requests:
      description: Requests of a run on each target.
      type: int
    input_tokens:
      description: Length (tokens) of the prompts, or of the beginning that they share; 0 for the question.
      type: int
    output_tokens:
      description: Length (tokens) of each answer.
      type: int
    group:
      description: Requests with the same beginning.
      type: int
    runs:
      description:
        - Of each repetition when it began and ended (C(from), C(to), seconds of the timeline), C(requests),
          C(input_tokens), C(output_tokens), C(seconds), C(requests_per_s), C(output_tokens_per_s),
          C(total_tokens_per_s), C(p50), C(p95) and C(p99) of C(ttft_ms), C(itl_ms) and C(e2e_ms) (milliseconds),
          C(counters), by how much the engines' counters rose, and C(others), the part of it that was not this run's.
        - Those of V(prefix) have C(groups) with C(cold_ms) and C(warm_ms) to the first token, C(cold_e2e_ms) and
          C(warm_e2e_ms) of the whole request, and C(hits), C(queries), C(expected_hits) and C(other_tokens) in tokens.
      type: list
      elements: dict
timeline:
  description:
    - Columns of what C(engines) and C(gpus) did, by name or index, with C(t) in seconds since the beginning. KV usage
      is a share (0 to 1), C(utilization) in percent, C(memory_mib) in MiB, C(power_w) in W, C(clock_reasons) the bits
      that nvidia-smi tells of lowered clocks.
  returned: when it ran
  type: dict
"""

import collections
import dataclasses
import os
import signal
import socket
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark import ENGINE, KINDS, SCENARIOS
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_load import BenchmarkError
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_run import Host, Left, Path, Wanted, benchmark
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_watch import DEADLINE, read_gpus
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import write_object
from ansible_collections.nvl.vllm.plugins.module_utils._openai import endpoints_of

NUMBERS = [field.name for field in dataclasses.fields(Wanted) if field.name != "scenarios"]


def main() -> None:
    """Measure and exit with the figures, or fail with why there are none."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    params = module.params
    here = socket.gethostname()
    try:
        path = path_of(params)
    except ValueError as error:
        module.fail_json(msg=f"{here}: {error}")
    if module.check_mode:
        names = ", ".join(target.name for target in path.targets)
        scenarios = ", ".join(params["scenarios"])
        module.exit_json(changed=False, skipped=True, msg=f"Would benchmark {names}: {scenarios}.")
    if os.geteuid() != 0:
        module.fail_json(msg=f"{here}: benchmark runs as user {os.geteuid()}, wanted root: run it with become: true")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, leave)
    wanted = Wanted(scenarios=params["scenarios"], **{key: params[key] for key in NUMBERS})
    gpus = read_gpus if params["device"] == "cuda" else None
    keys = ("root", "user", "tokenizer", "directory", "timeout")
    try:
        # Before the load: a baseline of unknown hardware would be compared with that of any other.
        labels = hardware(params["device"])
        found = benchmark(path, wanted, params["model"], Host(**{key: params[key] for key in keys}, gpus=gpus))
        found.update(labels)
    except BenchmarkError as error:
        module.fail_json(msg=f"{here}: benchmark of {path.name}: {error}")
    except Left:
        module.fail_json(msg=f"{here}: benchmark of {path.name} was interrupted; nothing of it is left")
    found["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_object(os.path.join(params["directory"], f"{path.name}.json"), found)
    module.exit_json(changed=False, **found)


def leave(number: int, _frame: object) -> None:
    """A signal ends the benchmark as the loss of its asker does."""
    signal.signal(number, signal.SIG_IGN)
    raise Left


def path_of(params: dict[str, Any]) -> Path:
    """What is loaded. Raises ValueError."""
    engines = endpoints_of(params["engines"], params["api_key"])
    key = params["api_key"] if params["kind"] != "gateway" else params["target_key"] or params["api_key"]
    return Path(params["path"], params["kind"], endpoints_of(params["targets"], key), engines)


def hardware(device: str) -> dict[str, str]:
    """What the engines run on, and its driver. Raises BenchmarkError where GPUs cannot be named."""
    if device == "cuda":
        try:
            status, out, error = _gpu_info.run_command(
                ["nvidia-smi", "--query-gpu=index,name,driver_version", "--format=csv,noheader"], DEADLINE
            )
        except OSError as problem:  # TimeoutError is one
            raise BenchmarkError(f"wanted the names of the GPUs, found: {problem}") from problem
        cells = [[cell.strip() for cell in line.split(",")] for line in out.splitlines()]
        # Whatever its exit status: that one GPU fell off the bus says nothing of the others.
        rows = [row for row in cells if len(row) == 3 and row[0].isdigit() and not _gpu_info.is_failure(row[1])]
        if not rows:
            why = _gpu_info.explain(status or 6, out + error).sentence
            raise BenchmarkError(f"wanted the names of the GPUs from nvidia-smi, found none: {why}")
        kinds = collections.Counter(name for _, name, _ in rows)
        return {"hardware": ", ".join(f"{count} x {name}" for name, count in kinds.items()), "driver": rows[0][2]}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    return {"hardware": f"{os.cpu_count()} x {names[0] if names else 'CPU'}", "driver": ""}


def argument_spec() -> dict[str, Any]:
    """The options; the defaults of numbers are those of Wanted."""
    endpoint = {"name": {"type": "str", "required": True}, "url": {"type": "str", "required": True}}
    endpoints = {"type": "list", "elements": "dict", "required": True, "options": endpoint}
    defaults = dataclasses.asdict(Wanted(SCENARIOS))
    spec: dict[str, Any] = {key: {"type": "int", "default": defaults[key]} for key in NUMBERS}
    spec.update(
        path={"type": "str", "required": True},
        kind={"type": "str", "choices": list(KINDS), "default": ENGINE},
        targets=endpoints,
        engines=endpoints,
        api_key={"type": "str", "no_log": True},
        target_key={"type": "str", "no_log": True},
        model={"type": "str", "required": True},
        tokenizer={"type": "path", "required": True},
        root={"type": "path", "default": "/opt/vllm"},
        user={"type": "str", "default": "vllm"},
        directory={"type": "path", "default": "/var/lib/nvl-vllm/benchmark"},
        device={"type": "str", "choices": ["cuda", "cpu"], "required": True},
        timeout={"type": "float", "default": 3600.0},
        scenarios={"type": "list", "elements": "str", "choices": list(SCENARIOS), "default": list(SCENARIOS)},
    )
    return spec


if __name__ == "__main__":
    main()
