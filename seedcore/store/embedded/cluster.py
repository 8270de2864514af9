"""The data and the socket of an embedded server: created once, for the user that runs it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from seedcore.store.embedded.fresh import fresh_beside
from seedcore.store.embedded.layout import ROLE, SOCKET_NAME, EmbeddedPostgresError, Layout, last_of
from seedcore.store.embedded.programs import ServerUser

_MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux allows 107


def create_cluster(user: ServerUser, layout: Layout, programs: Path) -> None:
    """Run initdb in a sibling folder, then rename it: an interrupted run leaves nothing that looks like data."""
    if (layout.cluster / "PG_VERSION").exists():
        return
    fresh = fresh_beside(layout.cluster)
    user.own(fresh)
    done = user.run([str(programs / "initdb"), "-D", str(fresh), "-U", ROLE, "-A", "trust", "-E", "UTF8", "--locale=C"])
    if done.returncode:
        shutil.rmtree(fresh, ignore_errors=True)
        raise EmbeddedPostgresError(f"initdb failed in {layout.data_dir}: {last_of(done.stdout)}")
    fresh.rename(layout.cluster)
    folder = os.open(layout.data_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def create_socket_dir(user: ServerUser, layout: Layout) -> Path:
    """Create a folder for the socket that only the server's user and root can enter: there is no password.

    It is in the data folder, or in /tmp if that path is too long or has characters at which libpq splits hosts. It is
    not in XDG_RUNTIME_DIR, which is removed when the user logs out while the server keeps running.
    """
    folder = layout.socket_dir
    plain = re.fullmatch(r"[A-Za-z0-9._/-]+", str(folder)) is not None
    if not plain or len(os.fsencode(folder / SOCKET_NAME)) > _MAX_SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(layout.data_dir)).hexdigest()[:16]
        # checked below: another user may have created it
        folder = Path(f"/tmp/seedcore-{os.geteuid()}-{digest}")  # noqa: S108
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    layout.require_trusted_socket(folder)
    user.own(folder)
    return folder
