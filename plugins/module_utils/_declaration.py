# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""From what the operator declares to what each engine gets. Pure: nothing here reads a host.

Arguments come in layers, each over the one before: what the declaration itself gives (model, port,
host, served name, tensor-parallel-size, middleware), the profile, the arguments of all instances,
those of the instance. Every mistake is collected, so that one run names them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._hint import hint
from ._manifest import Manifest, ManifestError, is_commit, parse
from ._serve_help import ServeOptions

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_UUID = re.compile(r"(GPU|MIG)-[0-9a-fA-F-]{8,}")
_SECRET = re.compile(r"(^|[._-])(keys?|token|secret|password)$", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: Arguments that the declaration itself gives, with the variable to set instead.
_DECLARED = {
    "model": "vllm_model_source and what belongs to it",
    "served-model-name": "vllm_served_model_name",
    "host": "vllm_host",
    "port": "the instance's port",
    "hf-token": "no token (engines read the checkpoint from disk and ask no hub)",
    "api-key": "vllm_api_key, which keeps the key off files that others can read",
    "config": "vllm_arguments or the instance's arguments",
}
_DECLARED_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "the instance's gpus",
    "VLLM_API_KEY": "vllm_api_key",
}
#: Arguments that guides still name and vLLM has dropped.
_REMOVED = {"disable-log-requests": "; request logging is off unless enable-log-requests is true"}
#: Role vllm_instances puts it on the host, and PYTHONPATH of the engines leads to it.
_MIDDLEWARE = "nvl_vllm.first_token.FirstToken"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SOURCES = ("hub", "controller", "host")
_INSTANCE_KEYS = ("name", "port", "gpus", "profile", "arguments", "environment")


@dataclass(frozen=True)
class Model:
    """Where the checkpoint comes from, as the inventory has it. ``manifest`` is the text of a file, or empty."""

    source: str
    root: str
    repository: str = ""
    revision: str = ""
    endpoint: str = ""
    token: str = field(default="", repr=False)
    directory: str = ""
    manifest: str = ""
    required_space: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint on the host: ``path`` is what engines read.

    ``root`` holds the revisions, and is empty where the checkpoint is used in place. ``manifest`` is
    empty where the hub's own checksums count. ``required_space`` in MiB.
    """

    source: str
    path: str
    root: str
    repository: str
    revision: str
    manifest: dict[str, Any]
    required_space: int


@dataclass(frozen=True)
class Declaration:
    """The operator's variables, as the inventory has them (types not yet checked)."""

    inventory_hostname: str
    device: str
    version: str
    host: str
    home: str
    model: Model
    served_model_name: str
    instances: Any
    profile: str
    profiles: Mapping[str, Any]
    api_key: str = field(default="", repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Instance:
    """One engine, complete. ``gpus`` holds what was declared: indexes (int) or UUIDs (str)."""

    name: str
    unit: str
    port: int
    url: str
    gpus: list[int | str]
    profile: str
    arguments: dict[str, Any]
    environment: dict[str, str]


def resolve(declared: Declaration, options: ServeOptions) -> tuple[list[Instance], Checkpoint, list[str]]:
    """The complete instances, their checkpoint, and every mistake found, one sentence each.

    Each sentence names variable, value, what is wanted and the host. The rest is of use only
    where there is no mistake.
    """
    resolver = _Resolver(declared, options)
    instances, errors = resolver.resolve()
    return instances, resolver.checkpoint, list(dict.fromkeys(errors))  # what all instances share is said once


class _Resolver:
    def __init__(self, declared: Declaration, options: ServeOptions) -> None:
        self.declared = declared
        self.options = options
        self.errors: list[str] = []
        self.checkpoint = self.locate(declared.model)
        self.profiles = {name: self.arguments(f"vllm_profiles.{name}", it) for name, it in declared.profiles.items()}
        self.common_arguments = self.arguments("vllm_arguments", declared.arguments)
        self.common_environment = self.environment("vllm_environment", declared.environment)

    def refuse(self, variable: str, value: Any, wanted: str) -> None:
        shown = "***" if _SECRET.search(variable) else repr(value)
        self.errors.append(f"{self.declared.inventory_hostname}: {variable} is {shown}: {wanted}")

    def resolve(self) -> tuple[list[Instance], list[str]]:
        declared = self.declared
        if declared.host not in _LOOPBACK and not declared.api_key:
            self.refuse("vllm_host", declared.host, "set vllm_api_key before engines listen beyond loopback")
        if re.search(r"\s|[^\x21-\x7e]", declared.api_key):
            self.errors.append(f"{declared.inventory_hostname}: vllm_api_key holds a space or a character beyond ASCII")

        if not isinstance(declared.instances, list) or not declared.instances:
            self.refuse("vllm_instances", declared.instances, "wanted a list of one instance or more")
            return [], self.errors
        instances = [self.instance(f"vllm_instances[{i}]", item) for i, item in enumerate(declared.instances)]
        self.unique(instances)
        return [instance for instance in instances if instance], self.errors

    def locate(self, model: Model) -> Checkpoint:
        """Where the checkpoint will be on the host."""
        manifest: Manifest | None = None
        if model.manifest:
            try:
                manifest = parse(model.manifest)
            except ManifestError as error:
                self.errors.append(f"{self.declared.inventory_hostname}: vllm_model_manifest: {error}")
        if model.source not in _SOURCES:
            self.refuse("vllm_model_source", model.source, f"wanted one of {', '.join(_SOURCES)}")
        if model.source in ("controller", "host"):
            if not model.directory.startswith("/"):
                wanted = f"wanted the absolute path of the checkpoint, as vllm_model_source is {model.source}"
                self.refuse("vllm_model_directory", model.directory, wanted)
        else:
            self.check_hub(model)
        if model.source == "controller" and not model.manifest:
            wanted = "wanted the checkpoint's manifest, as vllm_model_source is controller: tools/manifest writes it"
            self.refuse("vllm_model_manifest", "", wanted)

        if manifest is not None and model.source == "hub":
            for key, value in (("repository", manifest.repository), ("revision", manifest.revision)):
                mine = getattr(model, key)
                if value and value != mine:
                    self.refuse(f"vllm_model_{key}", mine, f"the manifest in vllm_model_manifest is for {value}")
        name = model.revision if model.source == "hub" else manifest.name if manifest else ""
        in_place = model.source == "host"
        return Checkpoint(
            source=model.source,
            path=model.directory if in_place else f"{model.root}/{name}",
            root="" if in_place else model.root,
            repository=model.repository if model.source == "hub" else "",
            revision=model.revision if model.source == "hub" else "",
            manifest=manifest.as_dict() if manifest else {},
            required_space=0 if in_place else -(-manifest.size // 2**20) if manifest else model.required_space,
        )

    def check_hub(self, model: Model) -> None:
        """What a look-up at the hub needs."""
        if not _REPOSITORY.fullmatch(model.repository):
            self.refuse("vllm_model_repository", model.repository, "wanted OWNER/NAME, such as openai/gpt-oss-120b")
        if not is_commit(model.revision):
            wanted = "wanted a full commit of 40 hexadecimal digits, as a branch or tag can move to other bytes"
            if _REPOSITORY.fullmatch(model.repository):
                hub = model.endpoint or "https://huggingface.co"
                wanted += f" (git ls-remote {hub}/{model.repository} {model.revision or 'main'} tells it)"
            self.refuse("vllm_model_revision", model.revision, wanted)
        wanted = ""
        if model.endpoint and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", model.endpoint):
            wanted = "wanted the address of a hub, such as https://hub.example.com"
        elif model.token and re.match(r"http://(?!(127\.0\.0\.1|localhost|\[::1\])(:|/|$))", model.endpoint):
            wanted = "wanted https, which hides vllm_model_token on the way"
        if wanted:
            self.refuse("vllm_model_endpoint", model.endpoint, wanted)

    def instance(self, where: str, item: Any) -> Instance | None:
        if not isinstance(item, Mapping):
            self.refuse(where, item, "wanted a mapping with name, port and gpus")
            return None
        for key in item:
            if key not in _INSTANCE_KEYS:
                self.refuse(f"{where}.{key}", item[key], f"no such key{hint(str(key), _INSTANCE_KEYS)}")
        before = len(self.errors)
        name, port = item.get("name"), item.get("port")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self.refuse(f"{where}.name", name, "wanted up to 32 of a-z, 0-9 and '-', such as primary")
        if type(port) is not int or not 1024 <= port <= 65535:
            self.refuse(f"{where}.port", port, "wanted a whole number from 1024 to 65535 (engines are unprivileged)")
        gpus = self.gpus(f"{where}.gpus", item.get("gpus", []))
        profile = item.get("profile", self.declared.profile)
        if not isinstance(profile, str) or profile not in self.declared.profiles:
            known = list(self.declared.profiles)
            variable = f"{where}.profile" if "profile" in item else "vllm_profile"
            self.refuse(variable, profile, f"wanted one of {', '.join(known)}")
        own = self.arguments(f"{where}.arguments", item.get("arguments", {}))
        environment = self.environment(f"{where}.environment", item.get("environment", {}))
        if len(self.errors) > before or not isinstance(name, str) or type(port) is not int:
            return None
        arguments = self.merged(port, gpus, profile, own)
        self.parallel(where, name, gpus, arguments)
        return Instance(
            name=name,
            unit=f"vllm@{name}.service",
            port=port,
            url=f"http://{_reachable(self.declared.host)}:{port}",
            gpus=gpus,
            profile=profile,
            arguments=arguments,
            environment=self.merged_environment(environment),
        )

    def gpus(self, where: str, gpus: Any) -> list[int | str]:
        if not isinstance(gpus, list):
            self.refuse(where, gpus, "wanted a list of GPU indexes or UUIDs, such as [0]")
            return []
        if self.declared.device == "cpu" and gpus:
            self.refuse(where, gpus, "vllm_device is cpu, which uses no GPU: leave gpus out")
        if self.declared.device == "cuda" and not gpus:
            self.refuse(where, gpus, "wanted at least one GPU index or UUID, such as [0]")
        for gpu in gpus:
            index = type(gpu) is int and gpu >= 0
            if not index and not (isinstance(gpu, str) and _UUID.fullmatch(gpu)):
                self.refuse(where, gpu, "wanted a GPU index from 0 or a UUID as nvidia-smi -L prints it")
        return list(gpus)

    def arguments(self, where: str, arguments: Any) -> dict[str, Any]:
        """Arguments under their canonical names; what the pinned vLLM would not take is refused."""
        if not isinstance(arguments, Mapping):
            self.refuse(where, arguments, "wanted a mapping of engine arguments")
            return {}
        result: dict[str, Any] = {}
        for given, value in arguments.items():
            key = str(given).lstrip("-").replace("_", "-")
            option = self.options.find(key)
            if key in _DECLARED:
                self.refuse(f"{where}.{given}", value, f"set {_DECLARED[key]} instead")
                continue
            if option is None:
                advice = _REMOVED.get(key) or hint(key, self.options.names())
                self.refuse(f"{where}.{given}", value, f"vLLM {self.declared.version} has no argument --{key}{advice}")
                continue
            complaint = option.complaint(value)
            if complaint:
                self.refuse(f"{where}.{given}", value, complaint)
                continue
            if option.negates(key):
                value = not value
            key = option.name
            if key in result:
                self.refuse(f"{where}.{given}", value, f"--{key} is given twice")
            result[key] = value
        return result

    def environment(self, where: str, environment: Any) -> dict[str, str]:
        if not isinstance(environment, Mapping):
            self.refuse(where, environment, "wanted a mapping of environment variables")
            return {}
        for name, value in environment.items():
            if name in _DECLARED_ENVIRONMENT:
                self.refuse(f"{where}.{name}", value, f"set {_DECLARED_ENVIRONMENT[name]} instead")
            elif _SECRET.search(str(name)):
                self.refuse(f"{where}.{name}", value, "secrets do not belong here: ansible-playbook -v shows them")
            elif not _VARIABLE.fullmatch(str(name)):
                self.refuse(f"{where}.{name}", value, "wanted a name of letters, digits and '_'")
            elif isinstance(value, (Mapping, list, bool)) or value is None:
                self.refuse(f"{where}.{name}", value, "wanted a string or a number, in quotes where in doubt")
            elif not str(value).isprintable():
                self.refuse(f"{where}.{name}", value, "wanted one line without control characters")
        return {str(name): str(value) for name, value in environment.items()}

    def merged(self, port: int, gpus: list[int | str], profile: str, own: Mapping[str, Any]) -> dict[str, Any]:
        declared = self.declared
        result = {
            "model": self.checkpoint.path,
            "served-model-name": declared.served_model_name,
            "host": declared.host,
            "port": port,
            "tensor-parallel-size": max(1, len(gpus)),
            "middleware": _MIDDLEWARE,
        }
        result.update(self.profiles[profile])
        result.update(self.common_arguments)
        result.update(own)
        if result["middleware"] == "":  # vLLM would look for a module without a name
            del result["middleware"]
        return result

    def merged_environment(self, own: Mapping[str, str]) -> dict[str, str]:
        result = {
            "HOME": self.declared.home,
            "VLLM_CACHE_ROOT": f"{self.declared.home}/cache",
            # Nothing leaves the host unasked: no usage statistics, no look-ups at a model hub.
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            # All processes of an engine are on this host. Without these, they talk to each other through ports that are
            # open to whoever reaches the host, and ask for no key.
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if self.declared.device == "cuda":
            result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            # FlashInfer's sampler would compile itself with nvcc, which the host need not have.
            result["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        result.update(self.common_environment)
        result.update(own)
        return result

    def parallel(self, where: str, name: str, gpus: list[int | str], arguments: Mapping[str, Any]) -> None:
        """On GPUs the parallel sizes must multiply to the number of GPUs."""
        if self.declared.device != "cuda":
            return
        sizes = {key: arguments.get(f"{key}-parallel-size", 1) for key in ("tensor", "pipeline", "data")}
        product = 1
        for size in sizes.values():
            product *= int(size)
        if product != len(gpus):
            formula = " x ".join(f"{key} {size}" for key, size in sizes.items())
            self.refuse(f"{where}.gpus", gpus, f"{name} runs on {product} GPU(s) ({formula} parallel): declare as many")

    def unique(self, instances: list[Instance | None]) -> None:
        """Names and ports belong to one instance each. Whether a GPU carries several is for the memory plan."""
        seen: dict[tuple[str, Any], str] = {}
        for number, instance in enumerate(instances):
            if instance is None:
                continue
            where = f"vllm_instances[{number}]"
            claims: list[tuple[str, Any]] = [("name", instance.name), ("port", instance.port)]
            for key, value in claims:
                other = seen.setdefault((key, value), where)
                if other != where:
                    self.refuse(f"{where}.{key}", value, f"{other} has this {key}: each instance needs its own")
            if len(set(instance.gpus)) != len(instance.gpus):
                self.refuse(f"{where}.gpus", instance.gpus, "a GPU is named twice")


def _reachable(host: str) -> str:
    """The address at which a process on the host itself finds a server that listens on ``host``."""
    if host in ("0.0.0.0", "localhost"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
