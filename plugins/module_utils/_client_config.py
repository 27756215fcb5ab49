# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The configuration of the agent platform, worked out from what the servers declare.

Times are seconds, lengths tokens. ``Servers`` are facts of each GPU host as role ``agentic_client`` collects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._memory_budget import MemoryPlanError, whole_number

Server = Mapping[str, Any]

ANY = ("0.0.0.0", "::", "*")  # all addresses of a host
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Where no gateway is planned, which knows how long the longest prompt may take.
FIRST_TOKEN_SECONDS = 300
# How long a whole answer may take beyond its first token: a long one of a busy engine.
ANSWER_SECONDS = 1800


class ClientConfigError(ValueError):
    """What is declared gives no configuration that can work; a sentence for each mistake."""


@dataclass(frozen=True)
class Wanted:
    """The role's variables, without their prefix. 0 is "work it out"."""

    mode: str = "gateway"
    reply_reserve: int = 1024
    max_concurrent: int = 0
    connect_timeout: float = 5
    first_token_timeout: float = 0
    idle_timeout: float = 60
    total_timeout: float = 0
    health_interval: float = 30
    health_timeout: float = 10
    attempts: int = 4
    backoff: Sequence[float] = (2, 4, 8, 16)
    key_path: str = ""
    key_env: str = ""
    ca_file: str = ""


def _url(scheme: str, address: str, port: int) -> str:
    return f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}/v1"


def _reached(client: str, server: Server, listens: str, variable: str, errors: list[str]) -> str:
    """The address that the client reaches a server's port at."""
    here = client == server["host"]
    if listens in LOOPBACK and not here:
        errors.append(
            f"{server['host']}: {variable} is {listens}, which only clients on that host reach, and {client} is "
            f"another: set {variable} to an address that {client} reaches, or to 0.0.0.0"
        )
    if listens not in (*ANY, *LOOPBACK):
        return listens
    if here:
        return "127.0.0.1"
    address = str(server["address"])
    if listens in ANY and address in LOOPBACK:
        errors.append(
            f"{server['host']}: {variable} is {listens}, and ansible_host is {address}, which {client} does not reach "
            f"it at: set {variable} to the address that it does"
        )
    return address


def _endpoints(client: str, servers: Sequence[Server], wanted: Wanted, errors: list[str]) -> list[dict[str, str]]:
    found = []
    several = len(servers) > 1
    for server in servers:
        gateway = server["gateway"]
        if wanted.mode == "gateway":
            if not gateway["enabled"]:
                errors.append(
                    f"{server['host']}: vllm_gateway_enabled is false, and agentic_client_mode is gateway: enable the "
                    "gateway, or set agentic_client_mode to endpoints"
                )
                continue
            address = _reached(client, server, gateway["host"], "vllm_gateway_host", errors)
            scheme = "http" if gateway["tls"] == "off" else "https"
            if gateway["tls"] == "self_signed" and not wanted.ca_file:
                errors.append(
                    f"{server['host']}: vllm_gateway_tls is self_signed, which {client} does not trust: set "
                    "agentic_client_ca_file to a copy of that certificate (without its key)"
                )
            found.append({"name": server["host"], "url": _url(scheme, address, gateway["port"])})
            continue
        for instance in server["instances"]:
            address = _reached(client, server, instance["host"], "vllm_host", errors)
            name = f"{server['host']}-{instance['name']}" if several else instance["name"]
            found.append({"name": name, "url": _url("http", address, instance["port"])})
    return list({one["url"]: one for one in found}.values())


def _count(server: Server, instance: Mapping[str, Any], name: str, errors: list[str]) -> int:
    """An argument as vLLM reads it; 0 where there is none, or vLLM works it out."""
    try:
        return max(whole_number(instance[name], f"{name.replace('_', '-')} of {instance['name']}"), 0)
    except MemoryPlanError as error:
        errors.append(f"{server['host']}: {error}")
        return 0


def concurrency(places: Sequence[int], clients: int) -> tuple[int, str]:
    """Requests at the same time of one client host, and why.

    What the engines run at once (``places``: max-num-seqs of each) without the largest of them, so that nothing has to
    queue when one is away, shared by the client hosts.
    """
    left = sum(places) - max(places) if len(places) > 1 else sum(places)
    share = max(1, left // max(1, clients))
    away = " when the largest engine is away" if len(places) > 1 else ""
    return share, f"max-num-seqs leaves {left} places{away}, for {clients} client host{'s' if clients != 1 else ''}"


def client_config(client: str, servers: Sequence[Server], clients: int, wanted: Wanted) -> dict[str, Any]:
    """``config`` (see config.schema.json) and ``reasons`` of its numbers by name.

    ``clients`` is the number of client hosts. Raises ClientConfigError with all mistakes at once.
    """
    errors: list[str] = []
    if not servers:
        raise ClientConfigError(
            f"{client}: found no server; agentic_client_servers must be a group with GPU hosts in it"
        )
    endpoints = _endpoints(client, servers, wanted, errors)
    engines = [(server, instance) for server in servers for instance in server["instances"]]
    lengths = [_count(server, instance, "max_model_len", errors) for server, instance in engines]
    length = min(lengths)
    window = length - wanted.reply_reserve
    if length <= 0:
        errors.append(
            f"{client}: an engine's max-model-len is not known before it runs: wanted a number in the engines' "
            "arguments, as the window is made from it"
        )
    elif wanted.reply_reserve <= 0 or window <= 0:
        errors.append(
            f"{client}: agentic_client_reply_reserve is {wanted.reply_reserve}: wanted 1 to {length - 1} tokens, "
            f"less than max-model-len ({length})"
        )
    names = {server["model"] for server in servers}
    if len(names) > 1:
        errors.append(
            f"{client}: the servers serve {', '.join(sorted(names))}: wanted one vllm_served_model_name for all of "
            "agentic_client_servers"
        )
    places = [_count(server, instance, "max_num_seqs", errors) for server, instance in engines]
    most, reason = concurrency(places, clients)
    if wanted.max_concurrent < 0 or (min(places) > 0 and wanted.max_concurrent > sum(places)):
        errors.append(
            f"{client}: agentic_client_max_concurrent is {wanted.max_concurrent}: wanted 1 to {sum(places)}, what all "
            "engines run at once (max-num-seqs), or 0 to have it worked out"
        )
    elif min(places) <= 0 and not wanted.max_concurrent:
        errors.append(
            f"{client}: an engine declares no max-num-seqs, which agentic_client_max_concurrent is made from: set that"
        )
    plans = [server["gateway"]["server_timeout"] for server in servers if server["gateway"]["server_timeout"]]
    first = wanted.first_token_timeout or max(plans, default=FIRST_TOKEN_SECONDS)
    total = wanted.total_timeout or first + ANSWER_SECONDS
    for name in ("connect_timeout", "idle_timeout", "health_interval", "health_timeout"):
        if getattr(wanted, name) <= 0:
            errors.append(f"{client}: agentic_client_{name} is {getattr(wanted, name):g} s: wanted more than 0")
    if total < first:
        errors.append(
            f"{client}: agentic_client_total_timeout is {total:g} s: wanted at least the {first:g} s that the first "
            "token may take (agentic_client_first_token_timeout)"
        )
    if wanted.attempts < 0 or len(wanted.backoff) < 1 or any(pause < 0 for pause in wanted.backoff):
        errors.append(
            f"{client}: agentic_client_attempts is {wanted.attempts} and agentic_client_backoff is "
            f"{list(wanted.backoff)}: wanted 0 or more attempts, and pauses of 0 s or more"
        )
    if errors:
        raise ClientConfigError("\n".join(errors))
    llm: dict[str, Any] = {
        "model_name": names.pop(),
        "mode": wanted.mode,
        "endpoints": endpoints,
        "timeouts": {
            "connect": wanted.connect_timeout,
            "first_token": first,
            "idle": wanted.idle_timeout,
            "total": total,
        },
        "health_check": {"interval": wanted.health_interval, "timeout": wanted.health_timeout},
        "retry": {"attempts": wanted.attempts, "backoff_seconds": list(wanted.backoff)},
        "max_concurrent": wanted.max_concurrent or most,
    }
    if wanted.key_env:
        llm["api_key_env"] = wanted.key_env
    elif wanted.key_path:
        llm["api_key_file"] = wanted.key_path
    if wanted.ca_file:
        llm["ca_file"] = wanted.ca_file
    return {
        "config": {
            "llm": llm,
            "conversation": {"window_tokens": window, "reply_reserve_tokens": wanted.reply_reserve},
        },
        "reasons": {
            "max_concurrent": "declared" if wanted.max_concurrent else reason,
            "window_tokens": f"max-model-len {length} minus {wanted.reply_reserve} for the reply",
            "first_token": "declared"
            if wanted.first_token_timeout
            else "the gateway's timeout for the longest prompt"
            if plans
            else "no gateway says how long the longest prompt may take",
        },
    }
