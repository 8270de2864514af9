"""What each release sent to other processes and which schema files it had: README.md beside this file."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from seedcore.store.migrations import Migration

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
WIRE = ROOT / "tests" / "unit" / "wire.json"
_PACKED = ("seedcore", "schema")


@dataclass(frozen=True, slots=True)
class Release:
    """The record of one release."""

    version: str
    folder: Path

    @property
    def wire(self) -> dict[str, Any]:
        """What travelled, as tests/unit/test_wire.py writes it."""
        written: dict[str, Any] = json.loads((self.folder / "wire.json").read_text(encoding="utf-8"))
        return written

    @property
    def schema(self) -> dict[str, str]:
        """The schema files with their checksums."""
        written: dict[str, str] = json.loads((self.folder / "schema.json").read_text(encoding="utf-8"))
        return written

    def lay_out(self, folder: Path) -> None:
        """Unpack the package as it was released."""
        with tarfile.open(self.folder / "package.tar.gz") as archive:
            # Python before 3.11.4 has no filters
            filters: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(folder, **filters)


def releases(folder: Path = FOLDER) -> list[Release]:
    """Every recorded release, the oldest first."""
    found = [Release(entry.parent.name, entry.parent) for entry in folder.glob("*/wire.json")]
    return sorted(found, key=lambda release: Version(release.version))


def record(version: str, migrations: list[Migration], folder: Path = FOLDER, root: Path = ROOT) -> Release:
    """Write the record of a release. Raises FileExistsError where there is one."""
    release = Release(version, folder / version)
    release.folder.mkdir()
    (release.folder / "wire.json").write_bytes(WIRE.read_bytes())
    sums = {migration.name: migration.sha256 for migration in migrations}
    (release.folder / "schema.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    with tarfile.open(release.folder / "package.tar.gz", "w:gz") as archive:
        for name in _PACKED:
            archive.add(root / name, name, filter=_source_only)
    return release


def _source_only(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


def changed_files(release: Release, migrations: list[Migration]) -> list[str]:
    """The schema files of a release that have changed since, or are gone."""
    now = {migration.name: migration.sha256 for migration in migrations}
    return [name for name, sha256 in release.schema.items() if now.get(name) != sha256]
