# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Files of a model repository on a hub: Hugging Face, or a mirror that speaks its API.

Works in vLLM's environment, through the huggingface_hub that is locked there (2.4.0). It can resume a
file inside one call only: hf_hub_download deletes what it has when it fails. So its lower half,
http_get, writes into a part file of ours, which stays and is continued, in this run or a later one.

Xet, the hub's own protocol for large files, is left out on purpose: mirrors do not speak it, and it
begins a file anew.

No token that is saved on the host is ever used, and HF_ENDPOINT and HF_TOKEN are not read. Sizes are
bytes and times are seconds.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ._checkpoint import CheckpointError
from ._checksum import Stopped
from ._host import mount_of
from ._manifest import File, Manifest, ManifestError, parse

DEFAULT_ENDPOINT = "https://huggingface.co"
#: Attempts in a row that bring no new byte before a file is given up. Many of them are, inside http_get, up to six.
TRIES = 6
#: The pause after a failed attempt; it doubles with each one up to PAUSE_LIMIT.
PAUSE = 1.0
PAUSE_LIMIT = 30.0
#: How long a hub may be silent when it is asked for the list of files. (For the files: HF_HUB_DOWNLOAD_TIMEOUT, 10.)
TIMEOUT = 30.0
#: What arrives is written, and ``stop`` looked at, in pieces of this size. What of a piece has arrived when the
#: connection breaks is lost. huggingface_hub's own 10 MiB never progress on a line that breaks more often.
CHUNK = 1 << 20

_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())  # only notes() shows it

_MESSAGE_LIMIT = 200  # characters of a server's message, or of a note, that are worth repeating
_URL = re.compile(r"https?://[^\s'\"<>]+")
_SECRET = re.compile(r"\bhf_\w+|(?<=Bearer )\S+", re.IGNORECASE)


class HubError(CheckpointError):
    """One sentence: what, where, and what to change; without the name of the host."""


@dataclass(frozen=True)
class Hub:
    """A repository at a commit. ``endpoint`` is a mirror's base URL; empty means huggingface.co."""

    repository: str
    revision: str
    endpoint: str = ""
    token: str = field(default="", repr=False)

    @property
    def base(self) -> str:
        """The URL that paths are appended to."""
        # Never huggingface_hub's own default, which the environment can change.
        return (self.endpoint or DEFAULT_ENDPOINT).rstrip("/")

    def __str__(self) -> str:
        return re.sub(r"//[^/]*@", "//", self.base)  # without user and password


# Listing


def list_files(hub: Hub, exclude: Sequence[str] = ()) -> Manifest:
    """All files of the repository at the commit, but for ``.gitattributes`` and those excluded.

    ``exclude`` are patterns as ``hf download --exclude`` takes them; their ``*`` also matches ``/``.
    Raises HubError, also where no file is left.
    """
    from huggingface_hub.utils import paginate  # type: ignore[attr-defined]

    # HfApi.list_repo_tree asks the same, but would wait for ever for a hub that is silent.
    url = f"{hub.base}/api/models/{quote(hub.repository)}/tree/{quote(hub.revision, safe='')}"
    headers = _headers(hub)
    with _explained(hub):
        entries = list(paginate(url, params={"recursive": True}, headers=headers, timeout=TIMEOUT))
    patterns = [".gitattributes", *(pattern + "*" if pattern.endswith("/") else pattern for pattern in exclude)]
    files = {}
    for entry in entries:
        path, file = _entry(hub, entry)
        if file is not None and not any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            files[path] = file
    if not files:
        raise HubError(
            f"{hub} has no files of {hub.repository} at {hub.revision}"
            + (f" besides those excluded ({', '.join(exclude)})" if exclude else "")
            + ": check vllm_model_repository and vllm_model_revision"
        )
    try:
        return parse(Manifest(files, hub.repository, hub.revision).as_dict())
    except ManifestError as error:
        raise HubError(f"{hub} lists files of {hub.repository} that cannot be right: {error}") from error


def _entry(hub: Hub, entry: Any) -> tuple[str, File | None]:
    """Path and file of one entry of the hub's answer; no file for a directory."""
    try:
        path, kind = str(entry["path"]), entry["type"]
        if kind == "directory":
            return path, None
        lfs = entry.get("lfs")
        if lfs:
            return path, File(lfs["size"], sha256=lfs["oid"])
        return path, File(entry["size"], git_sha1=entry["oid"])
    except (TypeError, KeyError, AttributeError) as error:
        raise _no_hub(hub) from error


# Fetching


def fetch(
    hub: Hub,
    path: str,
    size: int,
    part: str,
    advance: Callable[[int], object] = lambda _: None,
    stop: threading.Event | None = None,
) -> None:
    """Bring a file of ``size`` bytes into the local file ``part``, continuing what is there already.

    At return ``part`` has exactly that size and is on the disk; whether it is the right content is
    for the caller to check. ``advance`` is told of every change of the size of ``part``: bytes as
    they arrive, and a negative number where it had to start anew, because it was too long, the
    server cannot continue a file, or the file turned out to be of another size.

    Transport errors and HTTP 5xx are retried, see TRIES. Raises Stopped when the next bytes arrive
    after ``stop`` is set; where none do, http_get has to give up first: about a minute with a silent
    hub, longer with one that limits requests. Raises HubError. In both cases ``part`` stays for a
    later call.
    """
    target = _Part(part, path, size, advance, stop)
    try:
        _fill(hub, target)
        target.finish()
    finally:
        target.close()


def _fill(hub: Hub, target: _Part) -> None:
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils.tqdm import silent_tqdm

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    url = f"{hub.base}/{quote(hub.repository)}/resolve/{quote(hub.revision, safe='')}/{quote(target.path)}"
    # A compressed answer has no length and cannot be continued.
    headers = {**_headers(hub), "Accept-Encoding": "identity"}
    # RecursionError: http_get calls itself for each break of the connection, and can do so for too many of them.
    passing = (
        httpx2.TimeoutException,
        httpx2.NetworkError,
        httpx2.RemoteProtocolError,
        httpx2.ProxyError,
        RecursionError,
    )
    silent: Any = silent_tqdm
    file: Any = target
    tries, best = 0, target.tell()
    while target.tell() < target.size:
        target.check()
        failure: Exception
        try:
            with _explained(hub, target):
                try:
                    http_get(
                        url,
                        file,
                        resume_size=target.tell(),
                        headers=headers,
                        expected_size=target.size,
                        tqdm_class=silent,
                    )
                except HfHubHTTPError as error:
                    if not _passes(error.response.status_code):
                        raise
                    failure = error
                except passing as error:
                    failure = error
                else:
                    continue
        except _Misfit:
            target.restart()  # what it holds is not the file
            raise HubError(
                f"{target.path} from {hub} is not of the size that {hub} lists ({target.size} bytes): it is damaged "
                f"there, or {hub} answers with something else; set vllm_model_endpoint to another hub"
            ) from None
        tries = 0 if target.tell() > best else tries + 1
        best = max(best, target.tell())
        if tries >= TRIES:
            with _explained(hub, target, tries):
                raise failure
        seconds = min(PAUSE * 2 ** max(tries - 1, 0), PAUSE_LIMIT)
        _LOG.warning("%s: %s; trying again in %.3g s", target.path, _reason(hub, failure), seconds)
        _pause(seconds, target.stop)


def _passes(status: int) -> bool:
    """Whether an HTTP status is worth another attempt."""
    return status >= 500 or status == 408


def _pause(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)


class _Misfit(Exception):
    """The file has not the size that was listed."""


class _Part:
    """The part file, as http_get wants a file to be; it tells how it grows, and can be told to stop."""

    def __init__(
        self, part: str, path: str, size: int, advance: Callable[[int], object], stop: threading.Event | None
    ) -> None:
        self.path = path
        self.size = size
        self.stop = stop
        self._part = part
        self._advance = advance
        self._restarts = 0
        with self._on_disk():
            # Without a buffer, so that what is counted is in the file.
            self._file = open(part, "ab", buffering=0)  # noqa: SIM115
        if self.tell() > size:
            self.restart()

    def close(self) -> None:
        self._file.close()

    def check(self) -> None:
        """Raises Stopped where the caller wants an end."""
        if self.stop is not None and self.stop.is_set():
            raise Stopped

    def finish(self) -> None:
        """Have the file on the disk, not only in the memory."""
        with self._on_disk():
            os.fsync(self._file.fileno())

    def restart(self) -> None:
        """Forget the content."""
        self.seek(0)
        self.truncate()

    def write(self, data: bytes) -> int:
        self.check()
        if self.tell() + len(data) > self.size:
            raise _Misfit
        rest = memoryview(data)
        while rest:
            with self._on_disk():
                written = self._file.write(rest)
            rest = rest[written:]
            self._advance(written)
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def truncate(self) -> int:
        """Cut the file off at the position, as http_get does where the server ignores Range."""
        before = os.fstat(self._file.fileno()).st_size
        with self._on_disk():
            after = self._file.truncate()
        self._advance(after - before)
        self._restarts += 1
        if self._restarts > TRIES:  # http_get itself would never give up
            raise HubError(
                f"the server that has {self.path} cannot continue a file (it ignores Range), and broke the connection "
                f"{TRIES} times: set vllm_model_endpoint to another hub"
            )
        return after

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Turns what the file system does into a HubError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HubError(
                    f"no space left on the file system {mount_of(self._part)} ({error.strerror}): free space there, or "
                    "set vllm_model_root to a directory on a larger one"
                ) from error
            raise HubError(f"cannot write {self._part}: {error.strerror or error}") from error


# Notes


@contextmanager
def notes(note: Callable[[str], object]) -> Iterator[None]:
    """Passes on why nothing moves: retries, rate limits and the like, each as one short line.

    Meanwhile huggingface_hub prints nothing itself. No line has a URL's query, which may be a
    signature, or a token. ``note`` is called in the threads that fetch.
    """
    from huggingface_hub.utils import logging as _  # adds its handler when it is imported  # noqa: F401

    handler = _Notes(note)
    theirs = logging.getLogger("huggingface_hub")
    before = theirs.handlers[:], theirs.level, theirs.propagate
    theirs.handlers[:], theirs.propagate = [handler], False
    theirs.setLevel(logging.WARNING)
    _LOG.addHandler(handler)
    try:
        yield
    finally:
        theirs.handlers[:], theirs.propagate = before[0], before[2]
        theirs.setLevel(before[1])
        _LOG.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, note: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._note(_line(record.getMessage()))
        except Exception:  # a display that fails must not end the download
            self.handleError(record)


def _line(text: object, token: str = "") -> str:
    """One short line: URLs as their last part, and no secrets."""
    line = str(text)
    if token:
        line = line.replace(token, "***")
    line = _SECRET.sub("***", _URL.sub(_last_part, line))
    line = " ".join(line.split())
    return line if len(line) <= _MESSAGE_LIMIT else line[: _MESSAGE_LIMIT - 3] + "..."


def _last_part(match: re.Match[str]) -> str:
    url = match.group().rstrip(".,:;)")
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL"
    return (parts.path.rstrip("/").rpartition("/")[2] or parts.netloc.rpartition("@")[2]) + match.group()[len(url) :]


# Errors


def _headers(hub: Hub) -> dict[str, str]:
    """What each request says. Raises HubError for a token that is no header's value."""
    # Not build_hf_headers, which can look for a token on the host and tells the hub about torch and the like.
    headers = {"User-Agent": "nvl.vllm"}
    if hub.token:
        if not re.fullmatch(r"[\x21-\x7e]+", hub.token):
            raise HubError(
                "vllm_model_token has spaces, newlines or characters other than ASCII in it: "
                "wanted a token such as hf_..."
            )
        headers["Authorization"] = f"Bearer {hub.token}"
    return headers


@contextmanager
def _explained(hub: Hub, target: _Part | None = None, tries: int = 1) -> Iterator[None]:
    """Turns what huggingface_hub raises into a HubError; without its cause, which can have signed URLs in its text."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    file = target.path if target else ""
    try:
        yield
    except (HubError, Stopped, _Misfit):
        raise
    except HfHubHTTPError as error:
        if target and error.response.status_code == 416:
            raise _Misfit from error
        raise HubError(_refused(hub, error, file)) from None
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"cannot reach {hub}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set in the host's environment: unset it"
        ) from error
    except (httpx2.TransportError, httpx2.InvalidURL, RecursionError) as error:
        raise HubError(_unreachable(hub, error, file, tries)) from None
    except (httpx2.DecodingError, httpx2.TooManyRedirects) as error:
        raise HubError(f"{_no_hub(hub)} ({_reason(hub, error)})") from None
    except OSError as error:
        if target and error.errno is None and str(error).startswith("Consistency check failed"):
            raise _Misfit from error
        raise HubError(_unprepared(hub, error)) from None
    except ImportError as error:  # a SOCKS proxy without its package
        raise HubError(_unprepared(hub, error)) from None
    except ValueError as error:
        if target is None and type(error) is not ValueError:  # no JSON, or no text at all
            raise _no_hub(hub) from error
        raise HubError(_unprepared(hub, error)) from None


def _no_hub(hub: Hub) -> HubError:
    return HubError(
        f"{hub} does not answer as a hub does: check vllm_model_endpoint (the base URL of a mirror of Hugging Face, "
        "without the repository), or whether a proxy answers in its place (vllm_model_proxy)"
    )


def _unprepared(hub: Hub, error: Exception) -> str:
    return (
        f"cannot set up a connection to {hub}: {_reason(hub, error)}: check vllm_model_endpoint, vllm_model_proxy and "
        "vllm_model_ca_file"
    )


def _reason(hub: Hub, error: Exception) -> str:
    """What an error says, in one line."""
    response = getattr(error, "response", None)
    if response is not None:
        said = getattr(error, "server_message", None)
        return f"HTTP {response.status_code}" + (f" {_line(said, hub.token)}" if said else "")
    return _line(error, hub.token) or type(error).__name__


def _where(hub: Hub, error: Any) -> str:
    """The server that failed: the hub, or the storage that it sends to."""
    other = _other_host(hub, error)
    return f"{other} (where {hub} keeps its files)" if other else str(hub)


def _other_host(hub: Hub, error: Any) -> str:
    """The host that failed, where it is not the hub itself."""
    try:
        # A status has its request at the response; its own attribute is lost in huggingface_hub's class.
        asked = urlsplit(str((getattr(error, "response", None) or error).request.url))
        return "" if _server(asked) == _server(urlsplit(hub.base)) else asked.netloc.rpartition("@")[2]
    except (AttributeError, RuntimeError, ValueError):  # an error that knows no request
        return ""


def _server(url: SplitResult) -> tuple[str | None, int]:
    return url.hostname, url.port or (443 if url.scheme == "https" else 80)


def _unreachable(hub: Hub, error: Exception, file: str, tries: int) -> str:
    proxy = _proxy(hub)
    found = f"cannot {'fetch ' + file + ' from' if file else 'reach'} {_where(hub, error)}"
    if proxy:
        found += f" through the proxy {proxy}"
    found += f": {_reason(hub, error)}"
    if file:
        found += f" ({tries} times in a row without a new byte; what has arrived is kept)"
    return (
        f"{found}; check vllm_model_proxy and vllm_model_ca_file, set vllm_model_endpoint to a mirror that this "
        "host reaches, or bring the checkpoint as a bundle (docs/supply.md)"
    )


def _proxy(hub: Hub) -> str:
    """The proxy that the environment names for the hub, without user and password."""
    try:
        parts = urlsplit(hub.base)
        proxies = getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
        if not proxy or not parts.hostname or proxy_bypass(parts.hostname):
            return ""
        return urlsplit(proxy if "://" in proxy else "//" + proxy).netloc.rpartition("@")[2]
    except ValueError:  # no URL
        return ""


def _refused(hub: Hub, error: Any, file: str) -> str:
    """The sentence for an answer with an HTTP status that is an error."""
    status = error.response.status_code
    code = error.response.headers.get("X-Error-Code", "")
    found = _reason(hub, error)
    where = _where(hub, error)
    what = f"{file} of {hub.repository}" if file else hub.repository
    if _passes(status):
        return (
            f"{where} fails to answer for {what} ({found}): run again later, which continues, or set "
            "vllm_model_endpoint to a mirror"
        )
    if status == 429:
        return (
            f"{where} allows no more requests for now (HTTP 429{_wait(error.response.headers)}): run again later, "
            "which continues, or set "
            + ("" if hub.token else "vllm_model_token, which raises the limit, or ")
            + "vllm_model_endpoint to a mirror"
        )
    if where != str(hub):
        return (
            f"{where} refuses {what} ({found}): let this host reach it (vllm_model_proxy), or set "
            "vllm_model_endpoint to a mirror"
        )
    if status == 401 and hub.token:
        return (
            f"{hub} refuses the token for {hub.repository} ({found}): check that vllm_model_token is complete and "
            "not expired"
        )
    if status == 401:
        return (
            f"{hub} wants a token for {hub.repository} (HTTP 401): set vllm_model_token, or check "
            "vllm_model_repository (a hub answers 401 for a repository that does not exist, too)"
        )
    if status == 403 and code == "GatedRepo":
        return (
            f"{hub} does not let the account of this token read {hub.repository} (HTTP 403): accept the licence at "
            f"{hub}/{hub.repository} with that account, or set vllm_model_token to the token of one that has"
        )
    if status == 403:
        return (
            f"{hub} refuses {hub.repository} ({found}): check what the token in vllm_model_token may read, and "
            "whether a proxy answers in the hub's place"
        )
    if status == 404 and code == "RevisionNotFound":
        return _no_commit(hub)
    if status == 404 and file and code != "RepoNotFound":
        return (
            f"{hub} has no {file} in {hub.repository} at {hub.revision} (HTTP 404), which its list of files or "
            "vllm_model_manifest names: its copy is not complete, or the manifest is for other files; run again later, "
            "or set vllm_model_endpoint to another hub"
        )
    if status == 404 and code:
        return f"{hub} has no repository {hub.repository} (HTTP 404): check vllm_model_repository"
    if status == 404:
        return (
            f"{hub} has no {hub.repository} at {hub.revision} (HTTP 404), or is no hub: check vllm_model_repository, "
            "vllm_model_revision and vllm_model_endpoint"
        )
    return f"{hub} refuses {what} ({found}): check vllm_model_repository, vllm_model_revision and vllm_model_endpoint"


def _wait(headers: Mapping[str, str]) -> str:
    """How long a hub that limits requests wants to be left alone, or the empty string."""
    for name, pattern in (("ratelimit", r"\bt\s*=\s*(\d+)"), ("retry-after", r"(\d+)$")):
        match = re.search(pattern, headers.get(name, ""))
        if match:
            return f"; it asks to wait {match.group(1)} s"
    return ""


def _no_commit(hub: Hub) -> str:
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        url = f"{hub.base}/api/models/{quote(hub.repository)}"
        main = get_session().get(url, headers=_headers(hub), timeout=TIMEOUT).json()["sha"]
        now = f"; its main is {main} now" if re.fullmatch(r"[0-9a-f]{40}", main) else ""
    except Exception:  # the sentence is good without it, too
        now = ""
    return f"{hub} has no commit {hub.revision} of {hub.repository} (HTTP 404{now}): check vllm_model_revision"
