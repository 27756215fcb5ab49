"""What every role has to keep to. That defaults and argument specifications agree: see test_role_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _declaration

ROOT = Path(__file__).parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())
TEMPLATES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("roles/*/templates/**/*.j2"))
DECLARATION = yaml.safe_load((ROOT / "roles/vllm_declaration/defaults/main.yml").read_text())


def options(role: str) -> dict:
    specs = yaml.safe_load((ROOT / "roles" / role / "meta/argument_specs.yml").read_text())
    return specs["argument_specs"]["main"]["options"]


@pytest.mark.parametrize("role", ROLES)
def test_a_variable_carries_its_roles_name(role):
    # Those of the declaration belong to all roles: they carry the collection's.
    prefix = "vllm_" if role == "vllm_declaration" else f"{role}_"
    assert [name for name in options(role) if not name.startswith(prefix)] == []


def test_a_variable_belongs_to_one_role():
    owners: dict[str, list[str]] = {}
    for role in ROLES:
        for name in options(role):
            owners.setdefault(name, []).append(role)
    assert {name: roles for name, roles in owners.items() if len(roles) > 1} == {}


def test_a_result_does_not_hide_a_variable():
    variables = {name for role in ROLES for name in options(role)}
    registered = {
        line.partition(":")[2].strip()
        for path in ROOT.glob("roles/*/tasks/*.yml")
        for line in path.read_text().splitlines()
        if line.strip().startswith("register:")
    }
    assert registered
    assert registered & variables == set()


@pytest.mark.parametrize("role", ROLES)
def test_what_an_option_requires_has_no_default(role):
    required = {name: option for name, option in options(role).items() if option.get("required")}
    assert [name for name, option in required.items() if "default" in option] == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_says_that_it_is_managed(template):
    assert (ROOT / template).read_text().splitlines()[0] == "{{ ansible_managed | comment }}"


def test_the_version_has_its_locks_and_its_help():
    version = DECLARATION["vllm_version"]
    wanted = [f"vllm/files/locks/{device}-{version}.txt" for device in ("cuda", "cpu")]
    wanted.append(f"vllm_declaration/files/vllm-serve-help-{version}.txt")
    assert [path for path in wanted if not (ROOT / "roles" / path).is_file()] == []


def test_the_sandbox_runs_the_same_version():
    sandbox = yaml.safe_load((ROOT / "roles/sandbox/defaults/main.yml").read_text())
    assert sandbox["sandbox_lock"].endswith(f"/cpu-{DECLARATION['vllm_version']}.txt")


def test_the_units_helper_is_copied_with_all_that_it_imports():
    """_unit.py runs on the host by itself, so every module it imports has to come along."""
    utils = ROOT / "plugins/module_utils"
    wanted, found = ["_unit"], set()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            lines = (utils / f"{name}.py").read_text().splitlines()
            wanted += [line.split()[1].lstrip(".") for line in lines if line.startswith("from ._")]
    variables = yaml.safe_load((ROOT / "roles/vllm_instances/vars/main.yml").read_text())
    sources = [item["src"] for item in variables["__vllm_instances_helper"]]
    prefix = "{{ __vllm_instances_utils }}/"
    assert {source.removeprefix(prefix) for source in sources if source.startswith(prefix)} == {
        f"{name}.py" for name in found
    }


def test_the_middleware_of_the_engines_is_where_they_look_for_it():
    """The declaration names a class, the role puts its file below a directory, the environment names that directory."""
    module, _, name = _declaration._MIDDLEWARE.rpartition(".")
    role = ROOT / "roles/vllm_instances"
    variables = yaml.safe_load((role / "vars/main.yml").read_text())
    sources = {
        item["dest"].replace("{{ __vllm_instances_lib }}", variables["__vllm_instances_lib"]): item["src"]
        for item in variables["__vllm_instances_helper"]
    }
    directory = re.search(r"^PYTHONPATH=.*?'([^']+)'", (role / "templates/instance.env.j2").read_text(), re.MULTILINE)
    source = sources[f"{directory[1]}/{module.replace('.', '/')}.py"]
    assert f"\nclass {name}:" in (role / "files" / source).read_text()
