"""What lies on disk: parts put together, files at places of the roles, and packages."""

from __future__ import annotations

import grp
import os
import re
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_content as content
from ansible_collections.nvl.vllm.plugins.module_utils._drift_content import Look, Paths, Wanted
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report

ROLES = Path(__file__).parents[4] / "roles"
#: dpkg --verify of dpkg 1.21, with a changed program, a changed configuration file, and manuals that an image left out.
VERIFIED = """\
??5??????   /usr/sbin/haproxy
??5?????? c /etc/haproxy/haproxy.cfg
missing     /usr/share/man/man1/haproxy.1.gz
missing     /usr/share/doc/haproxy/NEWS.Debian.gz
missing     /usr/lib/x86_64-linux-gnu/libnuma.so.1
missing   c /etc/default/haproxy
"""


def told(report):
    return [(item["kind"], item["where"]) for item in report.findings]


def test_the_known_helpers_are_those_of_the_roles():
    wanted = set()
    for role in ("vllm_instances", "vllm_health"):
        text = (ROLES / role / "vars/main.yml").read_text()
        wanted |= set(re.findall(rf'dest: "{{{{ __{role}_lib }}}}/(\w+\.py)"', text))
        assert yaml.safe_load(text)[f"__{role}_lib"] == f"{content.LIBRARY}/nvl_vllm"
    assert {f"nvl_vllm/{name}" for name in wanted} == set(content.HELPERS)


def test_the_gateways_files_are_those_of_its_helper():
    helper = (ROLES / "vllm_gateway/files/vllm-gateway").read_text()
    assert re.search(r"FILES = (\(.*\))", helper).group(1) == str(content.GATEWAY_FILES).replace("'", '"')


def test_names_that_no_role_wrote(tmp_path):
    for name in (
        "primary.yaml",
        "primary.env",
        "health.json",
        "gateway/keys",
        "gateway/old.pem",
        "extra/a",
        "extra/b",
        "x.bak",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "__pycache__").mkdir()
    report = Report("content")
    known = {"primary.yaml", "primary.env", "health.json", "gateway/keys"}
    content.compare_names(str(tmp_path), known, report)
    assert told(report) == [
        ("undeclared_file", f"{tmp_path}/extra"),
        ("undeclared_file", f"{tmp_path}/gateway/old.pem"),
        ("undeclared_file", f"{tmp_path}/x.bak"),
    ]
    content.compare_names(str(tmp_path / "none"), known, report)
    assert len(report.findings) == 3


def test_folders_of_other_roles_are_not_looked_into(tmp_path):
    for name in ("monitoring/rules/a.yml", "rules/deep/b.yml", "other/c"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    report = Report("content")
    owned = [f"{tmp_path}/monitoring", f"{tmp_path}/rules/deep", "/elsewhere", ""]
    content.compare_names(str(tmp_path), set(), report, owned)
    assert told(report) == [("undeclared_file", f"{tmp_path}/other")]


def test_every_folder_that_a_role_writes_to_is_known():
    """A file of a role that is taken for nobody's would make its hosts drifted, with the advice to remove it."""
    variables = yaml.safe_load((ROLES / "vllm_drift/vars/main.yml").read_text())
    owned = [path for path in variables["__vllm_drift_owned"] if path.startswith("/")]
    files = [
        path
        for part in ("tasks", "vars", "defaults", "handlers", "templates")
        for path in ROLES.glob(f"*/{part}/**/*")
        if path.is_file() and path.parts[-3] != "vllm_drift"
    ]
    found = {place for path in files for place in re.findall(r"/etc/vllm/[\w./-]*\w", path.read_text())}
    assert {"/etc/vllm/gateway", "/etc/vllm/health.json", "/etc/vllm/monitoring"} <= found
    # Names of instances are templates.
    known = {"/etc/vllm/gateway", "/etc/vllm/health.json"}
    known |= {f"/etc/vllm/gateway/{name}" for name in content.GATEWAY_FILES}
    assert {
        place for place in found - known if not any(place == path or place.startswith(f"{path}/") for path in owned)
    } == set()


def test_a_certificate_is_for_haproxy_alone(tmp_path):
    pem = tmp_path / "files.pem"
    own = grp.getgrgid(os.getgid()).gr_name

    def found(group=own):
        report = Report("content")
        content.compare_certificate(str(pem), os.getuid(), group, report)
        return [item["found"] for item in report.findings]

    assert found() == []  # there is none
    pem.touch(mode=0o600)
    pem.chmod(0o640)
    assert found() == []
    assert found("other") == [f"user {os.getuid()}, group {own}, mode 0640"]
    pem.chmod(0o644)
    assert found() == [f"user {os.getuid()}, group {own}, mode 0644"]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (["1.0", "install", "installed"], ["package_not_held"]),
        (["1.0", "hold", "installed"], []),
        (["1.0", "deinstall", "config-files"], ["package_missing"]),
        (["1.0", "install", "half-configured"], ["package_missing"]),
        (None, ["package_missing"]),
    ],
)
def test_packages(row, wanted):
    report = Report("content")
    content.compare_installed({"driver": row} if row else {}, ["driver"], ["driver"], report)
    assert [item["kind"] for item in report.findings] == wanted


def test_files_of_packages():
    report = Report("content")
    content.compare_verified(VERIFIED, report)
    assert told(report) == [
        ("package_file_changed", "/usr/sbin/haproxy"),
        ("package_file_changed", "/usr/lib/x86_64-linux-gnu/libnuma.so.1"),
    ]


class Dpkg:
    """A stand-in for dpkg and dpkg-query."""

    def __init__(self, query="haproxy\t2.6\tinstall\tinstalled\n", status=0, verify=""):
        self.answers = {"dpkg-query": (status, query, "broken"), "dpkg": (int(bool(verify)), verify, "")}
        self.calls = []

    def __call__(self, argv, timeout):
        assert timeout == 3.0
        self.calls.append(argv)
        return self.answers[argv[0]]


def look(tmp_path, run, **fields):
    wanted = Wanted(
        release=str(tmp_path / "release"),
        root=str(tmp_path),
        lock="cpu.txt",
        lock_sha256="0",
        instances=["primary"],
        model_path=str(tmp_path / "model"),
        timeout=3.0,
        **fields,
    )
    names = {name: str(tmp_path / name) for name in ("config", "library", "records", "notes", "state")}
    return Look(wanted, run, Paths(**names)).look()


def test_a_host_without_anything_has_findings_and_no_false_clean(tmp_path):
    report = look(tmp_path, Dpkg())
    assert sorted(item["kind"] for item in report.findings) == ["model_not_recorded", "release_incomplete"]
    assert report.unknown == []


def test_the_packages_are_asked_for(tmp_path):
    run = Dpkg(verify="??5??????   /usr/sbin/haproxy\n")
    report = look(tmp_path, run, packages=["haproxy", "libnuma1"], held=["haproxy"])
    assert {"package_file_changed", "package_not_held", "package_missing"} <= {item["kind"] for item in report.findings}
    assert run.calls[0][-3:] == ["--", "haproxy", "libnuma1"]
    assert run.calls[1] == ["dpkg", "--verify", "--", "haproxy"]
    assert report.facts["packages"] == {"haproxy": "2.6"}


def test_what_fails_is_unknown_and_keeps_nothing_else_from_being_read(tmp_path):
    report = look(tmp_path, Dpkg(status=2), packages=["haproxy"])
    assert report.unknown == ["the packages cannot be looked at: dpkg-query failed: broken"]
    assert len(report.findings) == 2

    def hang(argv, timeout):
        raise TimeoutError("dpkg-query did not answer within 3 s")

    assert look(tmp_path, hang, packages=["haproxy"]).unknown == [
        "the packages cannot be looked at: dpkg-query did not answer within 3 s"
    ]


def test_a_release_that_cannot_be_read_is_unknown(tmp_path):
    info = tmp_path / "release/lib/python3.11/site-packages/x-1.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").write_text("x.py,sha256=AAAA,no number\n")
    (tmp_path / "release/.release.json").write_text('{"version": "1"}')
    report = look(tmp_path, Dpkg())
    assert len(report.unknown) == 1
    assert report.unknown[0].startswith("the release cannot be looked at: ")
