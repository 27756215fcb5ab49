# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The figures of a host's GPUs under the names of NVIDIA's dcgm-exporter, for hosts that do not have it.

What a GPU does not tell has no line, so that nothing is taken for 0 which is not known.
"""

from __future__ import annotations

from collections.abc import Mapping

from ._gpu_info import Facts, Gpu, TimedRunner, pci_key

#: Asked beside what _gpu_info reads. A driver or board that does not know one of ``MORE`` refuses all of them.
BASIC = ("utilization.gpu", "power.draw")
MORE = ("temperature.memory", "clocks.mem", "utilization.memory", "ecc.errors.corrected.volatile.total")

#: Bits of DCGM_FI_DEV_CLOCKS_EVENT_REASONS, by the names of nvidia-smi.
REASONS = {
    "gpu_idle": 1,
    "applications_clocks_setting": 2,
    "sw_power_cap": 4,
    "hw_slowdown": 8,
    "sync_boost": 16,
    "sw_thermal_slowdown": 32,
    "hw_thermal_slowdown": 64,
    "hw_power_brake_slowdown": 128,
    "display_clocks_setting": 256,
}

#: One sample for each code. The last one alone would hide a fault behind what the driver logs after it.
XIDS = "DCGM_EXP_XID_ERRORS_COUNT"

#: Name, type and help of each figure.
METRICS = (
    ("DCGM_FI_DEV_GPU_UTIL", "gauge", "Utilization (percent)."),
    ("DCGM_FI_DEV_MEM_COPY_UTIL", "gauge", "Utilization of the memory's bandwidth (percent)."),
    ("DCGM_FI_DEV_FB_USED", "gauge", "Used memory (MiB)."),
    ("DCGM_FI_DEV_FB_FREE", "gauge", "Free memory (MiB)."),
    ("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw (W)."),
    ("DCGM_FI_DEV_POWER_MGMT_LIMIT", "gauge", "Power cap (W)."),
    ("DCGM_FI_DEV_GPU_TEMP", "gauge", "Temperature of the GPU (degrees Celsius)."),
    ("DCGM_FI_DEV_MEMORY_TEMP", "gauge", "Temperature of the memory (degrees Celsius)."),
    ("DCGM_FI_DEV_SM_CLOCK", "gauge", "Clock of the SMs (MHz)."),
    ("DCGM_FI_DEV_MEM_CLOCK", "gauge", "Clock of the memory (MHz)."),
    ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "gauge", "Why clocks are lowered (bits)."),
    ("DCGM_FI_DEV_XID_ERRORS", "gauge", "The last Xid since boot."),
    (XIDS, "gauge", "Xids since boot, by code."),
    ("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "counter", "Corrected ECC errors since the last reset."),
    ("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "counter", "Uncorrected ECC errors since the last reset."),
    ("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "counter", "Rows remapped for corrected errors."),
    ("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "counter", "Rows remapped for uncorrected errors."),
    ("DCGM_FI_DEV_ROW_REMAP_PENDING", "gauge", "1 where a row waits for a reset to be remapped."),
    ("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "1 where a row could not be remapped."),
)


def escaped(value: str) -> str:
    """A label's value in Prometheus' text format."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def ask(run: TimedRunner, timeout: float) -> dict[str, dict[str, float]]:
    """Figures that are asked for by name, by PCI key. What is refused or is no number is left out."""
    found: dict[str, dict[str, float]] = {}
    for fields in (BASIC, MORE):
        argv = ["nvidia-smi", f"--query-gpu=pci.bus_id,{','.join(fields)}", "--format=csv,noheader,nounits"]
        status, out, _ = run(argv, timeout)
        for line in out.splitlines() if status == 0 else ():
            address, *values = (cell.strip() for cell in line.split(","))
            for name, value in zip(fields, values):
                if value.replace(".", "", 1).isdigit():
                    found.setdefault(pci_key(address), {})[name] = float(value)
    return found


def last_xid(gpu: Gpu) -> int | None:
    """The last Xid that was logged, 0 where none was, None where the log cannot be read."""
    if gpu.xids is None:
        return None
    return max(gpu.xids, key=lambda xid: xid.last_time).code if gpu.xids else 0


def xid_counts(gpu: Gpu) -> dict[str, int]:
    """How often each Xid was logged, by label; 0 without one where none was, as dcgm-exporter has it."""
    if gpu.xids is None:
        return {}
    return {f',xid="{xid.code}"': xid.count for xid in gpu.xids} or {"": 0}


def figures(gpu: Gpu, asked: Mapping[str, float]) -> dict[str, float | None]:
    """All figures of one GPU, by name; None is what is not known."""
    reasons = gpu.throttle_reasons
    return {
        "DCGM_FI_DEV_GPU_UTIL": asked.get("utilization.gpu"),
        "DCGM_FI_DEV_MEM_COPY_UTIL": asked.get("utilization.memory"),
        "DCGM_FI_DEV_FB_USED": gpu.used_mib,
        "DCGM_FI_DEV_FB_FREE": gpu.free_mib,
        "DCGM_FI_DEV_POWER_USAGE": asked.get("power.draw"),
        "DCGM_FI_DEV_POWER_MGMT_LIMIT": gpu.power_cap_w,
        "DCGM_FI_DEV_GPU_TEMP": gpu.temperature_c,
        "DCGM_FI_DEV_MEMORY_TEMP": asked.get("temperature.memory"),
        "DCGM_FI_DEV_SM_CLOCK": gpu.sm_clock_mhz,
        "DCGM_FI_DEV_MEM_CLOCK": asked.get("clocks.mem"),
        "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": None if reasons is None else sum(REASONS.get(name, 0) for name in reasons),
        "DCGM_FI_DEV_XID_ERRORS": last_xid(gpu),
        "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL": asked.get("ecc.errors.corrected.volatile.total"),
        "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": gpu.ecc_uncorrected_volatile,
        "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": gpu.remapped_correctable,
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": gpu.remapped_uncorrectable,
        "DCGM_FI_DEV_ROW_REMAP_PENDING": gpu.remap_pending,
        "DCGM_FI_DEV_ROW_REMAP_FAILURE": gpu.remap_failure,
    }


def page(facts: Facts, asked: Mapping[str, Mapping[str, float]], hostname: str) -> str:
    """The figures in Prometheus' text format, with dcgm-exporter's labels."""
    lines: dict[str, list[str]] = {name: [] for name, _, _ in METRICS}
    for gpu in facts.gpus:
        labels = {
            "gpu": "" if gpu.index is None else str(gpu.index),
            "UUID": gpu.uuid or "",
            "pci_bus_id": gpu.pci,
            "modelName": gpu.name or "",
            "Hostname": hostname,
        }
        label = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
        for name, value in figures(gpu, asked.get(pci_key(gpu.pci) if ":" in gpu.pci else "", {})).items():
            if value is not None:
                lines[name].append(f"{name}{{{label}}} {float(value):g}")
        lines[XIDS] += [f"{XIDS}{{{label}{code}}} {count}" for code, count in xid_counts(gpu).items()]
    return "".join(
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines[name])
        for name, kind, text in METRICS
    )
