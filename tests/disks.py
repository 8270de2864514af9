"""Small disks of a test's own: one that can be filled, and one that can fail. Both need root and the right to mount."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.traces import short_folder

_SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN of linux/fs.h
_WITHOUT_FLUSH = 2
_CHUNK = 4096


class Disk:
    """A mounted folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Write until no byte is left."""
        with suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(_CHUNK))

    def free(self) -> None:
        """Remove what `fill` has written."""
        self._ballast.unlink(missing_ok=True)


class FailingDisk(Disk):
    """An ext4 in a file, behind a loop device."""

    def __init__(self, folder: Path, image: Path) -> None:
        super().__init__(folder)
        self._image = image
        self._device = ""

    def mount(self) -> None:
        """Mount it, with a loop device of its own: a failed one that is still in use stays as it is."""
        done = subprocess.run(["losetup", "--find", "--show", self._image], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"there is no loop device, which takes root: {done.stderr.strip()}")
        self._device = done.stdout.strip()
        _mount(self._device, self.folder)

    def unmount(self) -> None:
        """Take it away, once no process has a file there any more."""
        _unmount(self.folder)
        subprocess.run(["losetup", "--detach", self._device], check=True)

    def fail(self) -> None:
        """From now on every access is an I/O error, as when the device is gone. What was not synced is lost."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUT_DOWN, struct.pack("I", _WITHOUT_FLUSH))
        finally:
            os.close(folder)

    def repair(self) -> None:
        """Mount it again. Processes that still have files of the failed one keep those."""
        self.unmount()
        self.mount()


@contextmanager
def small_disk(megabytes: float) -> Iterator[Disk]:
    """A disk in memory."""
    with ExitStack() as stack:
        folder = _folder(stack)
        _mount("-t", "tmpfs", "-o", f"size={round(megabytes * 1024)}k,mode=0755", "tmpfs", folder)
        stack.callback(_unmount, folder)
        yield Disk(folder)


@contextmanager
def failing_disk(megabytes: int) -> Iterator[FailingDisk]:
    """A disk that can fail."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    with ExitStack() as stack:
        folder = _folder(stack)
        place = short_folder("image-")
        stack.callback(shutil.rmtree, place)
        image = place / "ext4"
        with image.open("wb") as file:
            file.truncate(megabytes * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", image], check=True, capture_output=True)
        disk = FailingDisk(folder, image)
        disk.mount()
        stack.callback(disk.unmount)
        folder.chmod(0o755)
        yield disk


def _folder(stack: ExitStack) -> Path:
    folder = short_folder("disk-")
    stack.callback(folder.rmdir)
    return folder


def _mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here, which takes root: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    # processes that end slowly may still have files there
    subprocess.run(["umount", "--lazy", folder], check=True)
