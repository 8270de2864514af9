"""What a release has sent or stored is still understood. Before the first release there is nothing to compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from seedcore.store.migrations import Migration, known_migrations
from tests.releases import ROOT, Release, changed_files, record, releases
from tests.unit.test_wire import objections, written_now


def test_newest_release_understands_what_travels_now() -> None:
    for release in releases()[-1:]:
        assert objections(release.wire, written_now()) == [], release.version


def test_no_schema_file_of_a_release_has_changed() -> None:
    for release in releases():
        assert changed_files(release, known_migrations()) == [], release.version


@pytest.fixture
def recorded(tmp_path: Path) -> Release:
    """The record that this tree would leave."""
    return record("1.0", known_migrations(), tmp_path)


def test_record_of_this_tree_has_nothing_to_object(recorded: Release, tmp_path: Path) -> None:
    assert releases(tmp_path) == [recorded]
    assert changed_files(recorded, known_migrations()) == []
    later = Migration(len(known_migrations()) + 1, "9999_more.sql", "select 1")
    assert changed_files(recorded, [*known_migrations(), later]) == []
    with pytest.raises(FileExistsError):
        record("1.0", known_migrations(), tmp_path)


def test_schema_file_that_changed_or_is_gone_is_noticed(recorded: Release) -> None:
    first, *others = known_migrations()
    changed = replace(first, sql=first.sql + "-- better\n")
    assert changed_files(recorded, [changed, *others]) == [first.name]
    assert changed_files(recorded, others) == [first.name]


def test_value_that_the_release_cannot_read_is_noticed(recorded: Release) -> None:
    now = recorded.wire
    now["classes"]["Instance"] = now["classes"]["Instance"][:-1]
    now["protocol"] += 1
    assert any(problem.startswith("Instance had") for problem in objections(recorded.wire, now))


def test_package_of_a_record_is_that_of_the_release(recorded: Release, tmp_path: Path) -> None:
    recorded.lay_out(tmp_path / "package")
    for name in ("seedcore/__init__.py", "schema/0001_tables.sql"):
        assert (tmp_path / "package" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list((tmp_path / "package").rglob("__pycache__"))


def test_releases_are_in_the_order_of_their_versions(tmp_path: Path) -> None:
    for version in ("0.10.0", "0.9.0", "1.0rc1", "1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "wire.json").write_text("{}")
    assert [release.version for release in releases(tmp_path)] == ["0.9.0", "0.10.0", "1.0rc1", "1.0"]
