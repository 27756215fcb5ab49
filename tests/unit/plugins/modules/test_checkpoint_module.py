"""The module checkpoint: against a real HTTP server that speaks the hub's API, and against directories."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _hub
from ansible_collections.nvl.vllm.plugins.module_utils._checkpoint import record_path
from ansible_collections.nvl.vllm.plugins.modules import checkpoint
from huggingface_hub.utils import close_session

SERVER = Path(__file__).parents[2] / "hub_server.py"
_spec = importlib.util.spec_from_file_location("hub_server", SERVER)
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look there
_spec.loader.exec_module(hub_server)

COMMIT = hub_server.REVISION
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
SECOND = SHARDS[1]
EXCLUDED = ["original/*", "metal/*"]
TOKEN = "hf_SecretSecretSecret"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """What the hub has; tests only read it."""
    directory = tmp_path_factory.mktemp("published")
    hub_server.write_repository(directory, shards=3, shard_bytes=30_000)
    return directory


@pytest.fixture(scope="session")
def wanted(published):
    """The files of it that a deployment wants."""
    names = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.startswith(("original", "metal", ".")))


@pytest.fixture(scope="session")
def manifest(published, wanted):
    return {
        "files": {
            name: {"size": (published / name).stat().st_size, "sha256": sha256(published / name)} for name in wanted
        }
    }


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Nothing waits between attempts, no proxy or token of this machine, and what a module changes is put back."""
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setattr(_hub, "_pause", lambda _seconds, _stop: None)
    monkeypatch.setattr(_hub, "CHUNK", 100)
    before, umask = dict(os.environ), os.umask(0o077)
    for name in before:
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)
    os.umask(umask)
    close_session()


@pytest.fixture
def server(published):
    with hub_server.HubServer(published, large=4096) as running:
        yield running
        close_session()


class Host:
    """A host below tmp_path that gets its checkpoint from a hub."""

    def __init__(self, path, server, run_module):
        self._run_module = run_module
        self.server = server
        self.root = path / "models"
        self.path = self.root / COMMIT
        self.records = path / "records"
        self.progress = path / "run/progress.json"
        self.staging = self.root / ".staging" / COMMIT

    def run(self, check_mode=False, **changes):
        options = {
            "path": str(self.path),
            "source": "hub",
            "repository": hub_server.REPOSITORY,
            "revision": COMMIT,
            "endpoint": self.server.url,
            "exclude": EXCLUDED,
            "margin": 0,
            "records": str(self.records),
            "progress": str(self.progress),
        }
        self.server.requests.clear()
        options = {name: value for name, value in {**options, **changes}.items() if value is not None}
        return self._run_module(checkpoint.main, check_mode=check_mode, **options)

    def damage(self, name, keep_mtime=False):
        """Flip a bit of the last byte; inode and size stay."""
        before = os.stat(self.path / name)
        with (self.path / name).open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            byte = stream.read(1)[0]
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([byte ^ 1]))
        later = before.st_mtime_ns + (0 if keep_mtime else 10**9)
        os.utime(self.path / name, ns=(later, later))

    def content(self):
        return {path.name: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}


@pytest.fixture
def host(tmp_path, server, run_module):
    return Host(tmp_path, server, run_module)


@pytest.fixture
def present(host):
    """A host that has the checkpoint already."""
    assert "failed" not in host.run()
    return host


def in_words(result, *texts):
    """The module failed, each line begins with the host's name, and the texts are there."""
    assert result.get("failed"), result
    assert "exception" not in result
    for line in result["msg"].splitlines():
        assert line.startswith(f"{socket.gethostname()}: "), line
    for text in texts:
        assert text in result["msg"], result["msg"]


# From a hub


def test_checkpoint_is_fetched_and_told(host, published, wanted):
    result = host.run()
    assert (result["changed"], result["fetched"], result["missing"]) == (True, wanted, [])
    assert result["complete"] is True
    assert (result["damaged"], result["hashed"]) == ({}, 0)
    assert {name: (host.path / name).read_bytes() for name in wanted} == {
        name: (published / name).read_bytes() for name in wanted
    }
    assert sorted(host.content()) == wanted
    assert os.readlink(host.root / "current") == COMMIT
    told = result["checkpoint"]
    assert (told["path"], told["files"], told["shards"], told["tensors"]) == (str(host.path), len(wanted), 3, 6)
    assert told["size"] == sum((published / name).stat().st_size for name in wanted)
    assert told["config"]["model_type"] == "gpt_oss"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["verified"])
    assert result["diff"]["after"].split() == wanted
    assert not list(host.progress.parent.iterdir())


def test_engines_may_read_it_whatever_the_login_umask(host):
    host.run()
    for path in (host.root, host.path, *host.path.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_manifest_that_is_returned_is_the_one_for_other_hosts(host, published, wanted):
    manifest = host.run()["manifest"]
    assert (manifest["repository"], manifest["revision"]) == (hub_server.REPOSITORY, COMMIT)
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == {
        name: sha256(published / name) for name in wanted
    }


def test_check_mode_asks_no_hub_and_writes_nothing(host):
    result = host.run(check_mode=True)
    assert (result["changed"], result["complete"], result["missing"]) == (True, False, None)
    assert "checkpoint" not in result
    assert host.server.requests == []
    assert list(host.root.parent.iterdir()) == []


def test_second_run_asks_nobody_and_changes_nothing(present, server, wanted):
    first = present.content()
    result = present.run()
    assert (result["changed"], result["fetched"], result["hashed"]) == (False, [], 0)
    assert result["checkpoint"]["files"] == len(wanted)
    assert server.requests == []
    result = present.run(check_mode=True)
    assert (result["changed"], result["complete"], result["missing"]) == (False, True, [])
    assert result["checkpoint"]["files"] == len(wanted)
    assert server.requests == []
    assert present.content() == first


def test_check_mode_tells_what_a_stat_tells(present, server):
    (present.path / "README.md").unlink()
    present.damage(SECOND)
    result = present.run(check_mode=True)
    assert (result["changed"], result["missing"]) == (True, ["README.md", SECOND])
    assert result["diff"]["after"] == f"README.md\n{SECOND}\n"
    assert "checkpoint" not in result
    assert server.requests == []
    assert not (present.path / "README.md").exists()


def test_check_mode_tells_that_the_link_would_change(present):
    (present.root / "current").unlink()
    (present.root / "current").symlink_to("other")
    assert present.run(check_mode=True)["changed"] is True
    assert os.readlink(present.root / "current") == "other"
    assert present.run()["changed"] is True
    assert os.readlink(present.root / "current") == COMMIT


def test_damaged_file_is_named_and_fetched_alone(present, server, published):
    present.damage(SECOND)
    result = present.run()
    assert (result["changed"], result["fetched"], list(result["damaged"])) == (True, [SECOND], [SECOND])
    assert result["damaged"][SECOND].startswith("has SHA-256 ")
    assert {one.path.rpartition("/")[2] for one in server.requests} == {SECOND}
    assert sha256(present.path / SECOND) == sha256(published / SECOND)


def test_touched_file_is_no_change(present, server):
    os.utime(present.path / SECOND)
    result = present.run()
    assert (result["changed"], result["hashed"], result["fetched"]) == (False, 1, [])
    assert server.requests == []


def test_without_repair_what_is_damaged_is_named_and_left(present, server):
    present.damage(SECOND)
    (present.path / "README.md").unlink()
    before = present.content()
    in_words(present.run(repair=False), f"{SECOND} has SHA-256 ", f"{present.path}/README.md is missing")
    assert present.content() == before
    assert server.requests == []


def test_without_repair_a_good_checkpoint_is_fine(present):
    assert present.run(repair=False)["changed"] is False


def test_always_finds_what_left_no_trace(present, wanted):
    present.damage(SECOND, keep_mtime=True)
    assert present.run()["damaged"] == {}
    result = present.run(verify="always")
    assert (result["fetched"], result["hashed"]) == ([SECOND], len(wanted))


def test_no_link_where_none_is_wanted(host):
    host.run(link=False)
    assert host.path.is_dir()
    assert not (host.root / "current").is_symlink()
    assert host.run(link=False)["changed"] is False


def test_interrupted_connection_goes_on(host, server, wanted):
    server.fail("cut", path=f"*{SECOND}*", after=5000)
    server.fail("503", path=f"*{SHARDS[0]}*")
    assert host.run()["fetched"] == wanted


def test_file_that_no_manifest_names_is_warned_of(present):
    (present.path / "mine.txt").write_text("")
    (warning,) = present.run()["warnings"]
    assert f"{socket.gethostname()}: {present.path}: mine.txt is there, and no manifest names it" in str(warning)


def test_another_revision_is_not_taken_for_the_one_that_is_there(present):
    in_words(present.run(revision="0" * 40), "has no commit " + "0" * 40)


def test_check_mode_does_not_know_another_revision(present):
    result = present.run(check_mode=True, revision="0" * 40)
    assert (result["changed"], result["complete"], result["missing"]) == (True, False, None)
    assert "checkpoint" not in result
    assert present.server.requests == []


def test_files_that_are_no_longer_excluded_are_fetched(host, wanted):
    host.run(exclude=[*EXCLUDED, "chat_template.jinja"])
    assert host.run()["fetched"] == ["chat_template.jinja"]
    assert sorted(host.content()) == wanted


# What a hub refuses


def test_hub_that_wants_a_token_is_told(host, server):
    server.token = TOKEN
    in_words(host.run(), "wants a token", "vllm_model_token")
    assert not host.path.exists()


def test_hub_that_refuses_the_token_is_told_without_it(host, server):
    server.token = "hf_another"
    result = host.run(token=TOKEN)
    in_words(result, "refuses the token")
    assert TOKEN not in json.dumps(result)


def test_token_is_used_and_in_no_output(host, server, capsys):
    server.token = TOKEN
    result = host.run(token=TOKEN)
    assert result["changed"] is True
    assert TOKEN not in json.dumps(result)
    assert TOKEN not in capsys.readouterr().err
    assert any(TOKEN in one.headers.get("authorization", "") for one in server.requests)
    written = [path for path in host.root.parent.rglob("*") if path.is_file() and not path.is_relative_to(host.path)]
    assert written
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize("login", [{}, {"http_proxy": "http://127.0.0.1:9"}], ids=["", "other-at-login"])
def test_hub_is_reached_through_the_proxy_whose_password_is_in_no_output(host, server, wanted, login):
    """The server answers as a proxy does, too: what differs is only the request's first line."""
    os.environ.update(login)
    proxy = server.url.replace("//", "//user:Passw0rd@")
    result = host.run(endpoint="http://hub.example:8080", proxy=proxy)
    assert result.get("fetched") == wanted, result
    assert {one.headers["host"].partition(":")[0] for one in server.requests} == {"hub.example"}
    assert all(one.headers["proxy-authorization"].startswith("Basic ") for one in server.requests)
    assert "Passw0rd" not in json.dumps(result)


def test_proxy_that_is_not_there_is_told_without_its_password(host):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    result = host.run(proxy=f"http://user:Passw0rd@127.0.0.1:{port}")
    in_words(result, f"through the proxy 127.0.0.1:{port}")
    assert "Passw0rd" not in json.dumps(result)


def test_certificates_that_are_not_there_are_told(host, tmp_path):
    in_words(host.run(endpoint="https://127.0.0.1:9", ca_file=str(tmp_path / "nowhere.pem")), "vllm_model_ca_file")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("gated", "accept the licence"),
        ("repository", "has no repository"),
        ("ratelimit", "HTTP 429"),
        ("503", "HTTP 503"),
        ("html", "does not answer as a hub does"),
    ],
)
def test_refusal_is_told_with_the_hosts_name(host, server, fault, text):
    server.fail(fault, times=-1)
    in_words(host.run(), text)
    assert not host.path.exists()


def test_hub_that_is_not_there_is_told(host):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    in_words(host.run(endpoint=f"http://127.0.0.1:{port}"), f"cannot reach http://127.0.0.1:{port}")


def test_hub_that_damages_a_file_is_named_with_it(host, server):
    server.fail("corrupt", path=f"*{SECOND}*", after=1000, times=-1)
    in_words(host.run(), f"{SECOND} from {server.url}/openai/gpt-oss-120b has SHA-256 ", "the source is damaged")


def test_one_files_failure_is_told_while_others_are_under_way(host, server):
    server.fail("corrupt", path=f"*{SECOND}*", after=1000, times=-1)
    server.fail("trickle", path=f"*{SHARDS[2]}*", after=1000, seconds=0.001)
    in_words(host.run(), f"{SECOND} from ")


def test_too_little_space_is_told_before_a_file_is_asked_for(host, server):
    in_words(host.run(margin=2**40), f"{host.root} needs ", " MiB free: ")
    assert not server.asked("*/resolve/*") + server.asked("/storage/*")


# From a directory, and by others


def test_directory_is_copied(host, published, wanted, manifest):
    result = host.run(source="directory", directory=str(published), manifest=manifest)
    assert (result["changed"], result["fetched"]) == (True, wanted)
    assert sorted(host.content()) == wanted
    assert host.server.requests == []
    assert host.run(source="directory", directory=str(published), manifest=manifest)["changed"] is False


def test_check_mode_knows_from_the_manifest_what_is_missing(host, wanted, manifest):
    result = host.run(check_mode=True, source="staging", manifest=manifest)
    assert (result["missing"], result["staging"]) == (wanted, str(host.staging))


def test_files_that_were_put_into_the_staging_directory_are_taken(host, published, wanted, manifest):
    host.staging.mkdir(parents=True)
    for name in wanted:
        shutil.copy(published / name, host.staging / name)
    assert host.run(source="staging", manifest=manifest)["fetched"] == wanted
    assert not host.staging.exists()


def test_file_that_nobody_put_there_is_named(host, published, wanted, manifest):
    host.staging.mkdir(parents=True)
    for name in wanted:
        if name != SECOND:
            shutil.copy(published / name, host.staging / name)
    in_words(host.run(source="staging", manifest=manifest), f"{SECOND} was not copied into {host.staging}")


def test_manifest_that_names_other_content_is_not_met(host, manifest):
    files = {**manifest["files"], "README.md": {**manifest["files"]["README.md"], "sha256": "0" * 64}}
    in_words(host.run(manifest={"files": files}), "README.md from ", "wanted " + "0" * 64)


@pytest.mark.parametrize("check_mode", [False, True])
def test_manifest_that_is_none_is_told(host, check_mode):
    in_words(host.run(check_mode=check_mode, manifest={"files": {"../x": {"size": 1}}}), "'../x' is no path below")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"repository": None}, "repository"),
        ({"revision": None}, "revision"),
        ({"source": "directory", "directory": "/srv"}, "manifest"),
        ({"source": "directory", "manifest": {"files": {"a": {"size": 1, "sha256": "0" * 64}}}}, "directory"),
        ({"source": "staging"}, "manifest"),
    ],
)
def test_option_that_the_source_needs_is_asked_for(host, changes, name):
    result = host.run(**changes)
    assert result.get("failed")
    assert re.search(rf"\b{name}\b.* (wanted|missing)|missing.* {name}\b", result["msg"]), result["msg"]
    assert host.server.requests == []


@pytest.fixture
def no_hub_library(monkeypatch):
    """As in the host's own Python."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def test_hub_without_its_library_is_told(host, no_hub_library):
    in_words(host.run(), "huggingface_hub")


def test_sources_but_the_hub_need_no_library_of_it(host, published, manifest, no_hub_library):
    assert host.run(source="directory", directory=str(published), manifest=manifest)["changed"] is True


# In place


@pytest.fixture
def mount(host, published):
    """The checkpoint in a directory that the module must not write to."""
    subprocess.run(["cp", "-r", published, host.path.parent], check=True)
    host.path = host.root
    return host


def in_place(host, check_mode=False, **changes):
    return host.run(check_mode, source="none", **changes)


def state(path):
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in (path, *path.rglob("*"))}


def test_checkpoint_in_place_counts_as_it_is_first_seen(mount, server, wanted):
    before = state(mount.path)
    result = in_place(mount)
    assert (result["changed"], result["hashed"], result["fetched"]) == (True, len(wanted), [])
    result = in_place(mount)
    assert (result["changed"], result["hashed"]) == (False, 0)
    assert state(mount.path) == before
    assert not (mount.path.parent / "current").is_symlink()
    assert server.requests == []


def test_what_differs_from_what_was_first_seen_is_an_error_that_names_the_record(mount):
    verified = in_place(mount)["checkpoint"]["verified"]
    mount.damage(SECOND)
    record = record_path(str(mount.path), str(mount.records))
    in_words(
        in_place(mount),
        f"{mount.path}/{SECOND} has SHA-256 ",
        f"that is not what was verified on {verified}: put the files back, or, where the change was meant, "
        f"remove {record} and run again",
    )
    os.unlink(record)
    assert in_place(mount)["changed"] is True


def test_other_exclusions_do_not_make_what_differs_right(mount):
    in_place(mount)
    mount.damage(SECOND)
    in_words(in_place(mount, exclude=[*EXCLUDED, "*.txt"]), SECOND)


def test_damage_in_place_that_left_no_trace_is_found_by_always(mount):
    in_place(mount)
    mount.damage(SECOND, keep_mtime=True)
    assert in_place(mount)["changed"] is False
    in_words(in_place(mount, verify="always"), SECOND)


def test_manifest_holds_in_place_too(mount, manifest):
    assert in_place(mount, manifest=manifest)["changed"] is True
    before = state(mount.path)
    mount.damage(SECOND)
    (mount.path / "README.md").unlink()
    result = in_place(mount, manifest=manifest)
    in_words(result, f"{mount.path}/README.md is missing", f"{mount.path}/{SECOND} has SHA-256 ")
    assert "that is not what was verified" not in result["msg"]
    assert set(state(mount.path)) == set(before) - {mount.path / "README.md"}


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_directory_without_a_checkpoint_is_told(host, check_mode, there):
    if there:
        host.path.mkdir(parents=True)
    in_words(in_place(host, check_mode), str(host.path), "config.json")


def test_checkpoint_in_place_that_lacks_a_shard_is_told_when_it_is_first_seen(mount):
    (mount.path / SECOND).unlink()
    in_words(in_place(mount), f"{SECOND} is missing, and model.safetensors.index.json names it")
    assert not mount.records.exists()


def test_check_mode_in_place_reads_and_writes_nothing(mount):
    result = in_place(mount, check_mode=True)
    assert (result["changed"], result["missing"]) == (True, None)
    assert not mount.records.exists()
    in_place(mount)
    result = in_place(mount, check_mode=True)
    assert (result["changed"], result["missing"]) == (False, [])
