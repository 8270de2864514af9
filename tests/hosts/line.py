"""A line that loses and delays frames: a program between two taps, where a kernel without netem cannot do it.

One thread forwards Ethernet frames from each tap to the other. A seed selects the frames that are lost.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME_BYTES = 65536
# more frames than any buffer of a switch holds: a sender must not use up our memory
_MAX_WAITING = 20_000


@dataclass(frozen=True)
class Quality:
    """What a line does to the frames of each direction. `out` is from the host to the network."""

    lost_out: float = 0.0
    lost_in: float = 0.0
    delay_s: float = 0.0


@dataclass
class Counts:
    """The frames of one direction."""

    forwarded: int = 0
    lost: int = 0


@dataclass(order=True)
class _Waiting:
    due_s: float
    number: int
    tap: int = field(compare=False)
    frame: bytes = field(compare=False)


class Line:
    """Forwards between the taps `near` (towards the host) and `far` (towards the network) until it is closed."""

    def __init__(self, near: str, far: str, quality: Quality, seed: int = 0) -> None:
        self._near, self._far = _open_tap(near), _open_tap(far)
        self._quality = quality
        self._chance = random.Random(seed)
        self._numbers = itertools.count()
        self._waiting: list[_Waiting] = []
        self._wake, self._woken = os.pipe()
        self.out, self.into = Counts(), Counts()
        self._thread = threading.Thread(target=self._forward, name="line", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; the taps vanish."""
        os.write(self._woken, b"x")
        self._thread.join()
        for descriptor in (self._near, self._far, self._wake, self._woken):
            os.close(descriptor)

    def _forward(self) -> None:
        sources = [self._near, self._far, self._wake]
        while True:
            wait_s = max(0.0, self._waiting[0].due_s - time.monotonic()) if self._waiting else None
            ready, _, _ = select.select(sources, [], [], wait_s)
            if self._wake in ready:
                return
            for tap in ready:
                self._take(tap)
            while self._waiting and self._waiting[0].due_s <= time.monotonic():
                one = heapq.heappop(self._waiting)
                _send(one.tap, one.frame)

    def _take(self, tap: int) -> None:
        is_out = tap == self._near
        counts, lost = (self.out, self._quality.lost_out) if is_out else (self.into, self._quality.lost_in)
        try:
            frame = os.read(tap, _FRAME_BYTES)
        except OSError:
            # the interface is not up yet
            return
        if self._chance.random() < lost or len(self._waiting) > _MAX_WAITING:
            counts.lost += 1
            return
        counts.forwarded += 1
        other = self._far if is_out else self._near
        if self._quality.delay_s:
            due_s = time.monotonic() + self._quality.delay_s
            heapq.heappush(self._waiting, _Waiting(due_s, next(self._numbers), other, frame))
        else:
            _send(other, frame)


def _send(tap: int, frame: bytes) -> None:
    # a port that is down or full loses the frame, as a cable would
    with suppress(OSError):
        os.write(tap, frame)


def _open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return descriptor
