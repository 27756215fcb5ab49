"""Kinds of drift: secrets are masked, and code and table name the same kinds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_kinds
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import KINDS, MASK, SEVERITIES, Report, masked
from hypothesis import given
from hypothesis import strategies as st

UTILS = Path(_drift_kinds.__file__).parent


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Environment=HF_TOKEN=hf_abc", f"Environment=HF_TOKEN={MASK}"),
        ('Environment="VLLM_API_KEY=a b" X=1', f'Environment="VLLM_API_KEY={MASK}'),
        ("vllm serve --api-key sk-1 --port 1", f"vllm serve --api-key {MASK}"),
        ("vllm serve --api-key=sk-1", f"vllm serve --api-key={MASK}"),
        ("Authorization: Bearer abc", f"Authorization: {MASK}"),
        ("https_proxy=http://jo:pass@proxy:3128", f"https_proxy=http://{MASK}@proxy:3128"),
        ("Nice=5\nExecStart=/x serve --port 8001", "Nice=5\nExecStart=/x serve --port 8001"),
        ("db_password: hunter2\nNice=5", f"db_password: {MASK}\nNice=5"),
    ],
)
def test_secrets_are_masked_and_the_rest_is_not(text, wanted):
    assert masked(text) == wanted


@given(
    st.sampled_from(["VLLM_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "aws_credentials"]),
    # A secret of asterisks alone is hidden by asterisks.
    st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=8).filter(lambda text: text.strip("*")),
)
def test_no_value_of_a_secret_is_left(name, value):
    assert value not in masked(f"Environment={name}={value}")
    assert value not in masked(f"{name}: {value}")


def test_each_kind_is_told_somewhere_and_no_other_is():
    sources = {path: path.read_text() for path in UTILS.glob("_drift_*.py") if path.name != "_drift_kinds.py"}
    used = set()
    for text in sources.values():
        used |= set(re.findall(r"""(?:report\.add|grouped\.add)\(\s*"(\w+)\"""", text))
        used |= {name for name in re.findall(r'"(\w+)"', text) if name in KINDS}
    assert used == set(KINDS)


def test_each_kind_has_a_severity_a_meaning_and_a_remedy():
    for name, kind in KINDS.items():
        assert re.fullmatch(r"[a-z_]+", name)
        assert kind.severity in SEVERITIES
        assert kind.meaning.endswith(".")
        assert kind.remedy


def test_a_finding_has_what_the_report_wants_and_the_worst_come_first():
    report = Report("runtime")
    report.add("unit_restarts", "b", "9", "3")
    report.add("unit_override", "a", "x", "y", diff="[Service]")
    report.add("unit_not_active", "z", "failed", "active", "do it")
    report.blind("one")
    report.blind("one")
    worst, warning, note = report.sorted()
    assert worst == {
        "kind": "unit_not_active",
        "severity": "critical",
        "source": "runtime",
        "where": "z",
        "found": "failed",
        "wanted": "active",
        "remedy": "do it",
    }
    assert warning["diff"] == "[Service]"
    assert note["remedy"] == KINDS["unit_restarts"].remedy
    assert report.unknown == ["one"]


def test_a_kind_that_is_not_known_is_an_error():
    with pytest.raises(KeyError):
        Report("runtime").add("nonsense", "a", "b", "c")
