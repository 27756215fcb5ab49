"""What runs on a host, put together: stand-ins for systemd, real processes, real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_facts as facts
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_gateway, _drift_sockets, _drift_units
from ansible_collections.nvl.vllm.plugins.module_utils._drift_engine import parse_cache_info
from ansible_collections.nvl.vllm.plugins.module_utils._drift_facts import Look, Paths, Wanted
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import as_result
from ansible_collections.nvl.vllm.plugins.module_utils._unit import Paths as UnitPaths
from ansible_collections.nvl.vllm.plugins.module_utils._unit import fingerprint

ROOT = Path(__file__).parents[4]
FAKES = ROOT / "tests/fakes"
UNIT = "vllm@primary.service"
KEY = "sk-very-secret"
CACHE = 'vllm:cache_config_info{engine="0",gpu_memory_utilization="0.85"} 1.0\n'


class Host:
    """A host with one engine: a real process, a stand-in for its HTTP, and one for systemctl."""

    def __init__(self, path, fake_vllm, monkeypatch):
        self.path = path
        self.fake = fake_vllm
        self.units = {
            name: {
                "LoadState": "loaded",
                "ActiveState": "active",
                "UnitFileState": "enabled",
                "FragmentPath": f"/etc/systemd/system/{name.replace('primary', '')}",
                "MainPID": "0",
            }
            for name in (UNIT, "vllm.target")
        }
        for name in ("vllm-gateway.service", "vllm-health.service"):
            self.units[name] = {"LoadState": "not-found", "ActiveState": "inactive"}
        self.manager = "LANG=C.UTF-8\nPATH=/bin\n"
        self.fails = ()
        self.paths = Paths(
            config=str(path / "etc"),
            units=str(path / "units"),
            unit_folders=(str(path / "units"), str(path / "run-units")),
            state=str(path / "state"),
            gateway=str(path / "gateway"),
        )
        for folder in ("etc", "units", "state", "opt/release/bin", "model"):
            (path / folder).mkdir(parents=True)
        (path / "opt/current").symlink_to("release")
        (path / "opt/release/bin/vllm").write_text("print('up', flush=True)\ninput()\n")
        (path / "units/vllm@.service").write_text("[Service]\nEnvironment=NVL_VLLM_ROOT=/opt/vllm\n")
        (path / "etc/primary.env").write_text(f'A="1"\nVLLM_API_KEY="{KEY}"\n')
        (path / "etc/primary.yaml").write_text("port: 1\n")
        self.environment = {"NVL_VLLM_ROOT": "/opt/vllm", "A": "1", "VLLM_API_KEY": KEY}
        self.arguments = {"gpu-memory-utilization": 0.85, "host": "127.0.0.1"}
        self.note()
        # The engines' port is that of the stand-in, which this process has.
        monkeypatch.setattr(facts, "read_sockets", lambda proc: self.sockets())
        self.extra_sockets = []
        self.in_step = True
        monkeypatch.setattr(facts, "synchronised", lambda: self.in_step)

    def sockets(self):
        own = _drift_sockets.Socket("127.0.0.1", self.fake.port, os.getuid(), UNIT, "vllm", 1)
        return [own, *self.extra_sockets]

    def note(self):
        paths = UnitPaths(self.paths.state, self.paths.config, self.paths.units)
        now = fingerprint("primary", str(self.path / "opt"), str(self.path / "model"), paths)
        (self.path / "state/primary.json").write_text(json.dumps({"fingerprint": now}))

    def run(self, argv, timeout):
        if argv[0] in self.fails:
            raise TimeoutError(f"{argv[0]} did not answer within {timeout:g} s")
        if argv[:2] == ["systemctl", "list-units"]:
            names = [name for name in self.units if name.startswith("vllm@")]
            return 0, "".join(f"{name} loaded active running x\n" for name in names), ""
        if argv[:2] == ["systemctl", "show"]:
            blocks = []
            for name in argv[argv.index("--") + 1 :]:
                shown = {"Id": name, **self.units.get(name, {"LoadState": "not-found"})}
                blocks.append("".join(f"{key}={value}\n" for key, value in shown.items()))
            return 0, "\n".join(blocks), ""
        if argv == ["systemctl", "show-environment"]:
            return 0, self.manager, ""
        if argv[0] == "systemd-detect-virt":
            return 1, "none\n", ""
        raise AssertionError(argv)

    def engine(self, *more):
        """A real process with the engine's command line and environment."""
        argv = [sys.executable, str(self.path / "opt/current/bin/vllm"), "serve", "--config"]
        child = subprocess.Popen(
            [*argv, f"{self.paths.config}/primary.yaml", *more],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline() == "up\n"
        self.units[UNIT]["MainPID"] = str(child.pid)
        return child

    def look(self, **fields):
        wanted = {
            "device": "cpu",
            "version": "0.32.0",
            "instances": [
                {
                    "name": "primary",
                    "unit": UNIT,
                    "port": self.fake.port,
                    "url": self.fake.url,
                    "gpus": [0],
                    "arguments": self.arguments,
                }
            ],
            "served_model_name": "gpt-oss-120b",
            "model_path": str(self.path / "model"),
            "root": str(self.path / "opt"),
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "api_key_sha256": hashlib.sha256(KEY.encode()).hexdigest(),
            "health": False,
            "gateway": False,
            "timeout": 5.0,
        }
        report = Look(Wanted(**{**wanted, **fields}), self.run, self.paths).look()
        assert KEY not in json.dumps(as_result(report))
        return report


@pytest.fixture
def host(tmp_path, fake_vllm, monkeypatch):
    made = Host(tmp_path, fake_vllm, monkeypatch)
    monkeypatch.setattr(facts, "engines_running", lambda proc: made.strays())
    made.strays = list
    real = facts.read_engine

    def read_engine(endpoint, seconds):
        found = real(endpoint, seconds)
        return {**found, "cache": parse_cache_info(CACHE)}

    monkeypatch.setattr(facts, "read_engine", read_engine)
    return made


def told(report):
    return [(item["kind"], item["where"]) for item in report.sorted()]


def end(child):
    child.communicate("\n")


@pytest.fixture
def engine(host):
    child = host.engine()
    yield child
    end(child)


def test_a_host_as_declared_is_clean(host, engine):
    report = host.look()
    assert report.findings == []
    assert report.unknown == []
    assert report.facts["engines"]["primary"]["version"] == "0.32.0"
    assert report.facts["units"][UNIT]["ActiveState"] == "active"


def test_edited_files_are_told_by_name(host, engine):
    (host.path / "etc/primary.yaml").write_text("port: 2\n")
    stale = host.look().findings[0]
    assert (stale["kind"], stale["where"]) == ("stale_process", UNIT)
    assert f"{host.paths.config}/primary.yaml" in stale["found"]


def test_a_start_that_noted_nothing(host, engine):
    (host.path / "state/primary.json").unlink()
    assert told(host.look()) == [("stale_process", UNIT)]


def test_a_drop_in_beside_the_declared_unit(host, engine):
    folder = host.path / "run-units/vllm@primary.service.d"
    folder.mkdir(parents=True)
    (folder / "x.conf").write_text("[Service]\nEnvironment=HF_TOKEN=abc\n")
    report = host.look()
    assert told(report) == [("unit_override", f"{UNIT} {folder}/x.conf")]
    assert "abc" not in report.findings[0]["diff"]


def test_a_process_with_more_arguments_and_another_environment(host):
    host.environment |= {"A": "2", "EXTRA": "1"}
    child = host.engine("--max-model-len", "2048")
    try:
        assert told(host.look()) == [
            ("process_arguments", UNIT),
            ("process_environment", f"{UNIT} A"),
            ("process_environment", f"{UNIT} EXTRA"),
        ]
    finally:
        end(child)


def test_another_key_than_declared(host, engine):
    found = host.look(api_key_sha256=hashlib.sha256(b"new").hexdigest()).findings
    assert [(item["where"], item["found"]) for item in found] == [(f"{UNIT} VLLM_API_KEY", "another key than declared")]


def test_an_engine_that_works_with_something_else(host, engine):
    host.arguments["gpu-memory-utilization"] = 0.9
    host.fake.version = "0.31.0"
    assert told(host.look()) == [
        ("engine_configuration", f"{UNIT} gpu-memory-utilization"),
        ("engine_version", UNIT),
    ]


def test_an_engine_that_does_not_answer_is_unknown(host, engine):
    host.fake.die()
    report = host.look()
    assert report.findings == []
    assert report.unknown[0].startswith(f"{UNIT}: what it works with cannot be asked: ")


def test_a_stopped_engine_is_not_asked(host):
    host.units[UNIT]["ActiveState"] = "inactive"
    report = host.look()
    assert told(report) == [("unit_not_active", UNIT)]
    assert report.unknown == []
    assert host.fake.requests == []


def test_an_engine_whose_process_is_gone_is_unknown(host):
    host.units[UNIT]["MainPID"] = "0"
    assert "its process cannot be found" in host.look().unknown[0]


def test_a_stray_engine_and_a_unit_that_nobody_declared(host, engine):
    host.strays = lambda: [_drift_units.Process(9, ["vllm", "serve"], uid=1000)]
    host.units["vllm@old.service"] = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "disabled"}
    assert told(host.look()) == [("undeclared_engine", "user 1000"), ("undeclared_unit", "vllm@old.service")]


def test_a_gateway_where_none_is_declared(host, engine):
    host.units["vllm-gateway.service"] = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}
    assert told(host.look()) == [("undeclared_unit", "vllm-gateway.service")]


def test_a_drain_file(host, engine):
    (host.path / "state/drain").mkdir()
    (host.path / "state/drain/primary").write_text("fan")
    assert told(host.look()) == [("engine_drained", "primary")]


def test_a_socket_that_nobody_declared(host, engine):
    host.extra_sockets = [_drift_sockets.Socket("0.0.0.0", 9999, os.getuid(), UNIT, "nc", 5)]
    assert told(host.look()) == [("undeclared_socket", f"{UNIT} 9999")]


def test_clocks(host, engine, monkeypatch):
    monkeypatch.setattr(facts, "process_age", lambda: 0.5)  # that of the tests is minutes
    assert told(host.look(controller_time=time.time())) == []
    assert told(host.look(controller_time=time.time() - 3600)) == [("clock_offset", "clock")]
    host.in_step = False
    assert told(host.look()) == [("clock_not_synchronised", "clock")]


def test_a_systemctl_that_hangs_makes_it_unknown_and_not_clean(host, engine):
    host.fails = ("systemctl",)
    report = host.look()
    assert "systemd's units cannot be looked at: systemctl did not answer within 5 s" in report.unknown


def test_a_gateway_that_does_not_answer_is_unknown(host, engine):
    (host.path / "etc/gateway").mkdir()
    (host.path / "haproxy").touch()
    (host.path / "units/vllm-gateway.service").touch()
    host.units["vllm-gateway.service"] = {
        **host.units["vllm.target"],
        "FragmentPath": "/etc/systemd/system/vllm-gateway.service",
        "MainPID": str(os.getpid()),
    }
    host.paths = Paths(**{**vars(host.paths), "haproxy": str(host.path / "haproxy")})
    report = host.look(gateway=True)
    assert any(
        sentence.startswith("the gateway cannot be looked at: HAProxy does not answer") for sentence in report.unknown
    )


def test_gpus_of_a_host_with_a_stand_in_for_its_driver(host, engine, monkeypatch):
    """The larger stand-in for nvidia-smi shows two boards; the engine was deployed on another one."""
    real, calls = host.run, []

    def run(argv, timeout):
        if argv[0] == "nvidia-smi":
            calls.append(argv)
            done = subprocess.run(
                [FAKES / "nvidia-smi", *argv[1:]], capture_output=True, text=True, timeout=30, check=False
            )
            return done.returncode, done.stdout, done.stderr
        if argv[0] in ("systemctl", "systemd-detect-virt"):
            return real(argv, timeout)
        raise FileNotFoundError(argv[0])

    host.run = run
    env = host.path / "etc/primary.env"
    env.write_text(env.read_text() + 'CUDA_VISIBLE_DEVICES="GPU-11111111-0000-0000-0000-000000000000"\n')
    host.note()
    report = host.look(device="cuda")
    assert calls
    assert ("gpu_swapped", "primary GPU 0") in told(report)
    assert len(report.facts["gpus"]) == 2


def test_a_host_whose_driver_is_gone_is_unknown(host, engine):
    real = host.run

    def run(argv, timeout):
        if argv[0] in ("systemctl", "systemd-detect-virt"):
            return real(argv, timeout)
        raise FileNotFoundError(argv[0])

    host.run = run
    report = host.look(device="cuda")
    assert any("nvidia-smi is not there" in sentence for sentence in report.unknown)


def test_constants_are_those_of_the_roles():
    gateway = yaml.safe_load((ROOT / "roles/vllm_gateway/vars/main.yml").read_text())
    assert gateway["__vllm_gateway_statistics"] == f"{facts.LOOPBACK}:{facts.STATISTICS_PORT}"
    assert gateway["__vllm_gateway_runtime"] == Paths().gateway
    assert gateway["__vllm_gateway_directory"] == f"{Paths().config}/gateway"
    health = yaml.safe_load((ROOT / "roles/vllm_health/defaults/main.yml").read_text())
    defaults = Wanted("cpu", "", [], "", "", "", "")
    assert (defaults.agent_port, defaults.status_port) == (
        health["vllm_health_agent_port"],
        health["vllm_health_status_port"],
    )
    assert Paths().unit_folders == _drift_units.UNIT_FOLDERS
    command = (ROOT / "roles/vllm_gateway/templates/vllm-gateway.service.j2").read_text()
    assert "ExecStart=/usr/sbin/haproxy -Ws -f {{ __vllm_gateway_directory }}/haproxy.cfg -S " in command
    assert _drift_gateway.UNIT == "vllm-gateway.service"
