# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What runs on a host, held against what is declared: asks, and hands each part to its comparison.

Changes nothing. Each reading has a deadline; one that fails is told as unknown and does not keep
the others from being made.
"""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import _drift_gateway, _drift_gpu, _driver, _gpu_health, _gpu_info, _gpu_settings
from ._drift_engine import compare_engine, read_engine
from ._drift_kinds import Report
from ._drift_sockets import Door, compare_clock, compare_sockets, passing_ports, process_age, read_sockets, synchronised
from ._drift_units import (
    PROPERTIES,
    Process,
    changed_since,
    compare_arguments,
    compare_engines,
    compare_environment,
    compare_key,
    compare_undeclared_units,
    compare_units,
    drop_ins,
    engines_running,
    parse_environment_file,
    parse_units,
    read_process,
    unit_environment,
)
from ._gpu_info import TimedRunner
from ._host import read_text
from ._http import Endpoint, EndpointError
from ._json_file import read_object
from ._unit import Paths as UnitPaths
from ._unit import fingerprint, read_state

TARGET = "vllm.target"
GATEWAY = _drift_gateway.UNIT
HEALTH = _drift_gateway.HEALTH
#: Port of the gateway's statistics, on loopback; roles/vllm_gateway/vars/main.yml has it too.
STATISTICS_PORT = 8404
LOOPBACK = "127.0.0.1"
HAPROXY_USER = "haproxy"
_STALE = 3  # exit status of vllm-health stale


@dataclass(frozen=True)
class Wanted:
    """What is declared. Times are seconds; the driver, GPU settings and the controller's time may be left out."""

    device: str
    version: str
    instances: Sequence[Mapping[str, Any]]
    served_model_name: str
    model_path: str
    root: str
    user: str
    api_key_sha256: str = ""
    health: bool = True
    agent_port: int = 8403
    status_port: int = 8405
    gateway: bool = True
    gateway_host: str = LOOPBACK
    gateway_port: int = 8000
    driver_version: str = ""
    gpu_settings: _gpu_settings.Wanted | None = None
    foreign_mib: int = 512
    restarts: int = 3
    controller_time: float | None = None
    clock_tolerance: float = 5.0
    timeout: float = 10.0


@dataclass(frozen=True)
class Paths:
    """Where things are; tests put them elsewhere."""

    proc: str = "/proc"
    config: str = "/etc/vllm"
    units: str = "/etc/systemd/system"
    unit_folders: Sequence[str] = field(
        default=(
            "/etc/systemd/system",
            "/etc/systemd/system.control",
            "/run/systemd/system",
            "/run/systemd/system.control",
            "/run/systemd/transient",
        )
    )
    state: str = "/run/nvl-vllm"
    gateway: str = "/run/vllm-gateway"
    haproxy: str = "/usr/sbin/haproxy"
    health: str = "/usr/local/libexec/vllm-health"


class Look:
    """One look at the host. ``run`` runs commands with a deadline."""

    def __init__(self, wanted: Wanted, run: TimedRunner = _gpu_info.run_command, paths: Paths = Paths()) -> None:
        self.wanted = wanted
        self.run = partial(self._run, run)
        self.paths = paths
        self.report = Report("runtime")
        self.engines = [item["unit"] for item in wanted.instances]
        self.names = [item["name"] for item in wanted.instances]
        self.declared = [
            *self.engines,
            TARGET,
            *([HEALTH] if wanted.health else []),
            *([GATEWAY] if wanted.gateway else []),
        ]
        self.shown: dict[str, dict[str, str]] = {}
        #: Engines that have a finding which tells why the gateway does not use them.
        self.excused: set[str] = set()

    def _run(self, run: TimedRunner, argv: list[str], seconds: float = 0.0) -> tuple[int, str, str]:
        return run(argv, seconds or self.wanted.timeout)

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """What goes wrong within is told as unknown."""
        try:
            yield
        except (OSError, ValueError, KeyError, _drift_gateway.GatewayError, _driver.DriverError) as error:
            self.report.blind(f"{what} cannot be looked at: {error or type(error).__name__}")
        except _gpu_settings.SettingsError as error:
            self.report.blind(f"{what} cannot be looked at: {error}")

    def look(self) -> Report:
        """All parts; what does not apply to this host is left out."""
        parts: list[tuple[str, Callable[[], None]]] = [
            ("the clock", self.clock),  # the first, as the time that the rest takes would count
            ("systemd's units", self.units),
            ("the processes", self.processes),
            ("the engines", self.configuration),
            ("the health agent", self.agent),
            ("the gateway", self.gateway),
            ("listening sockets", self.sockets),
        ]
        if self.wanted.device == "cuda":
            parts += [("the driver", self.driver), ("the GPUs", self.gpus)]
        for what, part in parts:
            with self.part(what):
                part()
        return self.report

    # Units and processes

    def show(self, units: Sequence[str]) -> dict[str, dict[str, str]]:
        status, out, err = self.run(["systemctl", "show", f"--property={','.join(PROPERTIES)}", "--", *units])
        if status != 0:
            raise OSError(f"systemctl show failed: {(err or out).strip()}")
        return parse_units(out)

    def active(self, unit: str) -> bool:
        return self.shown.get(unit, {}).get("ActiveState") == "active"

    def units(self) -> None:
        status, out, err = self.run(
            ["systemctl", "list-units", "--all", "--full", "--plain", "--no-legend", "--no-pager", "vllm@*.service"]
        )
        if status != 0:
            raise OSError(f"systemctl list-units failed: {(err or out).strip()}")
        listed = {line.split()[0] for line in out.splitlines() if line.split()}
        wants = f"{self.paths.units}/{TARGET}.wants"
        linked = {name for name in _listdir(wants) if name.startswith("vllm@")}
        services = {GATEWAY, HEALTH}
        known = sorted({*self.declared, *listed, *linked, *services})
        self.shown = self.show(known)
        texts = {
            f"{unit} {path}": read_text(path) for unit in known for path in drop_ins(unit, self.paths.unit_folders)
        }
        compare_units(self.shown, self.declared, self.report, self.wanted.restarts, texts)
        compare_undeclared_units(self.shown, self.declared, self.report)
        kept = ("ActiveState", "SubState", "UnitFileState", "NRestarts", "MainPID")
        self.report.facts["units"] = {
            unit: {name: show.get(name, "") for name in kept}
            for unit, show in self.shown.items()
            if show.get("LoadState") == "loaded"
        }

    def main_process(self, unit: str) -> Process | None:
        pid = self.shown.get(unit, {}).get("MainPID", "0")
        process = read_process(int(pid), self.paths.proc) if pid.isdigit() and int(pid) else None
        if process is None:
            self.report.blind(f"{unit} is active and its process cannot be found: it may be restarting; look again")
        return process

    def processes(self) -> None:
        compare_engines(engines_running(self.paths.proc), self.engines, self.report)
        status, out, err = self.run(["systemctl", "show-environment"])
        if status != 0:
            raise OSError(f"systemctl show-environment failed: {(err or out).strip()}")
        manager = parse_environment_file(out)
        for item in self.wanted.instances:
            if self.active(item["unit"]):
                with self.part(f"the process of {item['unit']}"):
                    self._engine_process(item["name"], item["unit"], manager)
        commands = {
            HEALTH: ["-I", self.paths.health, "run"],
            GATEWAY: [
                self.paths.haproxy,
                "-Ws",
                "-f",
                f"{self.paths.config}/gateway/haproxy.cfg",
                "-S",
                f"{self.paths.gateway}/master.sock",
            ],
        }
        for unit, command in commands.items():
            if unit in self.declared and self.active(unit):
                process = self.main_process(unit)
                if process is not None:
                    # HAProxy takes up a new configuration by a start of itself with more arguments behind these.
                    seen = Process(process.pid, process.argv[: len(command)]) if unit == GATEWAY else process
                    compare_arguments(unit, seen, command, self.report)
                    # The gateway notes of which program it is.
                    if unit != GATEWAY and process.replaced("/usr/bin/python3"):
                        self._replaced(unit)

    def _engine_process(self, name: str, unit: str, manager: Mapping[str, str]) -> None:
        paths, wanted = self.paths, self.wanted
        process = self.main_process(unit)
        if process is None:
            return
        command = [f"{wanted.root}/current/bin/vllm", "serve", "--config", f"{paths.config}/{name}.yaml"]
        compare_arguments(unit, process, command, self.report)
        with open(f"{paths.units}/vllm@.service", encoding="utf-8") as stream:
            files = unit_environment(stream.read())
        with open(f"{paths.config}/{name}.env", encoding="utf-8") as stream:
            files.update(parse_environment_file(stream.read()))
        compare_environment(unit, process, files, manager, self.report)
        if process.environment.get("VLLM_API_KEY") == files.get("VLLM_API_KEY"):
            compare_key(unit, process, wanted.api_key_sha256, self.report)
        if process.replaced(os.path.realpath(process.argv[0])):
            self._replaced(unit)
        self._stale(name, unit)

    def _replaced(self, unit: str) -> None:
        self.report.add(
            "program_replaced",
            unit,
            "its Python was replaced since it was started",
            "the program on disk",
            f"run systemctl restart {unit}",
        )

    def _stale(self, name: str, unit: str) -> None:
        paths = UnitPaths(self.paths.state, self.paths.config, self.paths.units)
        noted = str(read_state(name, paths).get("fingerprint", ""))
        now = fingerprint(name, self.wanted.root, self.wanted.model_path, paths)
        if noted == now:
            return
        if not noted:
            found = f"{self.paths.state}/{name}.json does not tell what it was started from"
        else:
            inputs = [
                f"{paths.config}/{name}.yaml",
                f"{paths.config}/{name}.env",
                f"{paths.units}/vllm@.service",
                *drop_ins(unit, [paths.units]),
            ]
            changed = changed_since(inputs, os.stat(f"{paths.state}/{name}.json").st_mtime)
            # The release and the checkpoint are part of it too, and a drop-in that is gone.
            what = ", ".join(changed) or "the release, the checkpoint or a drop-in"
            found = f"started from {noted[:12]}; changed since: {what}"
        self.report.add(
            "stale_process",
            unit,
            found,
            f"{now[:12]}, the files on disk",
            f"run site.yml, which restarts {unit} where it must",
        )

    # Engines, agent, gateway

    def configuration(self) -> None:
        facts = self.report.facts["engines"] = {}
        for item in self.wanted.instances:
            if not self.active(item["unit"]):
                continue
            try:
                with open(f"{self.paths.config}/{item['name']}.env", encoding="utf-8") as stream:
                    key = parse_environment_file(stream.read()).get("VLLM_API_KEY") or None
                found = read_engine(Endpoint(item["name"], item["url"], key), self.wanted.timeout)
            except (OSError, ValueError, EndpointError) as error:
                self.report.blind(f"{item['unit']}: what it works with cannot be asked: {error}")
                continue
            facts[item["name"]] = {
                "version": found["version"],
                "models": [entry.get("id") for entry in found["models"]],
                "cache": found["cache"],
            }
            compare_engine(
                item["unit"],
                found,
                self.wanted.version,
                self.wanted.served_model_name,
                item["arguments"],
                self.report,
            )

    def agent(self) -> None:
        folder = f"{self.paths.state}/drain"
        drains = {
            name: (read_text(f"{folder}/{name}")[:200], time.time() - os.stat(f"{folder}/{name}").st_mtime)
            for name in _listdir(folder)
        }
        _drift_gateway.compare_drains(drains, self.names, self.report)
        self.excused = set(drains)
        if not self.wanted.health or not self.active(HEALTH):
            return
        # -B: it would keep byte code of itself otherwise.
        status, out, err = self.run(["/usr/bin/python3", "-I", "-B", self.paths.health, "stale"])
        if status == _STALE:
            self.report.add("stale_process", HEALTH, "it runs from other files than those on disk", "those on disk")
        elif status != 0:
            self.report.blind(f"{HEALTH}: {self.paths.health} stale failed: {(err or out).strip()}")
        endpoint = Endpoint("health agent", f"http://{LOOPBACK}:{self.wanted.status_port}")
        try:
            text = _drift_gateway.status(endpoint, self.wanted.timeout)
        except EndpointError as error:
            self.report.blind(f"{HEALTH}: its view cannot be asked: {error}")
            return
        self.excused |= _drift_gateway.compare_status(text, self.names, self.report)

    def gateway(self) -> None:
        if not self.wanted.gateway or not self.active(GATEWAY):
            return
        config = f"{self.paths.config}/gateway"
        noted = read_object(f"{self.paths.gateway}/running.json")
        unit = f"{self.paths.units}/{GATEWAY}"
        _drift_gateway.compare_inputs(noted, config, self.paths.haproxy, unit, self.report)

        ask = partial(_drift_gateway.ask, f"{self.paths.gateway}/admin.sock", seconds=self.wanted.timeout)
        live = _drift_gateway.parse_servers(ask("show servers state"))
        limits = _drift_gateway.parse_limits(ask("show stat"))
        with open(f"{config}/haproxy.cfg", encoding="utf-8") as stream:
            written = _drift_gateway.configured(stream.read())
        down = {item["name"] for item in self.wanted.instances if not self.active(item["unit"])}
        excused = down | self.excused
        _drift_gateway.compare_servers(live, limits, written, self.names, self.report, excused)
        with open(f"{config}/keys", encoding="utf-8") as stream:
            keys = _drift_gateway.parse_keys(stream.read())
        if keys:
            _drift_gateway.compare_keys(_drift_gateway.parse_keys(ask(f"show map {config}/keys")), keys, self.report)
        self.report.facts["gateway"] = {
            name: {"address": item.server.address, "weight": item.server.weight, "in_use": item.running}
            for name, item in live.items()
        }

    # Sockets and the clock

    def doors(self, engine: int, gateway: int) -> list[Door]:
        """Where the declared services listen; the arguments are the uids that they run as."""
        wanted = self.wanted
        doors = [
            Door(item["unit"], str(item["arguments"].get("host", "")), item["port"], engine)
            for item in wanted.instances
        ]
        if wanted.health:
            doors += [Door(HEALTH, LOOPBACK, port, 0) for port in (wanted.agent_port, wanted.status_port)]
        if wanted.gateway:
            doors += [
                Door(GATEWAY, wanted.gateway_host, wanted.gateway_port, gateway),
                Door(GATEWAY, LOOPBACK, STATISTICS_PORT, gateway),
            ]
        return doors

    def sockets(self) -> None:
        engine, gateway = uid_of(self.wanted.user), uid_of(HAPROXY_USER)
        users = {uid: name for uid, name in ((engine, self.wanted.user), (gateway, HAPROXY_USER)) if uid is not None}
        doors = self.doors(-1 if engine is None else engine, -1 if gateway is None else gateway)
        ours = compare_sockets(
            read_sockets(self.paths.proc),
            [door for door in doors if self.active(door.unit)],
            [*self.engines, GATEWAY, HEALTH],
            users,
            engine,
            passing_ports(self.paths.proc),
            self.report,
        )
        self.report.facts["sockets"] = [
            {"unit": item.unit, "uid": item.uid, "address": item.address, "port": item.port} for item in ours
        ]

    def clock(self) -> None:
        wanted = self.wanted
        age = process_age()
        offset = None if wanted.controller_time is None else time.time() - age - wanted.controller_time
        status, out, _ = self.run(["systemd-detect-virt", "--container"])
        container = out.strip() if status == 0 else ""
        in_step = synchronised()
        compare_clock(in_step, container, offset, wanted.clock_tolerance, self.report)
        self.report.facts["clock"] = {"synchronised": in_step, "offset": offset, "container": container}

    # Driver and GPUs

    def driver(self) -> None:
        facts = _driver.read(run=self.run, timeout=self.wanted.timeout)
        _drift_gpu.compare_driver(facts, self.wanted.driver_version, self.report)
        self.report.facts["driver"] = {
            "loaded": facts.loaded,
            "on_disk": facts.on_disk,
            "declared": self.wanted.driver_version,
        }

    def gpus(self) -> None:
        wanted = self.wanted
        facts = _gpu_info.read(run=self.run, timeout=wanted.timeout)
        self.report.facts["gpus"] = [
            {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "pci": gpu.pci} for gpu in facts.gpus
        ]
        if facts.problem:
            self.report.blind(facts.problem)
        own = uid_of(wanted.user)
        rules = _gpu_health.Wanted(own_uids=[] if own is None else [own], foreign_mib=wanted.foreign_mib)
        _drift_gpu.compare_health(_gpu_health.findings(facts, rules), self.report)
        if facts.problem:
            return
        recorded = {}
        for name in self.names:
            variables = parse_environment_file(read_text(f"{self.paths.config}/{name}.env"))
            recorded[name] = re.findall(r"[^,\s]+", variables.get("CUDA_VISIBLE_DEVICES", ""))
        declared = {item["name"]: item["gpus"] for item in wanted.instances}
        _drift_gpu.compare_identity(declared, recorded, facts.gpus, self.report)
        if wanted.gpu_settings is not None:
            well = [gpu for gpu in facts.gpus if gpu.uuid and not gpu.lost]
            settings = _gpu_settings.ask(well, self.run, wanted.timeout)
            _drift_gpu.compare_settings(_gpu_settings.plan(settings, wanted.gpu_settings), self.report)
            for now in settings:
                for name, said in now.unreadable.items():
                    self.report.blind(f"{now.gpu}: nvidia-smi tells {said or 'nothing'} for {name}")


def uid_of(user: str) -> int | None:
    """A user's number, or None where there is no such user."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def _listdir(folder: str) -> list[str]:
    """Names in a folder, sorted; none where it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
