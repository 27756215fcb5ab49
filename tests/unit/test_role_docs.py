"""The page of variables says what the roles say, and the roles say the same in both of their files."""

import pytest
import yaml

import role_docs


def test_the_page_is_what_the_argument_specifications_say():
    page = role_docs.PAGE.read_text()

    assert role_docs.renewed(page) == page, "docs/configuration.md is stale: run tools/role_docs.py"


def test_every_role_is_on_the_page():
    roles = {path.parent.parent.name for path in role_docs.ROOT.glob("roles/*/meta/argument_specs.yml")}

    assert roles == set(role_docs.ROLES)


@pytest.mark.parametrize("role", role_docs.ROLES)
def test_documented_defaults_are_the_ones_in_force(role):
    in_force = yaml.safe_load((role_docs.ROOT / "roles" / role / "defaults/main.yml").read_text())
    _, options = role_docs.options_of(role)

    assert {name: option["default"] for name, option in options.items() if "default" in option} == in_force


@pytest.mark.parametrize(
    ("description", "cell"),
    [
        ("Needs C(name), not O(port).", "Needs `name`, not `port`."),
        (["First line.", "Second one."], "First line. Second one."),
        ("One of a|b.", "One of a\\|b."),
    ],
)
def test_descriptions_become_one_cell(description, cell):
    assert role_docs.prose(description) == cell


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("", '`""`'),
        (5, "`5`"),
        (False, "`false`"),
        (["a", "b"], "`[a, b]`"),
        ("x" * 61, "[see there](../roles/vllm/defaults/main.yml)"),
    ],
)
def test_long_defaults_are_linked(value, cell):
    assert role_docs.default({"type": "raw", "default": value}, "vllm") == cell


def test_suboptions_stand_below_their_option():
    suboptions = {"b": {"type": "int", "description": "B."}, "c": {"type": "int", "description": "C."}}
    options = {"a": {"type": "dict", "default": {"b": 0}, "description": "A.", "options": suboptions}}

    assert list(role_docs.rows(options, "vllm")) == [
        "| `a` | dict | see below | A. |\n",
        "| `a.b` | int | `0` | B. |\n",
        "| `a.c` | int |  | C. |\n",
    ]


@pytest.mark.parametrize("page", ["", role_docs.BEGIN, role_docs.END + role_docs.BEGIN])
def test_a_page_without_markers_is_refused(page):
    with pytest.raises(ValueError, match="lacks"):
        role_docs.renewed(page)
