"""The gateway's statistics and refusals, as the drill sees them."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._gateway_watch import (
    Refusal,
    RefusalWatch,
    Server,
    StatisticsWatch,
    ask,
    parse_statistics,
    summarise_refusals,
)
from ansible_collections.nvl.vllm.plugins.module_utils._http import Endpoint

HEADER = "# pxname,svname,status,wretr,wredis,\n"


def test_requests_at_a_server_are_those_of_all_its_backends():
    text = "# pxname,svname,scur,status,wretr,\nengines,a,3,UP,1,\nother,a,2,DRAIN,2,\nother,b,,UP,,\n"
    assert parse_statistics(text) == {"a": Server(True, 3, 5), "b": Server(True, 0, 0)}


def page(**servers):
    """HAProxy's page with servers by name: (status, retries)."""
    rows = ["door,FRONTEND,OPEN,,,", *(f"engines,{name},{s},{r},0," for name, (s, r) in servers.items())]
    return HEADER + "\n".join([*rows, "engines,BACKEND,UP,9,9,", ""])


class Stub:
    """A stand-in for the gateway: answers GET with ``page``, POST with ``status`` and ``headers``."""

    def __init__(self):
        self.page = ""
        self.status = 503
        self.headers = {"Retry-After": "5"}
        self.asked = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(stub.page.encode())

            def do_POST(self):
                stub.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                stub.key = self.headers["Authorization"]
                self.send_response(stub.status)
                for name, value in stub.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def watch(stub):
    stub.page = page(a=("UP", 3), b=("UP", 0))
    watch = StatisticsWatch(Endpoint("statistics", f"{stub.url}/;csv"), ["a", "b"], interval=0.01)
    yield watch
    watch.stop()


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("status", "in_use"),
    [
        ("UP", True),
        ("UP 1/3", True),  # on its way down, and still used
        ("no check", True),
        ("DOWN", False),
        ("DOWN 1/2", False),
        ("DOWN (agent)", False),
        ("DRAIN (agent)", False),
        ("NOLB", False),
        ("MAINT", False),
    ],
)
def test_which_states_get_requests(status, in_use):
    assert parse_statistics(page(a=(status, 7))) == {"a": Server(in_use, 7)}


def test_a_server_of_two_backends_counts_once():
    text = page(a=("DOWN", 1)) + "other,a,UP,2,0,\n"
    assert parse_statistics(text) == {"a": Server(True, 3)}


@pytest.mark.parametrize("text", ["", "<html>", "# pxname,svname,scur\n"])
def test_a_page_that_is_no_statistics(text):
    with pytest.raises(ValueError, match="set stats_url to the page's ;csv"):
        parse_statistics(text)


def test_servers_that_go_and_come(stub, watch):
    started = time.monotonic()
    assert watch.missing() == "not read yet"
    watch.start()
    wait_until(lambda: not watch.missing())
    assert watch.ejected_at(["a"], started) is None
    stub.page = page(a=("DOWN", 5), b=("UP", 1))
    wait_until(lambda: watch.missing() == "the gateway does not use a")
    first = watch.ejected_at(["a"], started)
    assert started < first <= time.monotonic()
    assert watch.ejected_at(["a", "b"], started) is None
    assert watch.ejected_at(["a"], time.monotonic()) is None  # not since then
    stub.page = page(a=("UP", 5), b=("DOWN", 1))
    wait_until(lambda: watch.missing() == "the gateway does not use b")
    assert watch.ejected_at(["a", "b"], started) > first
    assert watch.retried() == 3  # from 3 to 5 and from 0 to 1


def test_a_gateway_that_was_replaced_counts_from_zero(stub, watch):
    watch.start()
    wait_until(lambda: not watch.missing())
    stub.page = page(a=("UP", 2), b=("UP", 0))
    wait_until(lambda: watch.retried() == 2)


def test_a_server_with_another_name(stub, watch):
    stub.page = page(a=("UP", 0), engine2=("UP", 0))
    watch.start()
    wait_until(lambda: "wanted b among the servers" in watch.missing())
    assert watch.missing().endswith("found a, engine2")


def test_statistics_that_do_not_answer(stub, watch):
    watch.start()
    wait_until(lambda: not watch.missing())
    stub.close()
    wait_until(lambda: "no answer" in watch.missing())


def test_one_request_that_is_refused(stub):
    found = ask(Endpoint("gateway", stub.url, "key"), "m")
    assert (found.status, found.retry_after, found.proper) == (503, "5", True)
    assert stub.asked[0]["max_tokens"] == 1
    assert stub.key == "Bearer key"


def test_no_answer_at_all(stub):
    stub.close()
    assert ask(Endpoint("gateway", stub.url), "m").status == 0


def test_refusals_are_collected(stub):
    watch = RefusalWatch(Endpoint("gateway", stub.url), "m", interval=0.01)
    watch.start()
    wait_until(lambda: len(watch.found) > 2)
    watch.stop()
    assert {one.status for one in watch.found} == {503}
    assert len(watch.found) == len(stub.asked)


PROPER, SLOW = Refusal(0.1, 503, "5"), Refusal(4.0, 503, "9")


@pytest.mark.parametrize(
    ("found", "count", "slowest", "improper"),
    [
        ([], 0, None, []),
        ([Refusal(0.1, 200), Refusal(0.1, 500)], 0, None, []),
        # What came before the first refusal, and what came after the last, is not judged.
        ([Refusal(9.0, 500), PROPER, SLOW, Refusal(9.0, 200)], 2, 4.0, []),
        ([PROPER, Refusal(9.0, 200), PROPER], 2, 0.1, []),
        ([PROPER, Refusal(7.0, 0), Refusal(0.2, 502), PROPER], 2, 7.0, ["HTTP 502", "no answer"]),
        ([Refusal(0.2, 503), PROPER], 1, 0.2, ["HTTP 503 without Retry-After"]),
    ],
)
def test_summary_of_refusals(found, count, slowest, improper):
    summary = summarise_refusals(found)
    assert (summary["count"], summary["slowest"], summary["improper"]) == (count, slowest, improper)
    assert summary["retry_after"] == ("5" if count else None)
