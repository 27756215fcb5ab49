"""Fetching from a hub: against a real HTTP server that misbehaves when told to."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from json import loads
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _hub
from ansible_collections.nvl.vllm.plugins.module_utils._hub import Hub, HubError, Stopped, fetch, list_files, notes
from huggingface_hub.utils import close_session

SERVER = Path(__file__).parents[2] / "hub_server.py"
_spec = importlib.util.spec_from_file_location("hub_server", SERVER)
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look there
_spec.loader.exec_module(hub_server)

REPOSITORY = hub_server.REPOSITORY
COMMIT = hub_server.REVISION
OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00002-of-00003.safetensors"
TOKEN = "hf_" + "SecretSecretSecret"
EXCLUDED = ("original/*", "metal/")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    hub_server.write_repository(directory)
    return directory


@pytest.fixture
def server(checkpoint):
    with hub_server.HubServer(checkpoint, large=4096) as running:
        yield running
        close_session()


@pytest.fixture
def other_origin(checkpoint):
    """A hub whose storage is another origin, as that of huggingface.co is."""
    with hub_server.HubServer(checkpoint, large=4096, other_origin=True) as running:
        yield running
        close_session()


@pytest.fixture(autouse=True)
def sleeps(monkeypatch):
    """Nothing waits between attempts; what would have been waited is noted. And no proxy or token of this machine."""
    slept: list[float] = []
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=slept.append, time=time.time))
    monkeypatch.setattr(_hub, "_pause", lambda seconds, _stop: slept.append(seconds))
    monkeypatch.setattr(_hub, "CHUNK", 1000)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_ofThisMachine")
    yield slept
    close_session()


@pytest.fixture
def fetched(server, checkpoint, tmp_path):
    """Fetches the shard (or another file) and says what became of it."""
    return lambda path=SHARD, **options: Fetched(server, checkpoint, tmp_path / "part", path, **options)


class Fetched:
    def __init__(self, server, checkpoint, part, path, token="", stop=None, advance=lambda _: None, size=None):
        self.content = (checkpoint / path).read_bytes()
        self.part = part
        self.advanced = []
        begun_with = part.stat().st_size if part.exists() else 0

        def note(count):
            self.advanced.append(count)
            advance(sum(self.advanced))

        size = len(self.content) if size is None else size
        try:
            fetch(hub_of(server, token), path, size, str(part), note, stop)
        finally:
            if part.exists():
                assert begun_with + sum(self.advanced) == part.stat().st_size
        assert part.read_bytes() == self.content


def hub_of(server, token="", revision=COMMIT, repository=REPOSITORY):
    return Hub(repository, revision, server.url, token)


def ranges(server):
    """Where each request to the storage began, and the bytes that it was sent."""
    return [
        (int(one.headers.get("range", "bytes=0-")[len("bytes=") : -1]), one.sent) for one in server.asked("/storage/*")
    ]


def in_one_sentence(caught, *texts):
    """The error is one short line that has these texts, and has no token or signature, not even in its traceback."""
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    whole = "".join(traceback.format_exception(caught.value))
    assert "Secret" not in whole
    assert "Signature" not in whole
    for text in texts:
        assert text in message, message


# The stand-in itself


def test_generated_checkpoint_is_a_real_one(checkpoint):
    index = loads((checkpoint / "model.safetensors.index.json").read_text())
    total = 0
    for shard in set(index["weight_map"].values()):
        content = (checkpoint / shard).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = loads(content[8 : 8 + length])
        del header["__metadata__"]
        assert {name for name, of in index["weight_map"].items() if of == shard} == set(header)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert 8 + length + max(ends) == len(content)
        for entry in header.values():
            elements = 1
            for count in entry["shape"]:
                elements *= count
            assert entry["data_offsets"][1] - entry["data_offsets"][0] == 2 * elements
        total += max(ends)
    assert index["metadata"]["total_size"] == total


def test_server_runs_from_the_command_line(tmp_path):
    command = [sys.executable, str(SERVER), str(tmp_path / "new"), "--repository", "o/m", "--revision", OTHER_COMMIT]
    command += ["--port", "0", "--large", "4096", "--fault", "cut,path=*00001*,after=5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            hub = Hub("o/m", OTHER_COMMIT, url)
            shard = "model-00001-of-00003.safetensors"
            size = list_files(hub).files[shard].size
            fetch(hub, shard, size, str(tmp_path / "part"))
            assert (tmp_path / "part").read_bytes() == (tmp_path / "new" / shard).read_bytes()
            with urllib.request.urlopen(f"{url}/control/requests") as answer:
                requests = loads(answer.read())
            assert [one["headers"].get("range") for one in requests if one["path"].startswith("/storage/")] == [
                None,
                "bytes=5000-",
            ]
            with urllib.request.urlopen(f"{url}/control/faults", data=b"404\n") as answer:
                assert answer.status == 200
            with pytest.raises(HubError, match="HTTP 404"):
                list_files(hub)
        finally:
            process.terminate()
            close_session()


def test_faults_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'cutt' is no fault"):
        hub_server.Fault.parse("cutt,times=1")
    assert hub_server.Fault.parse("cut,path=*x,times=-1,after=7") == hub_server.Fault("cut", "*x", -1, 7)


# Hub


def test_hub_does_not_show_its_token():
    hub = Hub(REPOSITORY, COMMIT, f"https://user:{TOKEN}@hub.example.com/", TOKEN)
    assert TOKEN not in repr(Hub(REPOSITORY, COMMIT, "", TOKEN))
    assert str(hub) == "https://hub.example.com"
    assert str(Hub(REPOSITORY, COMMIT)) == "https://huggingface.co"


# list_files


def test_list_files(server, checkpoint):
    manifest = list_files(hub_of(server), EXCLUDED)
    assert (manifest.repository, manifest.revision) == (REPOSITORY, COMMIT)
    assert sorted(manifest.files) == sorted(
        path.name for path in checkpoint.iterdir() if path.is_file() and path.name != ".gitattributes"
    )
    content = (checkpoint / SHARD).read_bytes()
    assert manifest.files[SHARD].size == len(content)
    assert manifest.files[SHARD].sha256 == hashlib.sha256(content).hexdigest()
    config = (checkpoint / "config.json").read_bytes()
    assert manifest.files["config.json"].git_sha1 == hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    assert not manifest.files["config.json"].sha256


def test_list_files_without_exclusion_has_the_other_folders(server):
    assert {"original/config.json", "metal/model.bin"} < set(list_files(hub_of(server)).files)


def test_list_files_reads_all_pages(server):
    whole = list_files(hub_of(server))
    server.page = 4
    assert list_files(hub_of(server)) == whole
    assert len(server.asked("/api/*")) == 5


def test_list_files_that_are_all_excluded(server):
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server), ["*"])
    in_one_sentence(caught, server.url, "besides those excluded (*)")


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "file", "path": "../etc/passwd", "size": 1, "oid": "0" * 40},
        {"type": "file", "path": "x", "size": -1, "oid": "0" * 40},
        {"type": "file", "path": "x", "size": 1, "oid": "no checksum"},
    ],
)
def test_list_files_refuses_a_list_that_cannot_be_right(server, monkeypatch, entry):
    monkeypatch.setattr(server, "tree", lambda: [entry])
    with pytest.raises(HubError, match="lists files of openai/gpt-oss-120b that cannot be right"):
        list_files(hub_of(server))


@pytest.mark.parametrize("tree", [{"error": "no"}, ["x"], [{"path": "x"}], [{"path": "x", "type": "file"}]])
def test_list_files_of_a_server_that_is_no_hub(server, monkeypatch, tree):
    monkeypatch.setattr(hub_server._Handler, "tree", lambda self, _path, _query: self.answer(200, tree))
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server))
    in_one_sentence(caught, server.url, "does not answer as a hub does", "vllm_model_endpoint")


def test_list_files_html(server):
    server.fail("html")
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server))
    in_one_sentence(caught, "does not answer as a hub does", "vllm_model_proxy")


def test_list_files_503_then_success(server, sleeps):
    server.fail("503", times=2)
    assert list_files(hub_of(server)).files
    assert sleeps == [1, 2]


def test_list_files_503_for_ever(server):
    server.fail("503", times=-1)
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server))
    in_one_sentence(caught, server.url, "fails to answer", "HTTP 503 told to fail", "run again later")


def test_list_files_429_then_success(server, sleeps):
    server.fail("ratelimit", seconds=7)
    assert list_files(hub_of(server)).files
    assert sleeps == [8]
    assert [one.status for one in server.asked("/api/*")] == [429, 200]


def test_list_files_unreachable():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(HubError) as caught:
            list_files(Hub(REPOSITORY, COMMIT, url))
    in_one_sentence(caught, f"cannot reach {url}: [Errno 111] Connection refused", "docs/supply.md")
    in_one_sentence(caught, "vllm_model_endpoint", "vllm_model_proxy", "vllm_model_ca_file")


def test_list_files_of_a_silent_hub(monkeypatch):
    monkeypatch.setattr(_hub, "TIMEOUT", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        with pytest.raises(HubError) as caught:
            list_files(Hub(REPOSITORY, COMMIT, f"http://127.0.0.1:{silent.getsockname()[1]}"))
        close_session()
    in_one_sentence(caught, "cannot reach", "timed out")


def test_unknown_host():
    with pytest.raises(HubError) as caught:
        list_files(Hub(REPOSITORY, COMMIT, "http://hub.invalid"))
    in_one_sentence(caught, "cannot reach http://hub.invalid: [Errno -")


def test_tls_to_a_server_without(server):
    with pytest.raises(HubError) as caught:
        list_files(Hub(REPOSITORY, COMMIT, server.url.replace("http:", "https:")))
    in_one_sentence(caught, "cannot reach https:", "SSL")


def test_proxy_is_named_without_its_password(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", f"http://user:{TOKEN}@{proxy}")
        with pytest.raises(HubError) as caught:
            list_files(Hub(REPOSITORY, COMMIT))
    in_one_sentence(caught, f"cannot reach https://huggingface.co through the proxy {proxy}: [Errno 111]")


def test_proxy_that_answers_407(server, monkeypatch):
    monkeypatch.setattr(
        hub_server._Handler, "do_CONNECT", lambda self: self.refuse(407, "", "Authenticate"), raising=False
    )
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(HubError) as caught:
        list_files(Hub(REPOSITORY, COMMIT))
    in_one_sentence(caught, f"cannot reach https://huggingface.co through the proxy 127.0.0.1:{server.port}: 407")


@pytest.mark.parametrize(
    "endpoint", ["hub.example.com", "ftp://hub.example.com", "http://hub.example.com:port", "http://[hub"]
)
def test_endpoint_that_is_no_url(endpoint, tmp_path):
    hub = Hub(REPOSITORY, COMMIT, endpoint)
    for act in (lambda: list_files(hub), lambda: fetch(hub, "x", 1, str(tmp_path / "part"))):
        with pytest.raises(HubError) as caught:
            act()
        in_one_sentence(caught, endpoint, "vllm_model_endpoint")


def test_environment_that_cannot_work(server, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server))
    in_one_sentence(caught, "cannot set up a connection", "vllm_model_ca_file")
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("all_proxy", "gopher://proxy")
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server))
    in_one_sentence(caught, "cannot set up a connection", "vllm_model_proxy")
    monkeypatch.delenv("all_proxy")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server))
    in_one_sentence(caught, "HF_HUB_OFFLINE")


# What a hub refuses, when it is asked for the list and when it is asked for a file


@pytest.fixture(params=["list", "file"])
def refusal(request, server, tmp_path):
    """Asks for the list of files, or for a file, and returns the refusal."""

    def ask(token="", **hub):
        hub = hub_of(server, token, **hub)
        part = str(tmp_path / "part")
        act = list_files if request.param == "list" else lambda hub: fetch(hub, SHARD, 300_000, part)
        with pytest.raises(HubError) as caught:
            act(hub)
        assert len(server.requests) < 10
        return caught

    return ask


def test_401_without_a_token(refusal, server):
    server.token = TOKEN
    in_one_sentence(
        refusal(), f"{server.url} wants a token for {REPOSITORY} (HTTP 401): set vllm_model_token", "does not exist"
    )


def test_401_with_a_token(refusal, server):
    server.token = TOKEN
    in_one_sentence(refusal(TOKEN + "wrong"), "refuses the token", "HTTP 401 Invalid credentials", "vllm_model_token")


def test_401_of_a_repository_that_does_not_exist(refusal):
    in_one_sentence(refusal(repository="openai/no"), "wants a token for openai/no", "check vllm_model_repository")


def test_403_gated(refusal, server):
    server.fail("gated", times=-1)
    in_one_sentence(refusal(TOKEN), "does not let the account", "accept the licence", f"{server.url}/{REPOSITORY}")


def test_403_otherwise(refusal, server):
    server.fail("403", times=-1)
    in_one_sentence(refusal(), "HTTP 403 told to fail", "vllm_model_token", "proxy")


def test_404_of_the_repository(refusal):
    in_one_sentence(
        refusal(TOKEN, repository="openai/no"), "has no repository openai/no", "check vllm_model_repository"
    )


def test_404_of_the_commit_names_the_newest(refusal, server):
    server.main = OTHER_COMMIT
    in_one_sentence(
        refusal(TOKEN, revision="f" * 40),
        f"{server.url} has no commit {'f' * 40} of {REPOSITORY} (HTTP 404; its main is {OTHER_COMMIT} now)",
        "check vllm_model_revision",
    )


def test_404_of_the_commit_where_the_newest_is_not_told(refusal, server):
    server.fail("500", path="/api/models/*b", times=-1)
    in_one_sentence(refusal(revision="f" * 40), "(HTTP 404): check vllm_model_revision")


def test_404_that_says_nothing(refusal, server):
    server.fail("404", times=-1)
    in_one_sentence(refusal(), "HTTP 404", "vllm_model_endpoint")


def test_429_for_ever(refusal, server, sleeps):
    server.fail("ratelimit", times=-1, seconds=30)
    caught = refusal()
    in_one_sentence(caught, server.url, "HTTP 429; it asks to wait 30 s", "run again later", "vllm_model_endpoint")
    in_one_sentence(caught, "vllm_model_token, which raises the limit")
    assert "vllm_model_token" not in str(refusal_again(server).value)
    assert sleeps[:5] == [31] * 5


def refusal_again(server):
    with pytest.raises(HubError) as caught:
        list_files(hub_of(server, TOKEN))
    return caught


def test_other_status(refusal, server):
    server.fail("418", times=-1)
    in_one_sentence(refusal(), "refuses", "HTTP 418 told to fail")


def test_token_that_is_no_header_is_not_repeated(refusal, server):
    in_one_sentence(refusal(TOKEN + "\n"), "vllm_model_token has spaces, newlines")
    in_one_sentence(refusal(TOKEN + "é"), "vllm_model_token has spaces, newlines")
    assert not server.requests


def test_token_that_the_server_repeats_is_not(refusal, server, monkeypatch):
    token = "NotTheUsualForm-" + "Secret"
    monkeypatch.setitem(hub_server._REFUSALS, "gated", (403, "", f"{token} is not allowed, nor is {TOKEN}"))
    server.fail("gated", times=-1)
    in_one_sentence(refusal(token), "*** is not allowed, nor is ***")


def test_404_of_one_file(fetched, server):
    server.fail("entry", path=f"*/{SHARD}")
    with pytest.raises(HubError) as caught:
        fetched()
    in_one_sentence(caught, f"has no {SHARD} in {REPOSITORY} at {COMMIT} (HTTP 404)", "vllm_model_endpoint")


# fetch


@pytest.mark.parametrize("path", [SHARD, "config.json"])
def test_fetch(fetched, server, path, monkeypatch, capfd):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    result = fetched(path)
    assert all(count > 0 for count in result.advanced)
    assert synced == [len(result.content)]
    assert len(server.asked("*/resolve/*")) == 1
    assert capfd.readouterr() == ("", "")  # no progress bar


def test_fetch_of_what_is_there_asks_nothing(fetched, server):
    fetched()
    before = len(server.requests)
    assert fetched().advanced == []
    assert len(server.requests) == before


def test_fetch_of_an_empty_file(server, tmp_path):
    fetch(hub_of(server), "empty", 0, str(tmp_path / "part"))
    assert (tmp_path / "part").read_bytes() == b""


def test_fetch_path_with_special_characters(server, tmp_path):
    server.directory = tmp_path / "odd"
    (tmp_path / "odd" / "a b").mkdir(parents=True)
    (tmp_path / "odd" / "a b" / "50%?#.txt").write_text("odd")
    (path,) = list_files(hub_of(server)).files
    fetch(hub_of(server), path, 3, str(tmp_path / "part"))
    assert (tmp_path / "part").read_text() == "odd"


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_resumes_in_the_middle_of_a_shard(fetched, server, fault):
    arrived = threading.Event()
    server.fail(fault, path="/storage/*", after=123_000, ready=arrived)
    result = fetched(advance=lambda count: count == 123_000 and arrived.set())
    assert ranges(server) == [(0, 123_000), (123_000, len(result.content) - 123_000)]
    assert min(result.advanced) > 0


def test_silence_in_the_middle_of_a_shard(fetched, server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.fail("trickle", path="/storage/*", after=100_000, seconds=60)
    fetched()
    assert ranges(server)[1][0] == 100_000


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_many_breaks_are_no_reason_to_give_up_while_bytes_arrive(fetched, server, fault):
    # 2 pieces of 1000 bytes have arrived before each break; the 500 after them are lost.
    arrived = [threading.Event() for _ in range(2 * _hub.TRIES)]
    for event in arrived:
        server.fail(fault, path="/storage/*", after=2500, ready=event)
    fetched(
        advance=lambda count: count % 2000 == 0 and count <= 2000 * len(arrived) and arrived[count // 2000 - 1].set()
    )
    assert [begin for begin, _sent in ranges(server)] == list(range(0, 2000 * len(arrived) + 1, 2000))


def test_more_breaks_than_http_get_can_recurse(fetched, server, monkeypatch):
    server.fail("cut", path="/storage/*", times=280, after=1000)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        fetched()
    finally:
        sys.setrecursionlimit(limit)
    assert len(ranges(server)) > 280


def test_continues_in_a_later_call(fetched, server):
    stop = threading.Event()
    server.fail("trickle", path="/storage/*", after=100_000, seconds=0.01)

    def advance(count):
        if count == 100_000:
            stop.set()
            server.released.set()

    with pytest.raises(Stopped):
        fetched(stop=stop, advance=advance)
    result = fetched()
    (_first, second) = ranges(server)
    assert second == (100_000, len(result.content) - 100_000)


def test_stops_before_it_asks(fetched, server):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fetched(stop=stop)
    assert not server.requests


def test_stops_in_a_pause_between_attempts(server, tmp_path, monkeypatch):
    monkeypatch.undo()  # real pauses
    monkeypatch.setattr(_hub, "PAUSE", 600.0)
    monkeypatch.setattr(_hub, "PAUSE_LIMIT", 600.0)
    server.fail("503", times=-1)
    stop, failures = threading.Event(), []

    def run():
        try:
            fetch(hub_of(server), SHARD, 300_000, str(tmp_path / "part"), stop=stop)
        except BaseException as error:
            failures.append(error)

    paused = threading.Event()
    with notes(lambda _line: paused.set()):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert paused.wait(20)
        stop.set()
        thread.join(20)
    assert [type(error) for error in failures] == [Stopped]
    close_session()


def test_killed_in_the_middle_it_continues(fetched, server, checkpoint, tmp_path):
    """What SIGKILL leaves is the beginning of the file, and the next run goes on from there."""
    server.fail("trickle", path="/storage/*", after=200_000, seconds=0.05)
    size = (checkpoint / SHARD).stat().st_size
    code = (
        "from ansible_collections.nvl.vllm.plugins.module_utils import _hub; _hub.CHUNK = 1000;"
        f"_hub.fetch(_hub.{hub_of(server)!r}, {SHARD!r}, {size}, {str(tmp_path / 'part')!r})"
    )
    root = Path(__file__).parents[4] / ".collections"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}) as process:
        try:
            deadline = time.monotonic() + 30
            while not (tmp_path / "part").exists() or (tmp_path / "part").stat().st_size < 200_000:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
    server.released.set()
    fetched()
    assert ranges(server)[-1][0] >= 200_000


def test_longer_part_starts_anew(fetched, server, tmp_path):
    (tmp_path / "part").write_bytes(b"x" * 400_000)
    result = fetched()
    assert result.advanced[0] == -400_000
    assert ranges(server) == [(0, len(result.content))]


def test_range_ignored_starts_anew(fetched, server, checkpoint, tmp_path):
    (tmp_path / "part").write_bytes((checkpoint / SHARD).read_bytes()[:1000])
    server.fail("norange", path="/storage/*", times=-1)
    result = fetched()
    assert result.advanced[0] == -1000
    assert ranges(server) == [(1000, len(result.content))]


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_range_ignored_and_always_cut_ends(fetched, server, monkeypatch, fault):
    server.fail(fault, path="/storage/*", times=-1, after=5000)
    real = hub_server._Handler.body

    def body(self, file, headers):
        del self.headers["Range"]
        real(self, file, headers)

    monkeypatch.setattr(hub_server._Handler, "body", body)
    with pytest.raises(HubError) as caught:
        fetched()
    assert len(server.asked("/storage/*")) < 60
    in_one_sentence(caught, SHARD)


@pytest.mark.parametrize("fault", ["longer", "shorter"])
def test_size_that_does_not_fit(fetched, server, tmp_path, fault):
    server.fail(fault, path=SHARD)
    size = list_files(hub_of(server)).files[SHARD].size
    counts: list[int] = []
    with pytest.raises(HubError) as caught:
        fetched(size=size, advance=counts.append)
    assert max(counts) <= size  # it never takes more of the disk than was reckoned with
    in_one_sentence(caught, f"{SHARD} from {server.url} is not of the size", f"({size} bytes)", "vllm_model_endpoint")
    assert (tmp_path / "part").stat().st_size == 0


def test_part_longer_than_what_the_server_has(fetched, server, checkpoint, tmp_path):
    size = (checkpoint / SHARD).stat().st_size
    (tmp_path / "part").write_bytes(b"x" * size)
    with pytest.raises(HubError) as caught:
        fetched(size=size + 1)
    in_one_sentence(caught, "is not of the size")
    assert [one.status for one in server.asked("/storage/*")] == [416]


def test_html_in_the_place_of_a_shard(fetched, server, tmp_path):
    server.fail("html", path="*/resolve/*", times=-1)
    with pytest.raises(HubError, match="is not of the size"):
        fetched()
    assert (tmp_path / "part").stat().st_size == 0  # a later call must not continue a page


def test_wrong_bytes_are_for_the_caller_to_find(fetched, server):
    server.fail("corrupt", path="/storage/*", after=1234)
    with pytest.raises(AssertionError):
        fetched()


@pytest.mark.parametrize("path", ["*/resolve/*", "/storage/*"])
@pytest.mark.parametrize("status", ["500", "503", "408"])
def test_5xx_then_success(fetched, server, path, status):
    server.fail(status, path=path, times=2)
    fetched()
    assert [one.status for one in server.asked(path)][:3] == [int(status)] * 2 + [302 if "resolve" in path else 200]


def test_503_for_ever(fetched, server, sleeps):
    server.fail("503", times=-1)
    with pytest.raises(HubError) as caught:
        fetched()
    in_one_sentence(caught, f"fails to answer for {SHARD} of {REPOSITORY} (HTTP 503 told to fail)", "run again later")
    assert len(server.requests) == _hub.TRIES
    assert sleeps == [1, 2, 4, 8, 16]


def test_tries_are_counted_anew_after_a_new_byte(fetched, server):
    arrived = threading.Event()
    server.fail("503", path="/storage/*", times=_hub.TRIES - 1)
    server.fail("reset", path="/storage/*", after=50_000, ready=arrived)

    def advance(count):
        if count == 50_000:
            server.fail("503", path="/storage/*", times=_hub.TRIES - 1)
            arrived.set()

    fetched(advance=advance)
    failures = [503] * (_hub.TRIES - 1)
    assert [one.status for one in server.asked("/storage/*")] == [*failures, 200, *failures, 206]


def test_429_then_success(fetched, server, sleeps):
    server.fail("ratelimit", path="*/resolve/*", times=2, seconds=1)
    fetched()
    assert [one.status for one in server.asked("*/resolve/*")] == [429, 429, 302]
    assert sleeps == [2, 2]


def test_hub_that_vanishes(checkpoint, tmp_path):
    with hub_server.HubServer(checkpoint, large=4096) as server:
        hub = hub_of(server, TOKEN)
    size = (checkpoint / SHARD).stat().st_size
    with pytest.raises(HubError) as caught:
        fetch(hub, SHARD, size, str(tmp_path / "part"))
    in_one_sentence(
        caught,
        f"cannot fetch {SHARD} from {server.url}: [Errno 111] Connection refused",
        f"({_hub.TRIES} times in a row without a new byte; what has arrived is kept)",
    )


def test_storage_that_is_unreachable_is_named(other_origin, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        other_origin.storage_port = unused.getsockname()[1]
        with pytest.raises(HubError) as caught:
            fetch(hub_of(other_origin), SHARD, 300_000, str(tmp_path / "part"))
    in_one_sentence(
        caught,
        f"from 127.0.0.1:{other_origin.storage_port} (where {other_origin.url} keeps its files): [Errno 111]",
    )


@pytest.mark.parametrize(("status", "text"), [(403, "refuses"), (503, "fails to answer for")])
def test_storage_that_refuses_is_named(other_origin, tmp_path, status, text):
    other_origin.fail(str(status), path="/storage/*", times=-1)
    with pytest.raises(HubError) as caught:
        fetch(hub_of(other_origin), SHARD, 300_000, str(tmp_path / "part"))
    where = f"127.0.0.1:{other_origin.storage_port} (where {other_origin.url} keeps its files)"
    in_one_sentence(caught, f"{where} {text}", f"HTTP {status} told to fail", "vllm_model_endpoint")


def test_token_goes_to_the_hub_and_nowhere_else(other_origin, checkpoint, tmp_path):
    other_origin.token = TOKEN
    other_origin.fail("redirect", path="*/resolve/*/config.json")
    hub = hub_of(other_origin, TOKEN)
    size = list_files(hub).files[SHARD].size
    fetch(hub, SHARD, size, str(tmp_path / "part"))
    assert {one.headers.get("authorization") for one in other_origin.requests if one.port == other_origin.port} == {
        f"Bearer {TOKEN}"
    }
    stored = [one for one in other_origin.requests if one.port == other_origin.storage_port]
    assert [one.headers.get("authorization") for one in stored] == [None]
    with pytest.raises(HubError):  # the other origin asks for the token, too, and does not get it
        fetch(hub, "config.json", 10_000, str(tmp_path / "config"))
    assert "authorization" not in other_origin.requests[-1].headers
    assert other_origin.requests[-1].port == other_origin.storage_port


def test_no_token_of_this_machine_is_used(fetched, server, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("hf_saved")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    list_files(hub_of(server))
    fetched()
    assert all("authorization" not in one.headers for one in server.requests)
    assert all(one.headers["user-agent"] == "nvl.vllm" for one in server.requests)
    # A compressed answer could not be continued.
    assert all(one.headers["accept-encoding"] == "identity" for one in server.asked("*/resolve/*"))


def test_endpoint_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert Hub(REPOSITORY, COMMIT).base == "https://huggingface.co"


# The file system


def test_disk_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_hub, "mount_of", lambda _path: "/srv")
    with pytest.raises(HubError) as caught:
        fetch(hub_of(server), SHARD, 300_000, "/dev/full")
    in_one_sentence(caught, "no space left on the file system /srv", "vllm_model_root")


def test_part_that_cannot_be_written(server, tmp_path):
    with pytest.raises(HubError) as caught:
        fetch(hub_of(server), SHARD, 300_000, str(tmp_path / "missing" / "part"))
    in_one_sentence(caught, f"cannot write {tmp_path}/missing/part: {os.strerror(errno.ENOENT)}")


# notes


def test_notes_say_why_nothing_moves(fetched, server, capfd):
    server.fail("ratelimit", path="*/resolve/*")
    server.fail("cut", path="/storage/*", after=1000)
    server.fail("503", path="/storage/*")
    lines: list[str] = []
    with notes(lines.append):
        fetched(token=TOKEN)
    for wanted in (
        f"HTTP Error 429 thrown while requesting GET {SHARD}",
        "Rate limited. Waiting 2.0s before retry",
        f"{SHARD}: HTTP 503 told to fail; trying again in 1 s",
        f"Error while downloading from {SHARD}:",
    ):
        assert any(wanted in line for line in lines), lines
    assert not any("\n" in line or "http://" in line or len(line) > 200 or "Signature" in line for line in lines)
    assert capfd.readouterr().err == ""


def test_notes_are_the_only_output_and_leave_the_logger_as_it_was():
    class Other(logging.Handler):
        def emit(self, record):
            elsewhere.append(record.getMessage())

    elsewhere: list[str] = []
    lines: list[str] = []
    logger, other = logging.getLogger("huggingface_hub"), Other()
    logger.addHandler(other)
    try:
        before = logger.handlers[:], logger.level, logger.propagate
        with pytest.raises(ZeroDivisionError), notes(lines.append):  # noqa: PT012
            logger.warning("one")
            raise ZeroDivisionError
        assert (logger.handlers[:], logger.level, logger.propagate) == before
        logger.warning("two")
    finally:
        logger.removeHandler(other)
    assert (lines, elsewhere) == (["one"], ["two"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("get https://x.y/a/b.bin?Signature=abc&Key=1: broken\nagain", "get b.bin: broken again"),
        ("get https://user:pw@x.y?q=1", "get x.y"),
        (f"Bearer abc.def and {TOKEN}.", "Bearer *** and ***."),
        ("get http://[ now", "get a URL now"),
        ("x" * 300, "x" * 197 + "..."),
    ],
)
def test_notes_are_short_and_have_no_secrets(text, line):
    lines: list[str] = []
    with notes(lines.append):
        logging.getLogger("huggingface_hub.file_download").warning(text)
    assert lines == [line]


def test_notes_that_fail_do_not_end_the_download(fetched, server, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    server.fail("503", path="*/resolve/*")
    with notes(lambda _line: 1 / 0):
        fetched()


def test_several_files_at_a_time(server, checkpoint, tmp_path):
    """As a module does it: one client for all threads, breaks in all of them."""
    server.fail("cut", path="/storage/*", times=9, after=40_000)
    server.fail("reset", path="/storage/*", times=9, after=70_000)
    files = {path: file for path, file in list_files(hub_of(server)).files.items() if file.sha256}
    failures = []

    def run(path, file):
        try:
            fetch(hub_of(server), path, file.size, str(tmp_path / path))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=item) for item in files.items()]
    random.Random(1).shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    for path, file in files.items():
        assert hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() == file.sha256
