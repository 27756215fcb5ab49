"""The configuration file that role ``agentic_client`` renders. All times are seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ._transport import EndpointConfig, Options, Timeouts
from .errors import ConfigError


class HealthCheck(Options):
    """``interval``: seconds between two checks of an endpoint. ``timeout``: seconds within which it must answer one."""

    interval: PositiveFloat = 30.0
    timeout: PositiveFloat = 10.0


class Retry(Options):
    """``attempts`` after the first, and the pauses before those that have no fresh endpoint to go to."""

    attempts: NonNegativeInt = 4
    backoff_seconds: list[NonNegativeFloat] = Field(default=[2.0, 4.0, 8.0, 16.0], min_length=1)


class LLM(Options):
    """The servers, and how to talk to them. The key is not here: only where it is."""

    model_name: str = Field(min_length=1)
    mode: Literal["gateway", "endpoints"] = "gateway"
    endpoints: list[EndpointConfig] = Field(min_length=1)
    api_key_file: str | None = None
    api_key_env: str | None = None
    ca_file: str | None = None
    timeouts: Timeouts = Timeouts()
    health_check: HealthCheck = HealthCheck()
    retry: Retry = Retry()
    max_concurrent: PositiveInt = 4

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.api_key_file and self.api_key_env:
            raise ValueError("wanted api_key_file or api_key_env, found both")
        names = [endpoint.name for endpoint in self.endpoints]
        if len(set(names)) < len(names):
            raise ValueError(f"wanted endpoints with different names, found {names}")
        return self

    def read_key(self) -> str | None:
        """The key from where it is, or None where neither place is given. Raises ConfigError."""
        if self.api_key_file:
            try:
                key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"llm.api_key_file: wanted a readable file with the key, found: {error}") from error
            if not key:
                raise ConfigError(f"llm.api_key_file: wanted the key in {self.api_key_file}, found an empty file")
            return key
        if self.api_key_env:
            key = os.environ.get(self.api_key_env, "")
            if not key:
                raise ConfigError(f"llm.api_key_env: wanted the key in the variable {self.api_key_env}, found none")
            return key
        return None


class Conversation(Options):
    """``window_tokens`` is the model's length less ``reply_reserve_tokens``."""

    window_tokens: PositiveInt = 3072
    reply_reserve_tokens: PositiveInt = 1024


class Config(Options):
    """The whole file."""

    llm: LLM
    conversation: Conversation = Conversation()


def load_config(path: str | Path) -> Config:
    """Read a configuration file. Raises ConfigError with every mistake in it."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: wanted a readable YAML file, found: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}: wanted YAML, found in line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: wanted YAML, found: {error}") from None
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        mistakes = [
            f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}{_found(each)}" for each in error.errors()
        ]
        # Without the original: it repeats values, and somebody may have written a key into the file.
        raise ConfigError("; ".join([f"{path} is not a configuration of agentic_client", *mistakes])) from None


def _found(mistake: Mapping[str, Any]) -> str:
    """The wrong value, where it is short and can be no secret."""
    value = mistake["input"]
    secret = mistake["type"] == "extra_forbidden" or (isinstance(value, str) and "@" in value)
    return f", found {value!r}" if isinstance(value, (str, int, float)) and not secret else ""
