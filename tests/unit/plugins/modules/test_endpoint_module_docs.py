"""The documentation of the endpoint modules and their argument_spec say the same."""

from __future__ import annotations

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils._drill_report import Timeline, summarise
from ansible_collections.nvl.vllm.plugins.modules import failover_drill, vllm_health

MODULES = pytest.mark.parametrize("module", [failover_drill, vllm_health], ids=lambda m: m.__name__)
KEYS = {"type", "elements", "required", "default", "choices"}


def facts(options, nested):
    """What both sides say about each option, with nested options flattened."""
    found = {}
    for name, option in options.items():
        found[name] = {key: option[key] for key in KEYS if option.get(key) not in (None, False)}
        for inner, value in facts(option.get(nested, {}), nested).items():
            found[f"{name}.{inner}"] = value
    return found


@pytest.fixture
def spec_of(monkeypatch):
    def spec_of(module):
        class Caught(Exception):
            pass

        def catch(argument_spec, supports_check_mode):
            assert supports_check_mode
            raise Caught(argument_spec)

        monkeypatch.setattr(module, "AnsibleModule", catch)
        with pytest.raises(Caught) as caught:
            module.main()
        return caught.value.args[0]

    return spec_of


@MODULES
def test_documentation_equals_argument_spec(module, spec_of):
    documented = yaml.safe_load(module.DOCUMENTATION)
    assert facts(documented["options"], "suboptions") == facts(spec_of(module), "options")


@MODULES
def test_examples_use_documented_options(module):
    documented = yaml.safe_load(module.DOCUMENTATION)
    name = f"nvl.vllm.{documented['module']}"
    tasks = yaml.safe_load(module.EXAMPLES)
    assert tasks
    for task in tasks:
        assert set(task[name]) <= set(documented["options"])


@MODULES
def test_secrets_are_marked(module, spec_of):
    keys = [option for name, option in spec_of(module).items() if name.endswith("_key")]
    assert keys
    assert all(option["no_log"] is True for option in keys)


def test_the_drill_documents_what_it_returns():
    numbers = summarise([], Timeline("a", 0.0), [])
    documented = set(yaml.safe_load(failover_drill.RETURN))
    assert documented == {"target", "fault", "via", "verdict", "broken", "proven", *numbers}
