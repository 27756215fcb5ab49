"""What the dashboards of one engine and of the GPUs show."""

from __future__ import annotations

from dashboard_panels import (
    ENGINE,
    GPU,
    HALF_FULL,
    NONE_IS_GOOD,
    STATES,
    Board,
    Panel,
    Tiles,
    Timeline,
    quantiles,
    rate,
    share,
    state,
)

INSTANCE = Board(
    "nvl-vllm-instance",
    "vLLM: one engine",
    "An engine in detail: where the time goes, what it works on, what the health agent sees.",
    {"host": "up", "instance": "vllm_health_drained"},
    {
        "State": (
            Timeline(
                "State",
                "What the health agent thinks of the engine.",
                "none",
                {"{{host}} {{instance}}": state(ENGINE)},
                words=STATES,
            ),
            Tiles(
                "Runs since",
                "Age of the engine's process. Short where nobody restarted it means that it crashed or hung.",
                "s",
                {"{{instance}}": f'time() - process_start_time_seconds{{{ENGINE}, job="vllm"}}'},
            ),
            Tiles(
                "Drained",
                "Whether a drain file keeps the engine out of use.",
                "none",
                {"{{instance}}": f"vllm_health_drained{{{ENGINE}}}"},
                thresholds={None: "green", 1: "orange"},
                words={0: ("no", "green"), 1: ("drained", "orange")},
            ),
            Tiles(
                "Restarted for a hang",
                "Times in 24 hours that the health agent killed the engine, as it hung.",
                "short",
                {"{{instance}}": f"increase(vllm_health_restarts_total{{{ENGINE}}}[24h])"},
                thresholds=NONE_IS_GOOD,
            ),
        ),
        "Latency": (
            Panel(
                "Time to first token",
                "From the request's arrival at the engine to its first token: queue and prefill.",
                "s",
                quantiles("vllm:time_to_first_token_seconds", ENGINE, "instance"),
            ),
            Panel(
                "Between tokens",
                "Time from one token to the next. It grows with the number of requests that run.",
                "s",
                quantiles("vllm:inter_token_latency_seconds", ENGINE, "instance"),
            ),
            Panel(
                "Whole request",
                "From arrival to the last token.",
                "s",
                quantiles("vllm:e2e_request_latency_seconds", ENGINE, "instance"),
            ),
            Panel(
                "Queue",
                "Time that a request waits in the engine before it is computed at all.",
                "s",
                quantiles("vllm:request_queue_time_seconds", ENGINE, "instance"),
            ),
            Panel(
                "Prefill",
                "Time in which the prompt is read.",
                "s",
                quantiles("vllm:request_prefill_time_seconds", ENGINE, "instance"),
            ),
            Panel(
                "Decode",
                "Time from the first token to the last.",
                "s",
                quantiles("vllm:request_decode_time_seconds", ENGINE, "instance"),
            ),
        ),
        "Work": (
            Panel(
                "Requests in the engine",
                "Running, and waiting by reason: capacity (no place) or deferred (held back for another reason).",
                "short",
                {
                    "{{instance}} running": f"vllm:num_requests_running{{{ENGINE}}}",
                    "{{instance}} waiting: {{reason}}": f"vllm:num_requests_waiting_by_reason{{{ENGINE}}}",
                },
            ),
            Panel(
                "Tokens",
                "Prompt tokens by where they came from, and tokens that were generated.",
                "tokens/s",
                {
                    "{{instance}} prompt: {{source}}": rate(
                        f"vllm:prompt_tokens_by_source_total{{{ENGINE}}}", "instance, source"
                    ),
                    "{{instance}} generated": rate(f"vllm:generation_tokens_total{{{ENGINE}}}", "instance"),
                },
            ),
            Panel(
                "Finished requests",
                "By reason: stop (the model ended), length (max_tokens), abort (the client went), error.",
                "reqps",
                {
                    "{{instance}} {{finished_reason}}": rate(
                        f"vllm:request_success_total{{{ENGINE}}}", "instance, finished_reason"
                    )
                },
                stacked=True,
            ),
            Panel(
                "Prompt length",
                "Tokens of a request's prompt.",
                "short",
                quantiles("vllm:request_prompt_tokens", ENGINE, "instance"),
            ),
            Panel(
                "Answer length",
                "Tokens of a request's answer.",
                "short",
                quantiles("vllm:request_generation_tokens", ENGINE, "instance"),
            ),
            Panel(
                "Answers of the API server",
                "By class of the status, canaries and scrapes included. 5xx is the engine's fault.",
                "reqps",
                {"{{instance}} {{status}}": rate(f"http_requests_total{{{ENGINE}}}", "instance, status")},
            ),
        ),
        "KV cache": (
            Panel(
                "In use",
                "Near 100 % requests wait or are preempted.",
                "percentunit",
                {"{{instance}}": f"vllm:kv_cache_usage_perc{{{ENGINE}}}"},
                maximum=1,
                thresholds=HALF_FULL,
            ),
            Panel(
                "Preemptions",
                "Requests put back and computed again, as their cache was needed. Each costs its prefill once more.",
                "reqps",
                {"{{instance}}": rate(f"vllm:num_preemptions_total{{{ENGINE}}}", "instance")},
            ),
            Panel(
                "Prefix cache hit rate",
                "Share of the prompt tokens that need no prefill.",
                "percentunit",
                {
                    "{{instance}}": share(
                        f"vllm:prefix_cache_hits_total{{{ENGINE}}}",
                        f"vllm:prefix_cache_queries_total{{{ENGINE}}}",
                        "instance",
                    )
                },
                maximum=1,
            ),
        ),
        "Health agent and process": (
            Panel(
                "Canaries",
                "Completions of one token that the agent asks for, by result. Failed ones are a sign of a hang.",
                "reqps",
                {"{{instance}} {{result}}": rate(f"vllm_health_canaries_total{{{ENGINE}}}", "instance, result")},
            ),
            Panel(
                "Since the last progress",
                "Time since a token came out or a canary was answered. An idle engine has one every 10 s.",
                "s",
                {"{{instance}}": f"vllm_health_last_progress_seconds{{{ENGINE}}}"},
            ),
            Panel(
                "Memory of the API server",
                "Resident memory of the process, on the host. The model is elsewhere: on the GPU.",
                "bytes",
                {"{{instance}}": f'process_resident_memory_bytes{{{ENGINE}, job="vllm"}}'},
            ),
        ),
    },
)

#: Bits of DCGM_FI_DEV_CLOCKS_EVENT_REASONS that slow a GPU down.
THROTTLES = {4: "power cap", 8: "hardware", 32: "temperature", 64: "temperature, hardware", 128: "power brake"}

GPUS = Board(
    "nvl-vllm-gpu",
    "vLLM: GPUs",
    "The boards below the engines: load, power, temperature, errors.",
    {"host": "up", "gpu": "DCGM_FI_DEV_GPU_UTIL"},
    {
        "Load": (
            Panel(
                "Utilisation",
                "Share of the time in which a kernel ran.",
                "percent",
                {"{{host}} GPU {{gpu}}": f"DCGM_FI_DEV_GPU_UTIL{{{GPU}}}"},
                maximum=100,
            ),
            Panel(
                "Memory",
                "In use and free. What the driver reserves is in neither.",
                "mbytes",
                {
                    "{{host}} GPU {{gpu}} in use": f"DCGM_FI_DEV_FB_USED{{{GPU}}}",
                    "{{host}} GPU {{gpu}} free": f"DCGM_FI_DEV_FB_FREE{{{GPU}}}",
                },
            ),
            Panel(
                "Power",
                "Draw, and the cap that is set. A draw at the cap slows the clocks down.",
                "watt",
                {
                    "{{host}} GPU {{gpu}}": f"DCGM_FI_DEV_POWER_USAGE{{{GPU}}}",
                    "{{host}} GPU {{gpu}} cap": f"DCGM_FI_DEV_POWER_MGMT_LIMIT{{{GPU}}}",
                },
            ),
        ),
        "Clocks and heat": (
            Panel(
                "Temperature",
                "Of the processor and of the memory.",
                "celsius",
                {
                    "{{host}} GPU {{gpu}}": f"DCGM_FI_DEV_GPU_TEMP{{{GPU}}}",
                    "{{host}} GPU {{gpu}} memory": f"DCGM_FI_DEV_MEMORY_TEMP{{{GPU}}}",
                },
            ),
            Panel(
                "Clocks",
                "Of the multiprocessors and of the memory.",
                "hertz",
                {
                    "{{host}} GPU {{gpu}} SM": f"1e6 * DCGM_FI_DEV_SM_CLOCK{{{GPU}}}",
                    "{{host}} GPU {{gpu}} memory": f"1e6 * DCGM_FI_DEV_MEM_CLOCK{{{GPU}}}",
                },
            ),
            Timeline(
                "Slowed down",
                "Why the clocks are lower than they could be. The power cap under full load is normal.",
                "none",
                {
                    f"{{{{host}}}} GPU {{{{gpu}}}} {reason}": "max by (host, gpu) "
                    f"(floor(DCGM_FI_DEV_CLOCKS_EVENT_REASONS{{{GPU}}} / {bit}) % 2)"
                    for bit, reason in THROTTLES.items()
                },
                width=8,
                words={0: ("no", "green"), 1: ("slowed", "orange")},
            ),
        ),
        "Errors": (
            Tiles(
                "Xids",
                "The driver's errors of the last six hours, by code; without one there were none. Many are a program's "
                "fault.",
                "none",
                {
                    "{{host}} GPU {{gpu}} {{xid}}": "max by (host, gpu, xid) "
                    f"(max_over_time(DCGM_EXP_XID_ERRORS_COUNT{{{GPU}}}[6h]))"
                },
                width=8,
                thresholds={None: "green", 1: "orange"},
            ),
            Tiles(
                "Uncorrectable ECC errors",
                "Since the last reset, boot or load of the driver. One of them ended whatever used that memory.",
                "short",
                {"{{host}} GPU {{gpu}}": f"DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{GPU}}}"},
                width=8,
                thresholds=NONE_IS_GOOD,
            ),
            Tiles(
                "Row remapping",
                "Pending: a reset of the GPU is due. Failed: the board is to be replaced.",
                "none",
                {
                    "{{host}} GPU {{gpu}} pending": f"DCGM_FI_DEV_ROW_REMAP_PENDING{{{GPU}}}",
                    "{{host}} GPU {{gpu}} failed": f"DCGM_FI_DEV_ROW_REMAP_FAILURE{{{GPU}}}",
                },
                width=8,
                thresholds=NONE_IS_GOOD,
                words={0: ("no", "green"), 1: ("yes", "red")},
            ),
            Panel(
                "Corrected ECC errors",
                "Harmless one by one. Many on one board announce its end.",
                "short",
                {"{{host}} GPU {{gpu}}": f"DCGM_FI_DEV_ECC_SBE_VOL_TOTAL{{{GPU}}}"},
                width=12,
            ),
            Panel(
                "Remapped rows",
                "Rows of memory that were replaced by spare ones, over the board's life.",
                "short",
                {
                    "{{host}} GPU {{gpu}} uncorrectable": f"DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS{{{GPU}}}",
                    "{{host}} GPU {{gpu}} correctable": f"DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS{{{GPU}}}",
                },
                width=12,
            ),
        ),
    },
)
