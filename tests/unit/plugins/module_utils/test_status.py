"""The status screen: figures from two looks, and what a person sees of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _status
from ansible_collections.nvl.vllm.plugins.module_utils._http import ConnectFailed, Endpoint

STATISTICS = (
    "# pxname,svname,qcur,scur,wretr,hrsp_5xx,status,\n"
    "door,FRONTEND,,3,,0,OPEN,\n"
    "engines,primary,0,2,1,0,UP,\n"
    "engines,secondary,2,0,0,0,DOWN (agent),\n"
    "engines,BACKEND,4,2,1,5,UP,\n"
)
GPU = "0, NVIDIA H100 NVL, 87, 78000, 95830, 61, 312.50, 400.00\n1, NVIDIA H100 NVL, [N/A], 3, 95830, 30, 60, 400\n"


def page(started: float = 0, **values: float) -> bytes:
    lines = [f'vllm:{name}{{engine="0",model_name="m"}} {value}' for name, value in values.items()]
    return "\n".join([*lines, f"process_start_time_seconds {started}", ""]).encode()


class Pages:
    """Answers of a host, each address with one for each look; the last one is repeated."""

    def __init__(self, pages: dict[str, list[bytes]]) -> None:
        self.pages = pages

    def __call__(self, endpoint: Endpoint, path: str, seconds: float) -> bytes:
        left = self.pages.get(f"{endpoint.url}{path}")
        if not left:
            raise ConnectFailed(f"{endpoint}: connection refused")
        return left.pop(0) if len(left) > 1 else left[0]


def look(pages: dict[str, list[bytes]], gpus: bool = False, run: Callable[..., Any] | None = None) -> dict[str, Any]:
    ticks = iter(range(1000, 2000, 2))
    return _status.read(
        [Endpoint("primary", "http://127.0.0.1:8001"), Endpoint("secondary", "http://127.0.0.1:8002")],
        Endpoint("health agent", "http://127.0.0.1:8405"),
        Endpoint("gateway", "http://127.0.0.1:8404"),
        gpus,
        1.0,
        5.0,
        ask=Pages(pages),
        run=run or (lambda argv, timeout: pytest.fail("nvidia-smi was asked")),
        sleep=lambda seconds: None,
        clock=lambda: float(next(ticks)),
    )


def everything() -> dict[str, list[bytes]]:
    first = page(500, num_requests_running=1, prompt_tokens_total=100, generation_tokens_total=10)
    second = page(
        500,
        num_requests_running=2,
        num_requests_waiting=3,
        kv_cache_usage_perc=0.5,
        prompt_tokens_total=500,
        generation_tokens_total=50,
        prefix_cache_queries_total=200,
        prefix_cache_hits_total=50,
    )
    words = {"instances": {"primary": {"word": "up ready"}, "secondary": {"word": "down #no token"}}}
    return {
        "http://127.0.0.1:8001/metrics": [first, second],
        "http://127.0.0.1:8002/metrics": [second],
        "http://127.0.0.1:8405/status": [json.dumps(words).encode()],
        "http://127.0.0.1:8404/;csv": [STATISTICS.encode()],
    }


def test_rates_are_what_was_gained_per_second():
    found = look(everything())
    primary = found["instances"]["primary"]
    # The clock of the test ticks 2 s, and each look reads it once: 4 s between the two looks at one engine.
    assert primary["prompt_tokens_per_second"] == 400 / 4
    assert primary["generation_tokens_per_second"] == 40 / 4
    assert (primary["running"], primary["waiting"], primary["kv_usage"]) == (2, 3, 0.5)
    assert primary["uptime_seconds"] == 1004 - 500
    assert found["problems"] == []


def test_a_hit_rate_is_of_the_window_or_else_since_the_start():
    before = {_status.QUERIES: 100.0, _status.HITS: 0.0}
    after = {_status.QUERIES: 200.0, _status.HITS: 80.0}
    assert _status.figures(before, after, 1, 0)["hit_rate"] == 0.8
    assert _status.figures(after, after, 1, 0)["hit_rate"] == 0.4
    assert _status.figures({}, {}, 1, 0)["hit_rate"] is None


def test_an_engine_that_was_restarted_in_between_has_no_rate():
    assert _status.figures({_status.PROMPT: 9.0}, {_status.PROMPT: 1.0}, 1, 0)["prompt_tokens_per_second"] is None


def test_a_mean_first_token_is_of_the_window():
    before = {_status.TTFT_SUM: 10.0, _status.TTFT_COUNT: 5.0}
    after = {_status.TTFT_SUM: 11.0, _status.TTFT_COUNT: 7.0}
    assert _status.figures(before, after, 1, 0)["ttft_seconds"] == 0.5
    assert _status.figures(after, after, 1, 0)["ttft_seconds"] is None


def test_who_does_not_answer_is_told_once():
    pages = everything()
    del pages["http://127.0.0.1:8002/metrics"], pages["http://127.0.0.1:8404/;csv"]
    found = look(pages)
    assert found["instances"]["secondary"]["running"] is None
    assert found["gateway"] is None
    assert [problem.split(" ")[0] for problem in found["problems"]] == ["secondary", "gateway"]


def test_gateway_figures():
    assert _status.gateway_figures(STATISTICS) == {
        "sessions": 2,
        # Two wait for the secondary alone, four for whichever is free first.
        "queue": 6,
        "queues": {"primary": 4, "secondary": 6},
        "retries": 1,
        "errors_5xx": 5,
        "servers": {"primary": "UP", "secondary": "DOWN (agent)"},
    }
    for page_ in ("<html>", "", STATISTICS.replace("engines,BACKEND,4", "engines,BACKEND,x")):
        with pytest.raises(ValueError, match="backend engines"):
            _status.gateway_figures(page_)


def test_gpus_are_read_in_the_order_that_they_are_asked_in():
    (first, second), stray = _status.parse_gpus(GPU)
    assert stray == []
    assert first == {
        "index": "0",
        "name": "NVIDIA H100 NVL",
        "utilization": 87,
        "used_mib": 78000,
        "total_mib": 95830,
        "temperature_c": 61,
        "power_w": 312.5,
        "power_cap_w": 400,
    }
    assert second["utilization"] is None
    assert _status.parse_gpus("No devices were found\n") == ([], ["No devices were found"])


def raising(error: Exception) -> Callable[..., Any]:
    def run(argv: list[str], timeout: float) -> tuple[int, str, str]:
        raise error

    return run


LOST = "Unable to determine the device handle for GPU1: 0000:AE:00.0: GPU is lost.\n"


@pytest.mark.parametrize(
    ("run", "many", "told"),
    [
        (lambda argv, timeout: (9, "", "NVIDIA-SMI has failed"), 0, "the NVIDIA driver is not loaded"),
        (raising(TimeoutError()), 0, "nvidia-smi did not answer within 5 s"),
        (raising(FileNotFoundError()), 0, "nvidia-smi is not there: install the NVIDIA driver"),
        (raising(PermissionError("Permission denied")), 0, "nvidia-smi: Permission denied"),
        (lambda argv, timeout: (0, f"{GPU}WARNING: something\n", ""), 2, "nvidia-smi says: WARNING: something"),
        (lambda argv, timeout: (14, f"{GPU}WARNING: infoROM is corrupted\n", ""), 2, "the infoROM of a GPU"),
        (lambda argv, timeout: (15, GPU, LOST), 2, "a GPU has fallen off the bus"),
    ],
)
def test_nvidia_smi_that_fails_is_a_problem_and_what_it_told_is_kept(run: Callable[..., Any], many: int, told: str):
    found = look(everything(), gpus=True, run=run)
    assert len(found["gpus"]) == many
    (problem,) = found["problems"]
    assert problem.startswith(told)


@pytest.mark.parametrize("said", ["", "<html>", "[]", '{"instances": {"primary": {}}}', '{"instances": ["primary"]}'])
@pytest.mark.parametrize("service", ["health agent", "gateway"])
def test_a_service_that_answers_something_else_is_a_problem_and_not_an_error(service: str, said: str):
    pages = everything()
    address = {"health agent": "http://127.0.0.1:8405/status", "gateway": "http://127.0.0.1:8404/;csv"}[service]
    pages[address] = [said.encode()]
    found = look(pages)
    assert found[{"health agent": "agent", "gateway": "gateway"}[service]] is None
    (problem,) = found["problems"]
    assert problem.startswith(f"{service} (http://127.0.0.1:84")
    assert problem.endswith(f"found {said!r}")


def test_the_screen_shows_states_as_agent_and_gateway_see_them():
    host = look(everything(), gpus=True, run=lambda argv, timeout: (0, GPU, ""))
    shown = _status.screen({"one": host, "two": {"msg": "connection refused"}})
    lines = shown.splitlines()
    assert lines[0] == "one"
    assert lines[2].split()[:2] == ["primary", "serves"]
    assert "down #no token" in lines[3]
    assert "█████░░░░░  50 %" in lines[2]
    assert "1 of 2 engines, 2 sessions, 6 queued; since its start 1 retries, 5 answers 5xx" in shown
    assert "312 of 400 W" in shown
    assert shown.endswith("two\nconnection refused")
    assert "\033" not in shown
    assert max(map(len, lines)) <= 100


def test_colours_do_not_move_columns():
    host = look(everything())
    plain = _status.screen({"one": host})
    coloured = _status.screen({"one": host}, colour=True)
    assert "\033[31mdown #no token\033[0m" in coloured
    stripped = coloured
    for code in ("\033[0m", *(f"\033[{style}m" for style in _status.STYLES.values())):
        stripped = stripped.replace(code, "")
    assert [line.rstrip() for line in stripped.splitlines()] == plain.splitlines()


@pytest.mark.parametrize(
    ("silent", "word", "server", "wanted"),
    [
        (True, "up ready", "UP", "no answer"),
        (False, "drain", "DRAIN", "drain"),
        (False, "up ready", "MAINT", "gateway: MAINT"),
        (False, None, "", "serves"),
    ],
)
def test_the_worst_that_is_known_is_the_state(silent: bool, word: str | None, server: str, wanted: str):
    host = {
        "instances": {"a": {"running": None if silent else 0}},
        "agent": {"a": word} if word else None,
        "gateway": {"servers": {"a": server}} if server else None,
    }
    assert _status.state("a", host)[0] == wanted


@pytest.mark.parametrize(("seconds", "shown"), [(None, "-"), (59, "0 min"), (3700, "1 h 1 min"), (90000, "1 d 1 h")])
def test_an_age_in_its_two_largest_units(seconds: float | None, shown: str):
    assert _status.age(seconds) == shown
