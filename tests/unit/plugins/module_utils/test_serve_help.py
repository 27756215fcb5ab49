"""The captured ``vllm serve --help=all`` as a list of options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._serve_help import ServeOptions

HELP = (Path(__file__).parents[4] / "roles/vllm_declaration/files/vllm-serve-help-0.32.0.txt").read_text()


@pytest.fixture(scope="module")
def options():
    return ServeOptions.parse(HELP)


def test_every_flag_that_starts_a_line_is_known(options):
    flags = re.findall(r"^  (--[\w-]+)", HELP, re.MULTILINE)
    assert len(flags) > 300
    assert [flag for flag in flags if options.find(flag[2:]) is None] == []


def test_a_switch_has_its_negation(options):
    option = options.find("no-enable-prefix-caching")
    assert option is options.find("enable-prefix-caching")
    assert option.name == "enable-prefix-caching"
    assert option.boolean
    assert option.negates("no-enable-prefix-caching")
    assert not option.negates("enable-prefix-caching")


def test_a_name_that_begins_with_no_negates_nothing_without_its_positive(options):
    assert all(option.name.startswith("no-") is False for option in map(options.find, options.names()))


def test_a_value_that_stands_on_the_next_line_is_found(options):
    assert options.find("tensor-parallel-size").default == 1
    assert options.find("gpu-memory-utilization").default == 0.92
    assert options.find("port").default == 8000
    assert options.find("port").aliases == ()


def test_short_and_second_names_lead_to_the_same_option(options):
    assert options.find("tp").name == "tensor-parallel-size"
    assert options.find("device-memory-utilization").name == "gpu-memory-utilization"


def test_choices_are_those_in_braces(options):
    assert options.find("uvicorn-log-level").choices == ("critical", "debug", "error", "info", "trace", "warning")
    assert options.find("port").choices == ()


def test_names_to_suggest_are_no_negations(options):
    names = options.names()
    assert "enable-prefix-caching" in names
    assert "no-enable-prefix-caching" not in names
    assert "h" not in names


def test_every_default_is_a_value_that_is_accepted(options):
    for option in map(options.find, options.names()):
        if option.default is not None and not isinstance(option.default, (list, tuple)):
            assert option.complaint(option.default) == "", option.name


def test_text_that_is_something_else_is_an_error():
    with pytest.raises(ValueError, match="it has no --port"):
        ServeOptions.parse("usage: pip install\n\n  -h, --help  Show help.\n")
