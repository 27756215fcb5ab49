# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""How a host does right now: figures of its engines, gateway and GPUs, and one screen that shows them.

Rates are from two looks at the same counters. Tokens are counted by vLLM, sessions and retries by HAProxy.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import _gpu_info, _openai
from ._http import Endpoint, EndpointError

Asker = Callable[[Endpoint, str, float], bytes]

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
PROMPT = "vllm:prompt_tokens_total"
GENERATION = "vllm:generation_tokens_total"
QUERIES = "vllm:prefix_cache_queries_total"
HITS = "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"
TTFT_SUM = "vllm:time_to_first_token_seconds_sum"
TTFT_COUNT = "vllm:time_to_first_token_seconds_count"
STARTED = "process_start_time_seconds"
NAMES = (RUNNING, WAITING, KV_USAGE, PROMPT, GENERATION, QUERIES, HITS, PREEMPTIONS, TTFT_SUM, TTFT_COUNT, STARTED)

GPU_FIELDS = (
    *("index", "name", "utilization.gpu", "memory.used", "memory.total"),
    *("temperature.gpu", "power.draw", "power.limit"),
)
BAR = 10  # characters
STYLES = {"good": "32", "bad": "31", "warn": "33", "head": "1", "dim": "2"}


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``, or None of nothing."""
    return part / whole if whole > 0 else None


def figures(before: Mapping[str, float], after: Mapping[str, float], seconds: float, now: float) -> dict[str, Any]:
    """Of one engine: tokens per second in and out, requests, KV usage and hit rate (0 to 1), uptime (s), mean TTFT (s).

    ``before`` and ``after`` are sums of :data:`NAMES`, ``seconds`` apart. A counter that went back (the engine was
    restarted in between) gives no rate. The hit rate is that of the looks' interval, or since the start where nothing
    was asked in it.
    """

    def gained(name: str) -> float | None:
        if name not in before or name not in after or after[name] < before[name]:
            return None
        return after[name] - before[name]

    def rate(name: str) -> float | None:
        count = gained(name)
        return None if count is None else count / seconds

    recent = ratio(gained(HITS) or 0.0, gained(QUERIES) or 0.0)
    return {
        "running": after.get(RUNNING),
        "waiting": after.get(WAITING),
        "kv_usage": after.get(KV_USAGE),
        "prompt_tokens_per_second": rate(PROMPT),
        "generation_tokens_per_second": rate(GENERATION),
        "hit_rate": ratio(after.get(HITS, 0.0), after.get(QUERIES, 0.0)) if recent is None else recent,
        "ttft_seconds": ratio(gained(TTFT_SUM) or 0.0, gained(TTFT_COUNT) or 0.0),
        "preemptions": after.get(PREEMPTIONS),
        "uptime_seconds": now - after[STARTED] if STARTED in after else None,
    }


def gateway_figures(page: str) -> dict[str, Any]:
    """Sessions, queue, retries and state of each server, from HAProxy's statistics as CSV. Raises ValueError.

    ``queues`` has, for each server, the requests that wait for it and those that wait for whichever is free first.
    HAProxy counts a request in one of the two only.
    """
    table = csv.DictReader(page.lstrip("# ").splitlines())
    try:
        servers = {row["svname"]: row for row in table if row["pxname"] == "engines"}
        engines = servers.pop("BACKEND")
        unassigned = int(engines["qcur"] or 0)
        waiting = {name: int(row["qcur"] or 0) for name, row in servers.items()}
        return {
            "sessions": int(engines["scur"] or 0),
            "queue": unassigned + sum(waiting.values()),
            "queues": {name: unassigned + count for name, count in waiting.items()},
            "retries": int(engines["wretr"] or 0),
            "errors_5xx": int(engines["hrsp_5xx"] or 0),
            "servers": {name: row["status"] for name, row in servers.items()},
        }
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"wanted HAProxy's statistics with a backend engines, found {page[:60]!r}") from problem


def agent_words(page: str) -> dict[str, str]:
    """What the health agent tells the gateway of each engine, from its ``/status``. Raises ValueError."""
    try:
        return {str(name): str(one["word"]) for name, one in json.loads(page)["instances"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise ValueError(
            f"wanted the health agent's word on each engine from /status, found {page[:60]!r}"
        ) from problem


def parse_gpus(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """GPUs from ``nvidia-smi``, asked for :data:`GPU_FIELDS`, and lines that are of no GPU.

    MiB, degrees Celsius, W; None where it cannot tell.
    """
    gpus, stray = [], []
    for line in filter(str.strip, text.splitlines()):
        row = [cell.strip() for cell in line.split(",")]
        if len(row) != len(GPU_FIELDS) or not row[0].isdigit():
            stray.append(line.strip())
            continue
        index, name, *values = row
        numbers: list[float | None] = []
        for value in values:
            try:
                numbers.append(float(value))
            except ValueError:  # "[N/A]"
                numbers.append(None)
        keys = ("utilization", "used_mib", "total_mib", "temperature_c", "power_w", "power_cap_w")
        gpus.append({"index": index, "name": name, **dict(zip(keys, numbers))})
    return gpus, stray


def read_gpus(run: _gpu_info.TimedRunner, timeout: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The GPUs that can be told of, and why not more."""
    argv = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        status, out, error = run(argv, timeout)
    except FileNotFoundError:
        return [], [_gpu_info.MISSING.sentence]
    except TimeoutError:
        return [], [_gpu_info.hang(timeout).sentence]
    except OSError as problem:
        return [], [f"nvidia-smi: {problem}"]
    gpus, stray = parse_gpus(out)
    if status != 0:
        # One GPU that fell off the bus (15), or whose infoROM is corrupted (14), and the others are well.
        return gpus, [_gpu_info.explain(status, out + error).sentence]
    return gpus, [f"nvidia-smi says: {line}" for line in stray]


def read(
    endpoints: Sequence[Endpoint],
    agent: Endpoint | None,
    statistics: Endpoint | None,
    gpus: bool,
    window: float,
    timeout: float,
    *,
    ask: Asker = _openai.get,
    run: _gpu_info.TimedRunner = _gpu_info.run_command,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Everything of one host. What cannot be asked is None, with the reason in ``problems``. ``window`` in seconds."""
    problems: list[str] = []

    def page(endpoint: Endpoint, path: str) -> str | None:
        try:
            return ask(endpoint, path, timeout).decode("utf-8", "replace")
        except EndpointError as error:
            problems.append(str(error))
            return None

    def sums(endpoint: Endpoint) -> tuple[float, dict[str, float]]:
        return clock(), _openai.metric_sums(page(endpoint, "/metrics") or "", NAMES)

    before = [sums(endpoint) for endpoint in endpoints]
    problems.clear()  # The second look finds them again.
    sleep(window)
    instances = {}
    for endpoint, (began, first) in zip(endpoints, before):
        now, second = sums(endpoint)
        instances[endpoint.name] = figures(first, second, now - began, now)
    host: dict[str, Any] = {"instances": instances, "agent": None, "gateway": None, "gpus": []}
    services: list[tuple[str, Endpoint | None, str, Callable[[str], dict[str, Any]]]] = [
        ("agent", agent, "/status", agent_words),
        ("gateway", statistics, "/;csv", gateway_figures),
    ]
    for key, service, path, parse in services:
        if service is not None and (text := page(service, path)) is not None:
            try:
                host[key] = parse(text)
            except ValueError as problem:
                problems.append(f"{service}: {problem}")
    if gpus:
        host["gpus"], why = read_gpus(run, timeout)
        problems += why
    return {**host, "problems": problems}


def painted(text: str, style: str, colour: bool) -> str:
    """The text in a terminal's colour."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if colour and style else text


def bar(share: float | None) -> str:
    """A share (0 to 1) as a bar and a percentage."""
    if share is None:
        return "-"
    filled = min(BAR, max(0, round(share * BAR)))
    return f"{'█' * filled}{'░' * (BAR - filled)} {share * 100:3.0f} %"


def age(seconds: float | None) -> str:
    """A time span in its two largest units."""
    if seconds is None:
        return "-"
    minutes = int(max(seconds, 0)) // 60
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _count(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def state(name: str, host: Mapping[str, Any]) -> tuple[str, str]:
    """What an instance is, in a word or two, and the style of it."""
    silent = host["instances"][name]["running"] is None
    word = (host["agent"] or {}).get(name)
    server = (host["gateway"] or {"servers": {}})["servers"].get(name, "")
    if silent:
        return "no answer", "bad"
    if word is not None and not word.startswith("up"):
        return word, "warn" if word.startswith("drain") else "bad"
    if server and not server.startswith(("UP", "no check")):
        return f"gateway: {server}", "warn"
    return "serves", "good"


def _table(rows: Sequence[Sequence[tuple[str, str]]], colour: bool) -> list[str]:
    """Columns, padded before they are painted, as colours have no width."""
    widths = [max(len(row[column][0]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(painted(text.ljust(width), style, colour) for (text, style), width in zip(row, widths)).rstrip()
        for row in rows
    ]


def _head(*titles: str) -> list[tuple[str, str]]:
    return [(title, "dim") for title in titles]


def host_lines(name: str, host: Mapping[str, Any], colour: bool) -> list[str]:
    """One host's part of the screen."""
    rows = [_head("INSTANCE", "STATE", "UP", "RUN", "WAIT", "TOK/S IN", "OUT", "KV CACHE", "HITS", "TTFT")]
    for instance, one in sorted(host["instances"].items()):
        ttft = one["ttft_seconds"]
        hits = one["hit_rate"]
        kv_style = "bad" if (one["kv_usage"] or 0) >= 0.95 else ""
        rows.append(
            [
                (instance, ""),
                state(instance, host),
                (age(one["uptime_seconds"]), ""),
                (_count(one["running"]), ""),
                (_count(one["waiting"]), "warn" if one["waiting"] else ""),
                (_count(one["prompt_tokens_per_second"]), ""),
                (_count(one["generation_tokens_per_second"]), ""),
                (bar(one["kv_usage"]), kv_style),
                ("-" if hits is None else f"{hits * 100:.0f} %", ""),
                ("-" if ttft is None else f"{ttft * 1000:,.0f} ms", ""),
            ]
        )
    lines = [painted(name, "head", colour), *_table(rows, colour)]
    if host["gateway"]:
        door = host["gateway"]
        up = sum(status.startswith(("UP", "no check")) for status in door["servers"].values())
        style = "good" if up == len(door["servers"]) else "warn" if up else "bad"
        count = painted(f"{up} of {len(door['servers'])} engines", style, colour)
        lines += [
            "",
            f"Gateway   {count}, {door['sessions']} sessions, {door['queue']} queued; "
            f"since its start {door['retries']} retries, {door['errors_5xx']} answers 5xx",
        ]
    if host["gpus"]:
        rows = [_head("GPU", "NAME", "UTIL", "MEMORY", "TEMP", "POWER")]
        for gpu in host["gpus"]:
            memory = ratio(gpu["used_mib"] or 0, gpu["total_mib"] or 0)
            rows.append(
                [
                    (gpu["index"], ""),
                    (gpu["name"], ""),
                    (bar(None if gpu["utilization"] is None else gpu["utilization"] / 100), ""),
                    (f"{bar(memory)} of {(gpu['total_mib'] or 0) / 1024:.0f} GiB", ""),
                    (f"{_count(gpu['temperature_c'])} °C", ""),
                    (f"{_count(gpu['power_w'])} of {_count(gpu['power_cap_w'])} W", ""),
                ]
            )
        lines += ["", *_table(rows, colour)]
    return lines + [painted(problem, "bad", colour) for problem in host["problems"]]


def screen(hosts: Mapping[str, Mapping[str, Any]], colour: bool = False) -> str:
    """All hosts on one screen; a host without figures could not be looked at."""
    parts = []
    for name, host in sorted(hosts.items()):
        if "instances" in host:
            parts.append("\n".join(host_lines(name, host, colour)))
        else:
            parts.append(f"{painted(name, 'head', colour)}\n{painted(host.get('msg', 'not reached'), 'bad', colour)}")
    return "\n\n".join(parts)
