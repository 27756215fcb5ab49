"""From the engines' arguments to the gateway's numbers."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gateway as gateway
from ansible_collections.nvl.vllm.plugins.module_utils._gateway import Wanted
from ansible_collections.nvl.vllm.plugins.modules import gateway_plan
from hypothesis import given
from hypothesis import strategies as st

KIB, MIB = 2**10, 2**20
WANTED = Wanted("h100-1", "cuda", "127.0.0.1", 8000)
KEY = "k" * 32
PEM = {"tls": "files", "tls_certificate": "/etc/ssl/door.pem", "tls_key": "/etc/ssl/door.key"}


def engine(name="primary", port=8001, **arguments):
    given = {
        "max-model-len": 4096,
        "max-num-seqs": 8,
        **{key.replace("_", "-"): item for key, item in arguments.items()},
    }
    arguments = {key: item for key, item in given.items() if item is not None}
    return {"name": name, "url": f"http://127.0.0.1:{port}", "arguments": arguments}


PAIR = (engine(), engine("secondary", 8002))


def plan(*instances, **changes):
    """The plan of a declaration without a mistake."""
    made, errors = gateway.plan(dataclasses.replace(WANTED, **changes), instances or PAIR)
    assert errors == []
    assert made is not None
    return made


def errors(*instances, **changes):
    """The mistakes, without the host's name that begins each of them."""
    made, found = gateway.plan(dataclasses.replace(WANTED, **changes), instances or PAIR)
    assert made is None
    assert all(error.startswith("h100-1: ") for error in found)
    return [error.partition(": ")[2] for error in found]


# Buffers


@pytest.mark.parametrize(
    ("length", "bufsize"),
    [
        (4096, 128 * KIB),  # 48 KiB: the smallest one
        (8192, 128 * KIB),  # 96 KiB and 32 KiB of reserve fit exactly
        (8193, 256 * KIB),
        (32768, 512 * KIB),
        (131072, 2 * MIB),  # the profile h100_nvl
        (1_000_000, 16 * MIB),
        ("128K", 2 * MIB),  # as vLLM reads it: 131072
    ],
)
def test_a_buffer_holds_the_longest_prompt(length, bufsize):
    made = plan(engine(max_model_len=length))

    assert made.bufsize == bufsize
    assert made.body_limit == bufsize - 32 * KIB


def test_the_longest_engine_decides():
    assert plan(engine(), engine("secondary", 8002, max_model_len=131072)).bufsize == 2 * MIB


def test_prompts_beyond_the_largest_buffer_are_told_of():
    made = plan(engine(max_model_len=2_000_000))

    assert made.bufsize == 16 * MIB
    assert made.warnings == [
        "h100-1: the longest prompts (max-model-len 2000000) can have 24000000 bytes, and the gateway refuses bodies "
        "above 16744448: raise vllm_gateway_body_limit where that matters"
    ]


def test_a_smaller_limit_is_taken_and_told_of():
    made = plan(engine(max_model_len=131072), body_limit=200_000)

    assert (made.bufsize, made.body_limit) == (256 * KIB, 200_000)
    assert "can have 1572864 bytes, and the gateway refuses bodies above 200000" in made.warnings[0]


@given(length=st.integers(1, 2**31), limit=st.integers(0, 16 * MIB - 32 * KIB))
def test_what_is_let_in_fits_into_a_buffer(length, limit):
    made = plan(engine(max_model_len=length), body_limit=limit)

    assert made.body_limit + 32 * KIB <= made.bufsize <= 16 * MIB
    assert made.bufsize & (made.bufsize - 1) == 0
    assert made.body_limit >= min(12 * length, limit or 16 * MIB - 32 * KIB)
    assert bool(made.warnings) == (made.body_limit < 12 * length)


@pytest.mark.parametrize("length", [None, "auto"])
def test_a_length_that_nobody_says_is_asked_for(length):
    shown = "'auto'" if length else "'not set'"
    assert errors(engine(max_model_len=length)) == [
        f"max-model-len of primary is {shown}: the gateway's buffers follow from it: set a number there, or "
        "vllm_gateway_max_model_len"
    ]
    assert plan(engine(max_model_len=length), max_model_len=131072).bufsize == 2 * MIB


def test_an_argument_that_is_no_number_is_named():
    assert errors(engine(max_num_seqs="many")) == [
        "primary: max-num-seqs is 'many': wanted a whole number such as 32768, 32k (32000) or 32K (32768)"
    ]


# Requests at once


@pytest.mark.parametrize(
    ("device", "arguments", "maxconn"),
    [
        ("cuda", {"max_num_seqs": 8}, 9),
        ("cuda", {"max_num_seqs": 1}, 2),
        ("cuda", {"max_num_seqs": 64}, 72),
        ("cuda", {"max_num_seqs": None}, 1152),
        ("cpu", {"max_num_seqs": None}, 144),
        ("cuda", {"max_num_seqs": 64, "data_parallel_size": 2}, 144),
        # One place is the health agent's: its canary must not be answered with 503.
        ("cuda", {"max_num_seqs": 64, "max_num_queued_reqs": 65}, 64),
        ("cuda", {"max_num_seqs": 64, "max_num_queued_reqs": 200}, 72),
        ("cuda", {"max_num_seqs": 64, "max_num_queued_reqs": 1}, 1),
    ],
)
def test_an_engine_is_given_what_it_runs_and_a_few_more(device, arguments, maxconn):
    assert plan(engine(**arguments), device=device).servers[0].maxconn == maxconn


def test_servers_are_the_engines():
    made = plan({**engine(), "url": "http://[fd00::1]:8001"}, engine("secondary", 8002))

    assert [(server.name, server.address) for server in made.servers] == [
        ("primary", "[fd00::1]:8001"),
        ("secondary", "127.0.0.1:8002"),
    ]


@pytest.mark.parametrize(("affinity", "maxqueue"), [("none", 0), ("session", 128)])
def test_only_affinity_makes_requests_wait_for_one_engine(affinity, maxqueue):
    assert [server.maxqueue for server in plan(affinity=affinity).servers] == [maxqueue, maxqueue]


@given(seqs=st.integers(1, 4096), queue=st.integers(1, 100_000), engines=st.integers(1, 8))
def test_there_is_room_for_all_that_run_and_wait(seqs, queue, engines):
    made = plan(*(engine(f"e{n}", 9001 + n, max_num_seqs=seqs) for n in range(engines)), queue=queue)

    slots = sum(server.maxconn for server in made.servers)
    assert slots >= seqs * engines
    assert made.maxconn > slots + queue
    assert made.open_files > made.maxconn + slots
    assert made.worst_memory == 2 * made.bufsize * (slots + queue)


# Times


@pytest.mark.parametrize(
    ("device", "length", "seconds"),
    [("cuda", 4096, 420), ("cuda", 131072, 13_140), ("cpu", 4096, 1680)],
)
def test_an_engine_has_time_for_its_longest_answer(device, length, seconds):
    timeouts = plan(engine(max_model_len=length), device=device).timeouts

    assert timeouts["server"] == timeouts["client"] == seconds


def test_times_that_are_said_are_taken():
    timeouts = plan(server_timeout=77, queue_timeout=33).timeouts

    assert (timeouts["server"], timeouts["client"], timeouts["queue"]) == (77, 77, 33)


def test_the_largest_body_has_time_to_arrive():
    assert plan(engine(max_model_len=131072)).timeouts["http-request"] == 26


def test_every_number_has_its_reason():
    made = plan()

    wanted = {f"timeout {name}" for name in made.timeouts} | {f"server {server.name}" for server in made.servers}
    assert wanted | {"bufsize", "body_limit", "maxconn", "memory", "queue"} == set(made.reasons)
    assert "max-model-len 4096 x 6 bytes a token x 2 for JSON's escapes = 49152 bytes" in made.reasons["bufsize"]
    assert "128 KiB x 18 = 2 MiB while the engines are full" in made.reasons["memory"]
    assert "128 KiB x 2 x 274 = 68 MiB" in made.reasons["memory"]
    # They become comments, where a line end would begin a setting.
    assert [reason for reason in made.reasons.values() if "\n" in reason] == []


# Keys


def test_keys_become_hashes_with_names():
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    other = hashlib.sha256(b"other").hexdigest()

    made = plan(keys=[{"name": "b", "key": KEY, "sha256": None}, {"name": "a", "sha256": other.upper()}])

    assert made.keys == [f"{other} a", f"{digest} b"]
    assert made.key_names == ["a", "b"]


def test_without_keys_clients_use_the_engines():
    assert plan(api_key=KEY).keys == [f"{gateway.key_digest(KEY)} vllm_api_key"]
    assert plan().keys == []


def test_keys_of_their_own_replace_the_engines():
    assert plan(api_key=KEY, keys=[{"name": "a", "key": "a" * 32}]).key_names == ["a"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([{"name": "a b", "key": KEY}], "vllm_gateway_keys[0].name is 'a b': wanted up to 64 letters"),
        ([{"name": 'a"', "key": KEY}], "vllm_gateway_keys[0].name is 'a\"': wanted up to 64 letters"),
        ([{"name": "a"}], "vllm_gateway_keys[0] has neither of sha256 and key: wanted one"),
        (
            [{"name": "a", "key": KEY, "sha256": "0" * 64}],
            "vllm_gateway_keys[0] has both of sha256 and key: wanted one",
        ),
        ([{"name": "a", "sha256": "0" * 63}], "vllm_gateway_keys[0].sha256 is '0"),
        (
            [{"name": "a", "key": "short-secret"}],
            "vllm_gateway_keys[0].key is '***': wanted 16 to 256 ASCII characters",
        ),
        (
            [{"name": "a", "key": f"{KEY} secret"}],
            "vllm_gateway_keys[0].key is '***': wanted 16 to 256 ASCII characters",
        ),
        (
            [{"name": "a", "key": KEY}, {"name": "a", "key": KEY + "2"}],
            "vllm_gateway_keys[1].name is 'a': another key has this name",
        ),
        (
            [{"name": "a", "key": KEY}, {"name": "b", "key": KEY}],
            "vllm_gateway_keys[1].name is 'b': it is the same key as a: leave one of them out",
        ),
    ],
)
def test_mistakes_in_keys_are_named_without_showing_one(keys, message):
    (found,) = errors(keys=keys)

    assert found.startswith(message)
    assert KEY not in found
    assert "secret" not in found


def test_secrets_are_not_in_the_text_of_an_object():
    wanted = dataclasses.replace(WANTED, api_key=KEY, keys=[{"name": "a", "key": KEY}], tls_key=KEY)

    assert KEY not in repr(wanted)


# The door


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback_no_key_is_needed(host):
    assert plan(host=host).warnings == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "127.0.0.1.example.org"])
def test_beyond_loopback_a_key_is_asked_for(host):
    assert errors(host=host) == [
        f"vllm_gateway_host is {host!r}: set vllm_gateway_keys or vllm_api_key before the gateway listens beyond "
        "loopback"
    ]


def test_keys_in_clear_beyond_loopback_are_warned_of():
    (warning,) = plan(host="::", api_key=KEY).warnings

    assert warning.startswith("h100-1: vllm_gateway_host is '::' and vllm_gateway_tls is 'off': keys and prompts cross")
    assert plan(host="::", api_key=KEY, tls="self_signed").warnings == []
    assert plan(host="::", api_key=KEY).bind == "[::]:8000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 8001}, "vllm_gateway_port is 8001: it belongs to engine primary: set another port, such as 8000"),
        ({"port": 8404}, "vllm_gateway_port is 8404: it belongs to the gateway's statistics: set another port"),
        ({"port": 0}, "vllm_gateway_port is 0: wanted a whole number from 1 to 65535"),
        ({"queue": 0}, "vllm_gateway_queue is 0: wanted a whole number from 1 to 100000"),
        ({"queue_timeout": 0}, "vllm_gateway_queue_timeout is 0: wanted a whole number from 1 to 86400"),
        ({"retry_after": 0}, "vllm_gateway_retry_after is 0: wanted a whole number from 1 to 3600"),
        ({"server_timeout": -1}, "vllm_gateway_server_timeout is -1: wanted a whole number from 0 to 604800"),
        ({"body_limit": 16 * MIB}, "vllm_gateway_body_limit is 16777216: wanted a whole number from 0 to 16744448"),
        ({"affinity": "ip"}, "vllm_gateway_affinity is 'ip': wanted one of none, session"),
        ({"tls": "on"}, "vllm_gateway_tls is 'on': wanted one of off, files, self_signed"),
        ({"host": ""}, "vllm_gateway_host is '': wanted an address of the host"),
        ({"host": "127.0.0.1\n  mode tcp"}, "vllm_gateway_host is '127.0.0.1\\n  mode tcp': wanted an address"),
        (
            {**PEM, "tls_certificate": "door.pem"},
            "vllm_gateway_tls_certificate is 'door.pem': wanted the absolute path",
        ),
        ({**PEM, "tls_key": "a secret"}, "vllm_gateway_tls_key is '***': wanted the absolute path"),
        ({**PEM, "tls_key": ""}, "vllm_gateway_tls_key is '': wanted the absolute path"),
    ],
)
def test_mistakes_are_named(changes, message):
    found = errors(**{"api_key": KEY, **changes})

    assert found[0].startswith(message)


def test_certificates_are_paths_or_text():
    assert plan(**PEM).warnings == []
    assert plan(**{**PEM, "tls_key": "-----BEGIN PRIVATE KEY-----\n"}).warnings == []


def test_every_mistake_is_told_at_once():
    assert len(errors(engine(max_model_len="auto"), port=0, queue=0, affinity="ip", host="0.0.0.0")) == 5


# The module


def run(run_module, **changes):
    options = {"inventory_hostname": "h100-1", "device": "cuda", "instances": list(PAIR)}
    return run_module(gateway_plan.main, **{**options, **changes})


@pytest.mark.parametrize("check_mode", [True, False])
def test_the_module_returns_the_plan(run_module, check_mode):
    result = run(run_module, check_mode=check_mode, keys=[{"name": "a", "key": KEY}], api_key="e" * 32)

    assert result["changed"] is False
    assert result["plan"]["bind"] == "127.0.0.1:8000"
    assert [server["name"] for server in result["plan"]["servers"]] == ["primary", "secondary"]
    assert result["plan"]["keys"] == [f"{gateway.key_digest(KEY)} a"]
    assert KEY not in str(result)


def test_the_module_fails_with_every_mistake(run_module):
    result = run(run_module, port=8001, queue=0)

    assert result["failed"]
    assert len(result["errors"]) == 2
    assert result["msg"] == "\n".join(result["errors"])


def test_the_module_warns(run_module):
    result = run(run_module, host="0.0.0.0", api_key=KEY)

    assert "keys and prompts cross the network in clear" in str(result["warnings"])
