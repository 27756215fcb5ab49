"""The tasks that check mode does not look at are the ones that somebody has reviewed, no more and no fewer."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ansible
import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils._drift_record import starred

ROOT = Path(__file__).parents[2]
VARIABLES = yaml.safe_load((ROOT / "roles/vllm_drift/vars/main.yml").read_text())
REVIEWED = VARIABLES["__vllm_drift_blind"]
EXPECTED = {group: part["roles"] for group, part in VARIABLES["__vllm_drift_expected"].items()}
PREFIX = "nvl.vllm."
BLOCKS = ("block", "rescue", "always")
INCLUDES = ("ansible.builtin.include_tasks", "ansible.builtin.import_tasks")
ROLES = ("ansible.builtin.include_role", "ansible.builtin.import_role")
#: Say of themselves that they support check mode in part, and do so in full as they are used here.
PARTLY = ("ansible.builtin.meta", "ansible.builtin.validate_argument_spec")
#: The condition that check mode never meets.
NEVER = "not ansible_check_mode"
KEYWORDS = {
    *("name", "when", "register", "loop", "loop_control", "vars", "tags", "diff", "no_log", "become", "check_mode"),
    *("changed_when", "failed_when", "delegate_to", "environment", "any_errors_fatal", "until", "retries", "delay"),
    *("notify", "run_once", *BLOCKS),
}


def listed(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [] if value is None else [value])]


@functools.cache
def check_mode_names(role: str) -> tuple[str, ...]:
    """``ansible_check_mode``, and variables of the role that it is part of."""
    path = ROOT / "roles" / role / "vars/main.yml"
    variables = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return ("ansible_check_mode", *(name for name, value in variables.items() if "ansible_check_mode" in str(value)))


def depends(role: str, conditions: list[str]) -> bool:
    """Whether check mode can make one of the conditions false."""
    names = re.compile(rf"\b(?:{'|'.join(check_mode_names(role))})\b")
    return any(names.search(one) and one != "ansible_check_mode" for one in conditions)


@functools.cache
def supports_check_mode(action: str) -> bool:
    """What the module's documentation says of it, which its own tests hold it to."""
    if action in PARTLY:
        return True
    collection, _, name = action.rpartition(".")
    modules = ROOT / "plugins/modules" if collection == "nvl.vllm" else Path(ansible.__file__).parent / "modules"
    tree = ast.parse((modules / f"{name}.py").read_text())
    (text,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "DOCUMENTATION"
    )
    return bool(yaml.safe_load(text)["attributes"]["check_mode"]["support"] == "full")


def action_of(task: dict[str, Any]) -> str:
    (action,) = set(task) - KEYWORDS
    return action


def blind(role: str, name: str = "main.yml", conditions: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Role and name of each task that check mode may leave out, below a file of the role's tasks."""
    yield from walk(role, yaml.safe_load((ROOT / "roles" / role / "tasks" / name).read_text()), conditions)


def walk(role: str, tasks: list[dict[str, Any]], inherited: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for task in tasks:
        conditions = (*inherited, *listed(task.get("when")))
        if "block" in task:
            for part in BLOCKS:
                yield from walk(role, task.get(part, []), conditions)
            continue
        action = action_of(task)
        if depends(role, list(conditions)):
            yield role, starred(task["name"])
        # What is included on a condition that may hold in check mode is reached there, too.
        if any(NEVER in one.split(" and ") and " or " not in one for one in conditions):
            continue
        if action in INCLUDES:
            yield from blind(role, task[action])
        elif action in ROLES:
            yield from blind(task[action]["name"].removeprefix(PREFIX), f"{task[action].get('tasks_from', 'main')}.yml")
        elif (
            not depends(role, list(conditions))
            and task.get("check_mode") is not False
            and not supports_check_mode(action)
        ):
            yield role, starred(task["name"])


def test_every_blind_task_is_reviewed_and_every_reviewed_one_is_blind():
    roles = [*EXPECTED["vllm"], *EXPECTED["clients"], "vllm_monitoring"]
    roles += ["vllm_declaration", "gpu_preflight", "vllm_drift"]
    found = {one for role in roles for one in blind(role)}
    reviewed = [(entry["role"], task) for entry in REVIEWED for task in entry["tasks"]]
    assert sorted(set(reviewed)) == sorted(reviewed), "a task is listed twice"
    assert set(reviewed) - found == set(), "reviewed, and not blind any more"
    assert found - set(reviewed) == set(), "blind, and reviewed by nobody"


def test_the_roles_that_are_expected_are_those_of_the_playbook():
    plays = yaml.safe_load((ROOT / "playbooks/drift.yml").read_text())
    recorded = [play for play in plays if play.get("vars", {}).get("__vllm_drift_recorded")]
    named = [
        [
            task[action]["name"].removeprefix(PREFIX)
            for block in play["tasks"]
            for task in block.get("block", [])
            for action in ROLES
            if action in task
        ]
        for play in recorded
    ]
    assert named == [[*EXPECTED["vllm"], "vllm_monitoring", "vllm_drift"], EXPECTED["clients"]]


def test_the_playbook_looks_at_every_role_that_site_yml_lets_write():
    imported = ("site.yml", "cuda.yml")
    plays = [play for name in imported for play in yaml.safe_load((ROOT / "playbooks" / name).read_text())]
    deployed = [role for play in plays for role in play.get("roles", []) if isinstance(role, str)]
    # The first changes nothing, the last two look at what runs and make room.
    left_out = {f"{PREFIX}{name}" for name in ("gpu_preflight", "vllm_verify", "vllm_cleanup")}
    assert {f"{PREFIX}{name}" for name in EXPECTED["vllm"]} == set(deployed) - left_out


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        ([{"name": "a", "ansible.builtin.command": "true"}], ["a"]),
        ([{"name": "a", "ansible.builtin.command": "true", "check_mode": False}], []),
        ([{"name": "a", "ansible.builtin.stat": {}, "when": "not ansible_check_mode"}], ["a"]),
        ([{"name": "a", "ansible.builtin.stat": {}, "when": ["x", "not (ansible_check_mode and y)"]}], ["a"]),
        ([{"name": "a", "ansible.builtin.stat": {}, "when": "ansible_check_mode"}], []),
        (
            [{"name": "b", "when": "not ansible_check_mode", "block": [{"name": "a", "ansible.builtin.stat": {}}]}],
            ["a"],
        ),
        ([{"name": "a", "ansible.builtin.uri": {}}], ["a"]),
        ([{"name": "a", "ansible.builtin.include_tasks": "x.yml", "when": "not ansible_check_mode"}], ["a"]),
        ([{"name": "a", "ansible.builtin.debug": {}, "when": "not __cuda_unknown"}], ["a"]),
        ([{"name": "a", "nvl.vllm.units": {}}], []),
        # What is included on a condition that may hold in check mode is walked, too.
        (
            [{"name": "a", "ansible.builtin.include_tasks": "trial.yml", "when": "not __cuda_unknown"}],
            ["a", "Create a place for the trial", "Fetch the index and check its signature"],
        ),
        (
            [{"name": "a", "ansible.builtin.include_tasks": "trial.yml", "when": "x and not ansible_check_mode"}],
            ["a"],
        ),
    ],
)
def test_such_tasks_are_seen(tasks, names):
    assert [name for _, name in walk("cuda", tasks, ())] == names
