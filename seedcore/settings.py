"""The only reader of the environment. Everything is typed and checked together, once, at the start."""

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
    """Where callers look: Ray's listing alone, the registry then the listing, or the registry first."""

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
    # PostgreSQL knows none with a zone
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
    """A URL as it may be shown: without name and password."""
    return re.sub(r"//[^/]*@", "//", url)


def _token(value: SecretStr) -> SecretStr:
    secret = value.get_secret_value()
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError("must be the token as `seedcore token new` has shown it: letters and digits, - and _")
    return value


def _header(value: str) -> str:
    if value.lower() in {"authorization", "host", "cookie", "forwarded"} or value.lower().startswith("x-forwarded"):
        raise ValueError(f"must be a header that only the proxy sends, not {value!r}")
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
            raise ValueError(f"must be the networks of proxies, and {text} is everybody")
    return value


def _hosts(value: str) -> str:
    for text in _parts(value):
        if _HOST.fullmatch(text.lower()) is None:
            raise ValueError(f"must be names like seedcore.example or *.seedcore.example, no port, not {text[:80]!r}")
    return value


def _folder(value: Path) -> Path:
    if str(value).startswith("sct_"):
        raise ValueError("must be the path of a file, and this is a token")
    try:
        folder = value.expanduser()
    except RuntimeError:
        raise ValueError(f"begins with the home folder of a user that there is not: {str(value)[:200]!r}") from None
    # every process reads the variable for itself, and each has a working folder of its own
    if not folder.is_absolute():
        raise ValueError(f"must be an absolute path, or begin with ~, not {str(value)[:200]!r}")
    return folder


def default_data_dir() -> Path:
    """The user's data folder; for root, who has none worth the name on a server, the system's."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/seedcore")
    return platformdirs.user_data_path("seedcore", appauthor=False)


Name = Annotated[str, AfterValidator(_name)]
Address = Annotated[str, AfterValidator(_address)]
Folder = Annotated[Path, AfterValidator(_folder)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
# a loop that runs more often does nothing else
Period = Annotated[float, Field(ge=0.05, le=3600, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Every setting with its variable, default and bounds. Times in seconds.

    Use `load_settings()`: it turns a wrong value into one line that names the variable.
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
        description="beat interval of the registry, which its agents take over",
    )
    cluster_epoch: Annotated[str, AfterValidator(_epoch)] | None = Field(
        None, validation_alias=AliasChoices("CLUSTER_EPOCH"), description="epoch an agent or registry insists on"
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
        description="PostgreSQL; none means the embedded server",
    )
    namespace: Name = Field(
        "seedcore",
        validation_alias=AliasChoices("SEEDCORE_NS", "RAY_NAMESPACE"),
        description="Ray namespace of agents and registry",
    )
    ray_address: str | None = Field(
        None,
        validation_alias=AliasChoices("RAY_ADDRESS"),
        description="Ray cluster that the command connects to; none: the only one of this user on this machine",
    )
    url: Annotated[str, AfterValidator(_url)] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_URL"),
        description="deployment that the command asks over HTTP; commands that are not served over HTTP refuse",
    )
    http_token: Annotated[SecretStr, AfterValidator(_token)] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_HTTP_TOKEN"),
        description="token that the command shows to SEEDCORE_URL",
    )
    http_tokens_file: Folder | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_HTTP_TOKENS_FILE"),
        description="hashes of the tokens that HTTP takes, a line each, as `seedcore token new` prints it",
    )
    http_anonymous: Literal["none", "read", "write"] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_HTTP_ANONYMOUS"),
        description="what HTTP lets do who shows no token; default read where Serve listens on loopback, else none",
    )
    http_trusted_proxies: Annotated[str, AfterValidator(_networks)] = Field(
        "",
        validation_alias=AliasChoices("SEEDCORE_HTTP_TRUSTED_PROXIES"),
        description="networks of proxies whose header says what a caller may do, with commas between them",
    )
    http_trusted_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$"), AfterValidator(_header)] = Field(
        "X-SeedCore-Right",
        validation_alias=AliasChoices("SEEDCORE_HTTP_TRUSTED_HEADER"),
        description="that header: read or write",
    )
    http_allowed_hosts: Annotated[str, AfterValidator(_hosts)] = Field(
        "",
        validation_alias=AliasChoices("SEEDCORE_HTTP_ALLOWED_HOSTS"),
        description="names, with commas between them, that access without a token may be asked by, beside this "
        "machine's own; *.seedcore.example is every name below it",
    )
    http_max_requests_per_s: Annotated[float, Field(ge=1, le=1_000_000)] = Field(
        500,
        validation_alias=AliasChoices("SEEDCORE_HTTP_MAX_REQUESTS_PER_SEC"),
        description="HTTP requests a second of one caller to one replica, on average over 2 s",
    )
    mode: Mode = Field(
        Mode.HYBRID, validation_alias=AliasChoices("SEEDCORE_MODE"), description="where callers look for agents"
    )
    lease_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = Field(
        None,
        validation_alias=AliasChoices("SEEDCORE_LEASE_SEC"),
        description="silence that ends a lease; at least 3 beats; default 15 or 3 beats, whichever is longer",
    )
    max_beats_per_s: Annotated[float, Field(ge=1, le=1_000_000)] = Field(
        10_000,
        validation_alias=AliasChoices("SEEDCORE_MAX_BEATS_PER_SEC"),
        description="beats a second of the whole fleet: above it the registry asks for a longer interval and lease",
    )
    keep_history_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        30,
        validation_alias=AliasChoices("SEEDCORE_KEEP_HISTORY_DAYS"),
        description="how long transitions, and instances that are dead, are kept",
    )
    follow: bool = Field(
        True,
        validation_alias=AliasChoices("SEEDCORE_FOLLOW"),
        description="managers and discovery keep a copy of who lives, by the registry's feed; false: each asks it",
    )
    data_dir: Folder = Field(
        default_factory=default_data_dir,
        validation_alias=AliasChoices("SEEDCORE_DATA_DIR"),
        description="data of the embedded PostgreSQL",
    )
    flush_interval_s: Period = Field(
        1.0, validation_alias=AliasChoices("SEEDCORE_FLUSH_SEC"), description="how often beats are committed"
    )
    durable_wait_s: Seconds = Field(
        2.0,
        validation_alias=AliasChoices("SEEDCORE_DURABLE_WAIT_SEC"),
        description="how long a status change waits for its commit before it answers durable=False",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        validation_alias=AliasChoices("SEEDCORE_LOG_FORMAT"),
        description="logs of registry and discovery: text, or a line of JSON each",
    )
    call_timeout_s: Seconds = Field(
        5.0, validation_alias=AliasChoices("SEEDCORE_CALL_TIMEOUT_SEC"), description="bound of a call to the registry"
    )
    probe_timeout_s: Seconds = Field(
        2.0, validation_alias=AliasChoices("SEEDCORE_PROBE_TIMEOUT_SEC"), description="bound of a call to an agent"
    )
    max_instances: Annotated[int, Field(ge=1, le=5_000_000)] = Field(
        250_000, validation_alias=AliasChoices("SEEDCORE_MAX_INSTANCES"), description="live instances a registry holds"
    )
    pg_pool_size: Annotated[int, Field(ge=1, le=100)] = Field(
        4, validation_alias=AliasChoices("SEEDCORE_PG_POOL_SIZE"), description="connections of the registry"
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
        # from a process of an older version: what that did not know is as it was
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(name, field.get_default(call_default_factory=True, validated_data={}))

    @property
    def proxy_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks of trusted proxies."""
        return tuple(map(ipaddress.ip_network, _parts(self.http_trusted_proxies)))

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """The names that access without a token may be asked by, in lower case."""
        return tuple(name.lower() for name in _parts(self.http_allowed_hosts))

    @property
    def effective_lease_s(self) -> float:
        """The lease in force."""
        return self.lease_s if self.lease_s is not None else max(15.0, BEATS_PER_LEASE * self.beat_interval_s)


def load_settings() -> Settings:
    """Settings from the environment, or ConfigurationError: one line that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        # where a rule of ours is broken, pydantic puts "Value error, " before what it says
        why = str(first["ctx"]["error"]) if first["type"] == "value_error" else str(first["msg"])
        # a DSN may stand in the wrong variable
        raise ConfigurationError(_variable(field), _URL_SECRET.sub("/", why[:1].lower() + why[1:])) from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read once."""
    return load_settings()


def use_namespace(namespace: str) -> None:
    """Let this process, and those that it starts, use another namespace than that of their environment."""
    if get_settings().namespace != namespace:
        os.environ["SEEDCORE_NS"] = namespace
        get_settings.cache_clear()


def _variable(location: str) -> str:
    """The variable that set a field: pydantic names the alias it read, or the field."""
    for name, field in Settings.model_fields.items():
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        if location == name or location in choices:
            used = [str(choice) for choice in choices if str(choice) in os.environ]
            return used[0] if used else str(choices[0])
    return location
