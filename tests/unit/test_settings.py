"""A wrong value is an error of one line that names the variable; a right one means the same in every process."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from seedcore.core.errors import ConfigurationError
from seedcore.settings import Settings, load_settings


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("SEEDCORE_DATA_DIR", "~nouser/x", "unknown user: '~nouser/x'"),
        ("SEEDCORE_DATA_DIR", "data/here", "absolute path.*'data/here'"),
        ("POD_IP", "not-an-ip", "IP address.*'not-an-ip'"),
        ("POD_IP", "10.0.0.256", "IP address.*'10.0.0.256'"),
        ("POD_IP", "fe80::1%eth0", "without a zone"),
        ("REGISTRY_BEAT_SEC", "1e-9", "greater than or equal to 0.05"),
        ("REGISTRY_BEAT_SEC", "nan", "finite"),
        ("SEEDCORE_FLUSH_SEC", "1e-9", "greater than or equal to 0.05"),
        ("SEEDCORE_LEASE_SEC", "2", "at least 3 x REGISTRY_BEAT_SEC = 15 seconds, not 2"),
        ("RAY_NAMESPACE", "x" * 300, "at most 255 characters, not 300"),
        ("CLUSTER_EPOCH", " ", "empty"),
        ("SEEDCORE_URL", "ftp://me:hush@here/", "URL.*'ftp://here/'"),
        ("SEEDCORE_HTTP_TOKENS_FILE", "sct_secret", "file, not a token$"),
        ("SEEDCORE_HTTP_TRUSTED_PROXIES", "0.0.0.0/0", "networks.*0.0.0.0/0"),
        ("SEEDCORE_HTTP_TRUSTED_HEADER", "Host", "only the proxy.*'Host'"),
        ("SEEDCORE_HTTP_TOKEN", "sct_\u00e9", "token"),
        ("RAY_NODE_ID", "a\nb", "control characters"),
    ],
)
def test_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, rule: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=rule) as caught:
        load_settings()
    assert caught.value.variable == variable
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variable", ["SEEDCORE_DATA_DIR", "POD_IP", "SEEDCORE_URL", "RAY_NODE_ID", "REGISTRY_BEAT_SEC"]
)
def test_secret_in_the_wrong_variable_is_not_repeated(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "postgresql://me:hush/hush@hush@db\n/x")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "hush" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", ["SEEDCORE_HTTP_TOKEN", "SEEDCORE_PG_DSN"])
def test_secret_is_in_no_error_or_representation_of_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "hush")
    assert "hush" not in repr(Settings()) + str(Settings())
    monkeypatch.setenv(name, "hush-\u00e9")
    monkeypatch.setenv("SEEDCORE_LOG_FORMAT", "yaml")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "hush" not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)


def test_data_folder_does_not_depend_on_the_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SEEDCORE_DATA_DIR", "~/data")
    assert load_settings().data_dir == tmp_path / "data"
    monkeypatch.delenv("SEEDCORE_DATA_DIR")
    assert load_settings().data_dir.is_absolute()


@pytest.mark.parametrize("address", ["10.0.0.1", "2001:db8::1"])
def test_addresses_of_both_kinds_are_accepted(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("POD_IP", address)
    monkeypatch.setenv("REGISTRY_BEAT_SEC", "0.05")
    assert load_settings().ip_address == address


def test_settings_from_an_older_process_get_the_defaults_of_newer_fields() -> None:
    sent = Settings(beat_interval_s=2.0, lease_s=9.0)
    for name in ("lease_s", "data_dir"):
        del sent.__dict__[name]
    read = pickle.loads(pickle.dumps(sent))
    assert read.beat_interval_s == 2.0
    assert read.lease_s is None
    assert read.data_dir == Settings().data_dir
