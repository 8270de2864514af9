"""What Ray leaves open to other users of a machine is found, and what closes it is named."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from seedcore.discovery.exposure import exposures, is_open_to_others


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that every user may pass, with Ray's token."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir(mode=0o755)
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    (tmp_path / ".ray" / "auth_token").chmod(0o644)
    return tmp_path


def test_a_token_that_others_can_read_is_named_until_it_is_closed(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    (found,) = exposures()
    assert (found.remedy, str(token) in found.what, "secret" in found.what) == (f"chmod 600 {token}", True, False)
    token.chmod(0o600)
    assert exposures() == []
    token.chmod(0o644)
    (home / ".ray").chmod(0o700)
    assert exposures() == []


def test_the_token_that_is_named_is_the_one_in_use(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = home / "token"
    other.write_text("secret")
    other.chmod(0o604)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    (found,) = exposures()
    assert str(other) in found.what
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert exposures() == []


def test_others_reach_what_every_folder_above_lets_them_pass_to(home: Path) -> None:
    folder = home / "private"
    folder.mkdir(mode=0o700)
    inner = folder / "open"
    inner.mkdir()
    inner.chmod(0o777)
    assert not is_open_to_others(inner, stat.S_IWOTH)
    folder.chmod(0o711)
    assert is_open_to_others(inner, stat.S_IWOTH)
    inner.chmod(0o775)
    assert not is_open_to_others(inner, stat.S_IWOTH)
    assert not is_open_to_others(home / "nothing", stat.S_IWOTH)
    # by whichever name
    link = home / "link"
    link.symlink_to(inner)
    inner.chmod(0o777)
    assert is_open_to_others(link, stat.S_IWOTH)
