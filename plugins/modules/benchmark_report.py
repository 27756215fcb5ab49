#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Compare a benchmark with its baseline and write the report, on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: benchmark_report
short_description: Compare a benchmark with its baseline and write the report, on the controller
version_added: 0.1.0
description:
  - Takes what M(nvl.vllm.benchmark) returned for each path of a host, judges it by the targets of the configuration
    guide and by the baseline of the same hardware, and writes C(latest.html), C(latest.json) and C(latest.md).
  - Runs on the controller (C(delegate_to) localhost) and needs matplotlib there.
author: The nvl.vllm authors
requirements: [matplotlib]
options:
  host:
    description: Name of the host; its files are in O(directory) below it.
    type: str
    required: true
  results:
    description: What M(nvl.vllm.benchmark) returned, for each path.
    type: list
    elements: dict
    required: true
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  model:
    description: Which checkpoint, such as V(openai/gpt-oss-120b).
    type: str
    required: true
  arguments:
    description: Arguments of each engine. Figures of other arguments are not compared.
    type: list
    elements: dict
    required: true
  settings:
    description: What was asked of the engines. Figures of other settings are not compared.
    type: dict
    required: true
  directory:
    description: Directory of the reports and, in C(baselines), of the baselines; made where needed.
    type: path
    required: true
  save_baseline:
    description: >-
      Store these figures as the baseline, beside those of paths and scenarios that are not in this run. Where the
      engines were not alone, or with fewer than 3 repetitions, it is not stored, and RV(problems) says why.
    type: bool
    default: false
  threshold:
    description: How much worse (percent) a median may be, where the repetitions of both do not overlap.
    type: float
    default: 10.0
attributes:
  check_mode:
    support: full
    description: Writes nothing in check mode.
  diff_mode:
    support: none
    description: Its files are a report.
  idempotent:
    support: none
    description: Each report is one of its own. RV(ignore:changed) is always false, as no host is changed.
seealso:
  - module: nvl.vllm.benchmark
"""

EXAMPLES = r"""
- name: Compare with the baseline, and write the report (on the controller)
  nvl.vllm.benchmark_report:
    host: "{{ inventory_hostname }}"
    results: "{{ measured.results }}"
    device: cuda
    model: openai/gpt-oss-120b
    arguments: "{{ vllm_declared.instances | map(attribute='arguments') }}"
    settings: {sweep_output_tokens: 128}
    directory: benchmarks
  delegate_to: localhost
"""

RETURN = r"""
summary:
  description: The report as text of several lines.
  returned: success
  type: str
problems:
  description: A sentence with the figures for each that is worse than the baseline, and why no baseline was stored.
  returned: success
  type: list
  elements: str
page:
  description: Path of the HTML report.
  returned: success
  type: str
  sample: /home/operator/deploy/benchmarks/h100-1/latest.html
json:
  description: Path of the report for programs; docs/benchmark.md tells its keys.
  returned: success
  type: str
baseline:
  description: Path of the baseline of this hardware and set-up, whether it is there or not.
  returned: success
  type: str
"""

import os
import traceback
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_baseline as baselines
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_html import page
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_output import markdown, summary
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_report import problems, refusal, report
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import read_object, write_object

try:
    from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_plots import pictures
except ImportError:
    MISSING = traceback.format_exc()
else:
    MISSING = ""


def main() -> None:
    """Write the report and exit with what it says."""
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "results": {"type": "list", "elements": "dict", "required": True},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "model": {"type": "str", "required": True},
            "arguments": {"type": "list", "elements": "dict", "required": True},
            "settings": {"type": "dict", "required": True},
            "directory": {"type": "path", "required": True},
            "save_baseline": {"type": "bool", "default": False},
            "threshold": {"type": "float", "default": 10.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    if MISSING:
        module.fail_json(msg=missing_required_lib("matplotlib"), exception=MISSING)
    labels = labels_of(params)
    root = os.path.abspath(params["directory"])
    baseline = os.path.join(root, "baselines", f"{baselines.key_of(labels)}.json")
    try:
        then = read_object(baseline)
        found = report(
            *(params["host"], params["results"], labels, params["settings"], params["arguments"]),
            *(then, params["threshold"]),
        )
        # Minutes of load are in this report: it is written whether it makes a baseline or not.
        if params["save_baseline"]:
            found["baseline"]["refused"] = refusal(found)
            found["baseline"]["stored"] = not found["baseline"]["refused"]
        directory = os.path.join(root, params["host"])
        if not module.check_mode:
            if found["baseline"]["stored"]:
                write_object(baseline, stored(found, then))
            write_object(os.path.join(directory, "latest.json"), found)
            for name, text in (("latest.html", page(found, pictures(found))), ("latest.md", markdown(found))):
                write(os.path.join(directory, name), text)
    except OSError as error:
        module.fail_json(msg=f"{params['host']}: the report cannot be kept: {error}; set vllm_benchmark_directory to "
                         "a directory of the user who runs ansible-playbook")  # fmt: skip
    html = os.path.join(directory, "latest.html")
    module.exit_json(
        changed=False,
        summary=summary(found, html),
        problems=problems(found),
        page=html,
        json=os.path.join(directory, "latest.json"),
        baseline=baseline,
    )


def labels_of(params: dict[str, Any]) -> dict[str, Any]:
    """What the figures belong to."""
    first = params["results"][0]
    return {
        "device": params["device"],
        "hardware": first["hardware"],
        "driver": first["driver"],
        "vllm": first["vllm"],
        "model": params["model"],
        "digest": baselines.digest(params["arguments"], params["settings"]),
    }


def stored(found: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """What a baseline keeps of a report, beside what it had of paths and scenarios that this one does not have."""
    return {
        "schema": baselines.SCHEMA,
        **{key: found[key] for key in ("time", "host", "labels", "settings")},
        "metrics": baselines.merged(then.get("metrics", {}), found["metrics"]),
    }


def write(path: str, text: str) -> None:
    """In one step, so that a reader never sees half of it."""
    with open(path + ".new", "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(path + ".new", path)


if __name__ == "__main__":
    main()
