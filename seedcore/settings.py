"""The settings, and the only reader of the environment. All values are checked together, once, at the start."""

from __future__ import annotations

import ipaddress
import os
import re
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from seedcore.core.errors import ConfigurationError, InvalidInputError
from seedcore.core.limits import MAX_EPOCH_CHARS, MAX_ID_CHARS, check_text

BEATS_PER_LEASE = 3
_URL_SECRET = re.compile(r"/\S*@")

_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|\[[0-9a-f:.]+\]")


class Mode(StrEnum):
    """Where callers look for agents.

    `ray`: only in Ray's listing; `hybrid`: in the registry, then in the listing; `registry`: in the registry, and only
    while it is away in the listing.
    """

    RAY = "ray"
    HYBRID = "hybrid"
    REGISTRY = "registry"


def _name(value: str) -> str:
    try:
        return check_text("", value, MAX_ID_CHARS)
    except InvalidInputError as error:
        raise ValueError(error.why) from None


def _epoch(value: str) -> str:
    try:
        return check_text("", value, MAX_EPOCH_CHARS)
    except InvalidInputError as error:
        raise ValueError(error.why) from None


def _address(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise ValueError(f"must be an IP address, not {value[:80]!r}") from None
    # the inet type of PostgreSQL has no zone
    if "%" in value:
        raise ValueError(f"must be an IP address without a zone, not {value[:80]!r}")
    return value


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        is_url = parts.scheme in {"http", "https"} and parts.hostname is not None and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"must be a URL like http://127.0.0.1:8000, not {without_user(value)[:80]!r}")
    return value


def without_user(url: str) -> str:
    """Return a URL without its user name and password, so that it can be shown."""
    return re.sub(r"//[^/]*@", "//", url)


def _token(value: SecretStr) -> SecretStr:
    secret = value.get_secret_value()
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError("must be a token as printed by `seedcore token new`: letters, digits, - and _")
    return value


def _header(value: str) -> str:
    if value.lower() in {"authorization", "host", "cookie", "forwarded"} or value.lower().startswith("x-forwarded"):
        raise ValueError(f"must be a header that only the proxy sets, not {value!r}")
    return value


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _networks(value: str) -> str:
    for text in _parts(value):
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            raise ValueError(f"must be networks like 10.0.0.0/8, not {text[:80]!r}") from None
        if network.prefixlen == 0:
            raise ValueError(f"must be the networks of proxies; {text} is every address")
    return value


def _hosts(value: str) -> str:
    for text in _parts(value):
        if _HOST.fullmatch(text.lower()) is None:
            raise ValueError(f"must be names like seedcore.example or *.seedcore.example, no port, not {text[:80]!r}")
    return value


def _folder(value: Path) -> Path:
    if str(value).startswith("sct_"):
        raise ValueError("must be the path of a file, not a token")
    try:
        folder = value.expanduser()
    except RuntimeError:
        raise ValueError(f"begins with the home folder of an unknown user: {str(value)[:200]!r}") from None
    # processes read the variable in different working folders
    if not folder.is_absolute():
        raise ValueError(f"must be an absolute path, or begin with ~, not {str(value)[:200]!r}")
    return folder


def default_data_dir() -> Path:
    """Return the data folder of the user, or of the system for root."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/seedcore")
    return platformdirs.user_data_path("seedcore", appauthor=False)


Name = Annotated[str, AfterValidator(_name)]
Address = Annotated[str, AfterValidator(_address)]
Folder = Annotated[Path, AfterValidator(_folder)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
# a shorter period would use a whole core
Period = Annotated[float, Field(ge=0.05, le=3600, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Every setting with its variable, default and bounds. Times are in seconds.

    Use `load_settings()`: its error is one line that names the variable.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True, hide_input_in_errors=True
    )

    registry_enabled: bool = Field(
        True, validation_alias=AliasChoices("ENABLE_RUNTIME_REGISTRY"), description="agents report to the registry"
    )
    beat_interval_s: Period = Field(
        5.0,
        validation_alias=AliasChoices("REGISTRY_BEAT_SEC"),
        description="beat interval of the registry, which its agents adopt",
    )
    cluster_epoch: Annotated[str, AfterValidator(_epoch)] | None = Field(
        None, validation_alias=AliasChoices("CLUSTER_EPOCH"), description="epoch that an agent or registry requires"
    )
    node_id: Name | None = Field(
        None, validation_alias=AliasChoices("RAY_NODE_ID"), description="node recorded with an instance"
    )
    ip_address: Address | None = Field(
        None, validation_alias=AliasChoices("POD_IP"), description="address recorded with an instance"
    )
    pg_dsn: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_PG_DSN", "PG_DSN"),
        description="PostgreSQL 15 to 18; none: the embedded server",
    )
    namespace: Name = Field(
        "seedcore",
        validation_alias=AliasChoices("SEEDCORE_NS", "RAY_NAMESPACE"),
        description="Ray namespace of agents and registry",
    )
    ray_address: str | None = Field(
        None,
        validation_alias=AliasChoices("RAY_ADDRESS"),
        description="Ray cluster that the command joins; none: the only one of this user on this machine",
    )
    url: Annotated[str, AfterValidator(_url)] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_URL"),
        description="deployment that the command asks over HTTP; commands that HTTP does not serve refuse",
    )
    http_token: Annotated[SecretStr, AfterValidator(_token)] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_HTTP_TOKEN"),
        description="token that the command sends to SEEDCORE_URL",
    )
    http_tokens_file: Folder | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_HTTP_TOKENS_FILE"),
        description="file with the hashes of the HTTP tokens, one line per token as `seedcore token new` prints it",
    )
    http_anonymous: Literal["none", "read", "write"] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_HTTP_ANONYMOUS"),
        description="HTTP access without a token; default: read if Serve listens on loopback, else none",
    )
    http_trusted_proxies: Annotated[str, AfterValidator(_networks)] = Field(
        "",
        validation_alias=AliasChoices("SEEDCORE_HTTP_TRUSTED_PROXIES"),
        description="networks of the proxies whose header sets the right of a caller, separated by commas",
    )
    http_trusted_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$"), AfterValidator(_header)] = Field(
        "X-SeedCore-Right",
        validation_alias=AliasChoices("SEEDCORE_HTTP_TRUSTED_HEADER"),
        description="name of that header, whose value is read or write",
    )
    http_allowed_hosts: Annotated[str, AfterValidator(_hosts)] = Field(
        "",
        validation_alias=AliasChoices("SEEDCORE_HTTP_ALLOWED_HOSTS"),
        description="host names that requests without a token may use besides this machine's own, separated by commas; "
        "*.seedcore.example is every name below it",
    )
    http_max_requests_per_s: Annotated[float, Field(ge=1, le=1_000_000)] = Field(
        500,
        validation_alias=AliasChoices("SEEDCORE_HTTP_MAX_REQUESTS_PER_SEC"),
        description="HTTP requests per second of one caller to one replica, averaged over 2 s",
    )
    mode: Mode = Field(
        Mode.HYBRID, validation_alias=AliasChoices("SEEDCORE_MODE"), description="where callers look for agents"
    )
    lease_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_LEASE_SEC"),
        description="silence after which a lease ends; at least 3 beats; default: 15 or 3 beats, whichever is longer",
    )
    max_beats_per_s: Annotated[float, Field(ge=1, le=1_000_000)] = Field(
        10_000,
        validation_alias=AliasChoices("SEEDCORE_MAX_BEATS_PER_SEC"),
        description="beats per second of the whole fleet; above this the registry asks for a longer interval and lease",
    )
    keep_history_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        30,
        validation_alias=AliasChoices("SEEDCORE_KEEP_HISTORY_DAYS"),
        description="days for which transitions and dead instances are kept",
    )
    follow: bool = Field(
        True,
        validation_alias=AliasChoices("SEEDCORE_FOLLOW"),
        description="managers and discovery cache the live agents, updated from the change feed; false: ask each time",
    )
    data_dir: Folder = Field(
        default_factory=default_data_dir,
        validation_alias=AliasChoices("SEEDCORE_DATA_DIR"),
        description="data folder of the embedded PostgreSQL: an absolute path, or one that begins with ~",
    )
    flush_interval_s: Period = Field(
        1.0, validation_alias=AliasChoices("SEEDCORE_FLUSH_SEC"), description="how often beats are committed"
    )
    durable_wait_s: Seconds = Field(
        2.0,
        validation_alias=AliasChoices("SEEDCORE_DURABLE_WAIT_SEC"),
        description="how long a status change waits for its commit before it returns durable=False",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        validation_alias=AliasChoices("SEEDCORE_LOG_FORMAT"),
        description="logs of the registry and discovery: text, or one JSON object per line",
    )
    call_timeout_s: Seconds = Field(
        5.0, validation_alias=AliasChoices("SEEDCORE_CALL_TIMEOUT_SEC"), description="timeout of a call to the registry"
    )
    probe_timeout_s: Seconds = Field(
        2.0, validation_alias=AliasChoices("SEEDCORE_PROBE_TIMEOUT_SEC"), description="timeout of a call to an agent"
    )
    max_instances: Annotated[int, Field(ge=1, le=5_000_000)] = Field(
        250_000, validation_alias=AliasChoices("SEEDCORE_MAX_INSTANCES"), description="maximum number of live instances"
    )
    max_instances_mib: Annotated[int, Field(ge=16, le=1_048_576)] = Field(
        1024,
        validation_alias=AliasChoices("SEEDCORE_MAX_INSTANCES_MIB"),
        description="MiB of memory of the registry for live instances, with labels and metadata; then it refuses more",
    )
    direct_followers: Annotated[int, Field(ge=0, le=500)] = Field(
        50,
        validation_alias=AliasChoices("SEEDCORE_DIRECT_FOLLOWERS"),
        description="followers that the registry serves itself; others follow the relay of their node; 500: none does",
    )
    copied_agents: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        5000,
        validation_alias=AliasChoices("SEEDCORE_COPIED_AGENTS"),
        description="agents that a calling process keeps a copy of; of a larger fleet it keeps those that it resolves",
    )
    pg_pool_size: Annotated[int, Field(ge=1, le=100)] = Field(
        4, validation_alias=AliasChoices("SEEDCORE_PG_POOL_SIZE"), description="database connections of the registry"
    )

    @model_validator(mode="after")
    def _lease_outlives_beats(self) -> Self:
        if self.lease_s is not None and self.lease_s < BEATS_PER_LEASE * self.beat_interval_s:
            raise ConfigurationError(
                "SEEDCORE_LEASE_SEC",
                f"must be at least {BEATS_PER_LEASE} x REGISTRY_BEAT_SEC = "
                f"{BEATS_PER_LEASE * self.beat_interval_s:g} seconds, not {self.lease_s:g}",
            )
        return self

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # a process of an older version does not send newer fields: they get their defaults
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(name, field.get_default(call_default_factory=True, validated_data={}))

    @property
    def proxy_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks of trusted proxies."""
        return tuple(map(ipaddress.ip_network, _parts(self.http_trusted_proxies)))

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """The host names that requests without a token may use, in lower case."""
        return tuple(name.lower() for name in _parts(self.http_allowed_hosts))

    @property
    def effective_lease_s(self) -> float:
        """The lease in force."""
        return self.lease_s if self.lease_s is not None else max(15.0, BEATS_PER_LEASE * self.beat_interval_s)


def load_settings() -> Settings:
    """Read the settings. Raises ConfigurationError: one line that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        # pydantic puts "Value error, " before the messages of this module
        why = str(first["ctx"]["error"]) if first["type"] == "value_error" else str(first["msg"])
        # the wrong variable may contain a DSN, with its password
        raise ConfigurationError(_variable(field), _URL_SECRET.sub("/", why[:1].lower() + why[1:])) from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the settings of this process. They are read once."""
    return load_settings()


def use_namespace(namespace: str) -> None:
    """Use another namespace in this process, and in those that it starts."""
    if get_settings().namespace != namespace:
        os.environ["SEEDCORE_NS"] = namespace
        get_settings.cache_clear()


def _variable(location: str) -> str:
    """Return the variable of a field. `location` is the field or the alias that pydantic read."""
    for name, field in Settings.model_fields.items():
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        if location == name or location in choices:
            used = [str(choice) for choice in choices if str(choice) in os.environ]
            return used[0] if used else str(choices[0])
    return location
