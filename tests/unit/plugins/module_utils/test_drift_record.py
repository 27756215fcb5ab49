"""What the callback makes of the results of tasks."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_record as record
from hypothesis import given
from hypothesis import strategies as st

SECRET = "aV3ry.Secret-Value"


@pytest.mark.parametrize(
    "line",
    [
        f"api_key: {SECRET}",
        f"VLLM_API_KEY={SECRET}",
        f'"hf_token": "{SECRET}"',
        f"    password = {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f'http-request set-header Authorization "Bearer {SECRET}"',
        f"ExecStart=/bin/x --api-key {SECRET} --port 1",
        f"ExecStart=/bin/x --token='{SECRET}'",
        f'ExecStart=/bin/x --token "a\\"{SECRET}" --port 1',
        f"ExecStart=/bin/x --token 'a'\"{SECRET}\" --port 1",
        f"ExecStart=/bin/x --token a'{SECRET}' --port 1",
        f'ExecStart=/bin/x --token "{SECRET}',
        f"ExecStart=/bin/x --token 'it'\\''{SECRET}'",
        f"curl -H 'Authorization: Bearer a\"{SECRET}'",
        f'set-header Authorization "Bearer a\\"{SECRET}"',
        f"proxy: http://user:{SECRET}@proxy:3128",
        f"comment sk-{SECRET.replace('.', '')}",
    ],
)
def test_values_of_secrets_are_hidden(line):
    (shown,) = record.masked(line)
    assert SECRET not in shown
    assert SECRET.replace(".", "") not in shown
    assert record.HIDDEN in shown


@pytest.mark.parametrize(
    "line",
    [
        "max-num-batched-tokens: 8192",
        "tokenizer: /srv/models/x",
        "gpu-memory-utilization: 0.85",
        "ExecStart=/usr/local/libexec/vllm-unit serve primary",
        "server primary 127.0.0.1:8001 weight 1 maxconn 8",
        "mode: 0644",
        "url: http://127.0.0.1:8001/v1",
    ],
)
def test_other_lines_are_shown(line):
    assert record.masked(line) == [line]


def test_what_spans_lines_is_hidden_to_its_end():
    text = "\n".join(
        [
            "key: |",
            "  first",
            "",
            "  second",
            "port: 1",
            "-----BEGIN EC PRIVATE KEY-----",
            "c2hvcnQ=",
            "-----END EC PRIVATE KEY-----",
            "port: 2",
            "A" * 64,
        ]
    )
    hidden = record.HIDDEN
    assert record.masked(text) == [
        *("key: |", f"  {hidden}", "", f"  {hidden}", "port: 1"),
        *(hidden, hidden, hidden, "port: 2", hidden),
    ]


@given(st.text())
def test_masking_keeps_the_number_of_lines(text):
    assert len(record.masked(text)) == len(text.splitlines())


@given(st.lists(st.sampled_from(["a", "b", "password: x1", "password: x2", ""])), st.data())
def test_a_difference_shows_whether_there_is_one_and_no_secret(lines, data):
    others = data.draw(st.permutations(lines))
    shown = record.unified("\n".join(lines), "\n".join(others))
    assert bool(shown) == ("\n".join(lines).splitlines() != "\n".join(others).splitlines())
    assert "x1" not in shown
    assert "x2" not in shown


def test_a_changed_secret_is_a_difference_without_its_value():
    assert record.unified("a\nkey: old\n", "a\nkey: new\n").splitlines() == [
        "@@ -1,2 +1,2 @@",
        " a",
        f"-key: {record.HIDDEN}",
        f"+key: {record.HIDDEN}",
    ]


def test_a_long_difference_is_cut():
    shown = record.unified("", "\n".join(f"line {number}" for number in range(500))).splitlines()
    assert len(shown) == record.LONGEST_DIFF + 1
    assert shown[-1] == "... 421 more lines"
    assert len(record.unified("", "x" * 5000)) < 500


@pytest.mark.parametrize(
    ("diff", "shape"),
    [
        ({"before": "", "after": "a\n"}, "missing"),
        ([{"before": {"path": "/a", "state": "absent"}, "after": {"path": "/a", "state": "directory"}}], "missing"),
        ([{"before": "b\n", "after": "a\n"}], "content"),
        ([{"before": "b\n", "after": ""}], "content"),
        ([{"dst_binary": 1, "src_binary": 1}], "content"),
        ([{}, {"before": {"mode": "0644"}, "after": {"mode": "0600"}}], "attributes"),
        (None, "hidden"),
        ([], "hidden"),
    ],
)
def test_shapes_of_differences(diff, shape):
    assert record.shape(diff) == shape


def test_of_an_environment_file_only_owner_and_mode_are_shown():
    diff = [{"before": "A=1\n", "after": "A=2\n"}, {"before": {"mode": "0644"}, "after": {"mode": "0600"}}]
    assert record.difference(diff, "/etc/vllm/primary.env").splitlines()[1:] == ["-mode: 0644", "+mode: 0600"]
    assert "-A=1" in record.difference(diff, "/etc/vllm/primary.yaml")


@pytest.mark.parametrize(
    ("arguments", "result", "where"),
    [
        ({"dest": "/etc/x", "src": "x.j2"}, {}, "/etc/x"),
        ({"dest": "/opt/locks/", "src": "/here/a.txt"}, {}, "/opt/locks/a.txt"),
        ({"path": "/etc/x"}, {}, "/etc/x"),
        ({}, {"dest": "/etc/x"}, "/etc/x"),
        ({}, {"diff": {"before_header": "/etc/x"}}, "/etc/x"),
        ({"name": "vllm-gateway.service"}, {}, "vllm-gateway.service"),
        ({"name": ["a", "b"]}, {}, "a, b"),
        ({}, {}, ""),
    ],
)
def test_where_a_task_is_about(arguments, result, where):
    assert record.place("copy", arguments, result) == where


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"false_condition": "not ansible_check_mode"}, "its condition is not met in check mode"),
        ({"false_condition": "not (ansible_check_mode and x is changed)"}, "its condition is not met in check mode"),
        ({"false_condition": "not __cuda_unknown"}, "its condition is not met in check mode"),
        ({"false_condition": "vllm_device == 'cuda'"}, ""),
        ({"false_condition": "my_ansible_check_modes"}, ""),
        ({"msg": "Command would have run if not in check mode"}, "command does nothing in check mode"),
        ({"msg": "remote module (x) does not support check mode"}, "command does nothing in check mode"),
        ({"skipped_reason": "No items in the list"}, ""),
        ({"msg": "skipped, since /a exists"}, ""),
        ({"skipped_reason": "Verbosity threshold not met."}, ""),
        ({"censored": "hidden"}, "its result is hidden"),
    ],
)
def test_why_a_task_was_not_looked_at(result, reason):
    conditions = ["x", "not ansible_check_mode"]
    assert record.blind_reason("command", result, conditions, ["__cuda_unknown"]).startswith(reason)
    if not reason:
        assert record.blind_reason("command", result, conditions, ["__cuda_unknown"]) == ""


def test_a_hidden_result_without_a_condition_on_check_mode_was_skipped_for_another_reason():
    assert record.blind_reason("command", {"censored": "hidden"}, ["tls == 'files'"], []) == ""


def test_each_engine_is_a_change_of_its_own():
    diff = {
        "before": "vllm@a.service not enabled\nvllm@a.service failed\nvllm@b.service runs from 12\n",
        "after": "vllm@a.service enabled\nvllm@a.service active\nvllm@b.service runs from 34\n",
    }
    events = list(record.changes("h", "vllm_instances", "Bring up", "nvl.vllm.units", {}, {"diff": diff}))
    assert [(event["where"], event["found"], event["wanted"]) for event in events] == [
        ("vllm@a.service", "not enabled, failed", "enabled, active"),
        ("vllm@b.service", "runs from 12", "runs from 34"),
    ]


def test_a_service_tells_its_state():
    result = {"status": {"ActiveState": "inactive", "UnitFileState": "disabled"}}
    arguments = {"name": "vllm-gateway.service", "state": "started", "enabled": True}
    (event,) = record.changes("h", "vllm_gateway", "Run it", "systemd_service", arguments, result)
    assert (event["where"], event["found"], event["wanted"]) == (
        "vllm-gateway.service",
        "inactive, disabled",
        "started, enabled",
    )


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"msg": "no"}, "no"),
        ({"msg": "Task failed: no way"}, "no way"),
        ({"msg": "Task failed: Module failed: no way"}, "no way"),
        ({"msg": ["a", "b"]}, "a; b"),
        ({"msg": "One or more items failed", "results": [{"failed": True, "msg": "x"}, {"msg": "fine"}]}, "x"),
        ({"msg": "One or more items failed", "results": [{"failed": True}]}, "One or more items failed"),
        ({"censored": "hidden"}, "hidden"),
        ({}, "no reason was given"),
        ({"msg": f"token: {SECRET}"}, f"token: {record.HIDDEN}"),
    ],
)
def test_why_a_task_failed(result, message):
    assert record.failure(result) == message


def test_a_very_long_message_is_cut():
    assert len(record.failure({"msg": "x " * 5000})) < record.LONGEST_MESSAGE + 10


def test_names_are_the_same_on_all_hosts():
    assert record.starred("Bring {{ a }} to {{ b.c }}") == "Bring * to *"
    assert record.short("ansible.builtin.copy") == "copy"
    assert record.short("nvl.vllm.units") == "nvl.vllm.units"
