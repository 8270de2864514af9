"""An etcd server for a benchmark, on loopback and with a folder of its own, and a client of the calls that it measures.

The client calls etcd's gRPC interface, as etcd's own clients do. The JSON gateway of etcd takes two to three
times as long for a call from Python, and loses keep-alives that are streamed to it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from seedcore.bench.environment import free_ports
from seedcore.core.errors import ConfigurationError

_STARTS = 3
_START_S = 30.0
_END_S = 10.0
_MAX_OPERATIONS = 128
"""Of a transaction, with etcd's default settings."""
_PACKAGE = "seedcore.bench.etcd"
# the fields that are used here, with their numbers in etcd's rpc.proto and kv.proto; a receiver skips all others
_MESSAGES: Mapping[str, Sequence[tuple[str, int, str]]] = {
    "Empty": (),
    "StatusResponse": (("version", 2, "string"),),
    "KeyValue": (("key", 1, "bytes"), ("value", 5, "bytes")),
    "PutRequest": (("key", 1, "bytes"), ("value", 2, "bytes"), ("lease", 3, "int64")),
    "RequestOp": (("request_put", 2, "PutRequest"),),
    "TxnRequest": (("success", 2, "RequestOp[]"),),
    "RangeRequest": (("key", 1, "bytes"), ("range_end", 2, "bytes")),
    "RangeResponse": (("kvs", 2, "KeyValue[]"),),
    "LeaseGrantRequest": (("TTL", 1, "int64"), ("ID", 2, "int64")),
    "LeaseKeepAliveRequest": (("ID", 1, "int64"),),
    "LeaseKeepAliveResponse": (("ID", 2, "int64"), ("TTL", 3, "int64")),
    "WatchCreateRequest": (("key", 1, "bytes"), ("range_end", 2, "bytes")),
    "WatchRequest": (("create_request", 1, "WatchCreateRequest"),),
    "Event": (("type", 1, "int32"), ("kv", 2, "KeyValue")),
    "WatchResponse": (("created", 3, "bool"), ("canceled", 4, "bool"), ("events", 11, "Event[]")),
}
_DELETED = 1


def _message_classes() -> Mapping[str, Any]:
    """The classes of `_MESSAGES`, in a pool of their own: another etcd client of the process has the same names."""
    kind = descriptor_pb2.FieldDescriptorProto
    scalars = {name: getattr(kind, f"TYPE_{name.upper()}") for name in ("bytes", "string", "bool", "int32", "int64")}
    file = descriptor_pb2.FileDescriptorProto(name="etcd.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, of in fields:
            label = kind.LABEL_REPEATED if of.endswith("[]") else kind.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            if of in scalars:
                field.type = scalars[of]
            else:
                field.type, field.type_name = kind.TYPE_MESSAGE, f".{_PACKAGE}.{of.removesuffix('[]')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


_CLASSES = _message_classes()
_OPTIONS = [
    # a listing is one message
    ("grpc.max_receive_message_length", -1),
    # the server is on loopback
    ("grpc.enable_http_proxy", 0),
]
_STATUS = "/etcdserverpb.Maintenance/Status", "Empty", "StatusResponse"


@dataclass(frozen=True)
class Etcd:
    """A running server of one member: its address (HOST:PORT), version and process id."""

    address: str
    version: str
    pid: int


def etcd_program() -> str | None:
    """The path of the program `etcd`, or None where there is none."""
    return shutil.which("etcd")


@contextmanager
def running_etcd(program: str) -> Iterator[Etcd]:
    """Start a server in a new temporary folder; both end with the context. It syncs every write to the disk, as it does
    by default. Raises ConfigurationError if it does not start."""
    for left in reversed(range(_STARTS)):
        with tempfile.TemporaryDirectory(prefix="seedcore-bench-etcd-") as folder:
            address, peer_address = (f"127.0.0.1:{port}" for port in free_ports(2))
            process = _start(program, Path(folder), address, peer_address)
            try:
                version = _version_of(address, process)
                if version is not None:
                    yield Etcd(address, version, process.pid)
                    return
            finally:
                _end(process)
            # another process may have taken a port
            if not left:
                raise ConfigurationError("etcd", f"{program} does not start: {_last_line(Path(folder))}")


class EtcdClient:
    """Calls an etcd server. To be created and used in one event loop. Raises grpc.RpcError where a call fails."""

    def __init__(self, address: str) -> None:
        """Tries no connection."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._health = _method(self._channel.unary_unary, "/grpc.health.v1.Health/Check", "Empty", "Empty")
        self._put = _method(self._channel.unary_unary, "/etcdserverpb.KV/Put", "PutRequest", "Empty")
        self._txn = _method(self._channel.unary_unary, "/etcdserverpb.KV/Txn", "TxnRequest", "Empty")
        self._range = _method(self._channel.unary_unary, "/etcdserverpb.KV/Range", "RangeRequest", "RangeResponse")
        self._grant = _method(self._channel.unary_unary, "/etcdserverpb.Lease/LeaseGrant", "LeaseGrantRequest", "Empty")
        self._keep_alive = _method(
            self._channel.stream_stream,
            "/etcdserverpb.Lease/LeaseKeepAlive",
            "LeaseKeepAliveRequest",
            "LeaseKeepAliveResponse",
        )
        self._watch = _method(self._channel.stream_stream, "/etcdserverpb.Watch/Watch", "WatchRequest", "WatchResponse")

    async def close(self) -> None:
        """End the connection, and the calls that are under way."""
        await self._channel.close()

    async def health(self) -> None:
        """Call the server, which does nothing."""
        await self._health(_CLASSES["Empty"]())

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> None:
        """Write a value, and wait until it is durable. The key is deleted when its lease (0: none) ends."""
        await self._put(_CLASSES["PutRequest"](key=key, value=value, lease=lease))

    async def put_all(self, writes: Sequence[tuple[bytes, bytes, int]]) -> None:
        """Write keys, their values and leases, in as few transactions as possible."""
        put, operation, txn = (_CLASSES[name] for name in ("PutRequest", "RequestOp", "TxnRequest"))
        for first in range(0, len(writes), _MAX_OPERATIONS):
            puts = [put(key=k, value=v, lease=lease) for k, v, lease in writes[first : first + _MAX_OPERATIONS]]
            await self._txn(txn(success=[operation(request_put=one) for one in puts]))

    async def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None where there is none."""
        answer = await self._range(_CLASSES["RangeRequest"](key=key))
        return answer.kvs[0].value if answer.kvs else None

    async def list_values(self, prefix: bytes) -> list[bytes]:
        """The values of all keys with a prefix, in the order of the keys, in one answer."""
        answer = await self._range(_CLASSES["RangeRequest"](key=prefix, range_end=_end_of(prefix)))
        return [found.value for found in answer.kvs]

    async def grant(self, lease: int, ttl_s: int) -> None:
        """Create a lease that ends `ttl_s` seconds after its last renewal. The caller chooses its number, from 1."""
        await self._grant(_CLASSES["LeaseGrantRequest"](ID=lease, TTL=ttl_s))

    async def keep_alive(self, leases: Iterable[int]) -> int:
        """Renew leases, each with a message in one stream. How many there still were."""
        call, request = self._keep_alive(), _CLASSES["LeaseKeepAliveRequest"]

        async def send() -> None:
            for lease in leases:
                await call.write(request(ID=lease))
            await call.done_writing()

        sending = asyncio.create_task(send())
        renewed = 0
        async for answer in call:
            renewed += answer.TTL > 0
        await sending
        return renewed

    async def watch(self, prefix: bytes) -> AsyncIterator[tuple[bytes, bytes | None]]:
        """Every change from now on of a key with the prefix, with its new value; None: deleted."""
        call = self._watch()
        wanted = _CLASSES["WatchCreateRequest"](key=prefix, range_end=_end_of(prefix))
        await call.write(_CLASSES["WatchRequest"](create_request=wanted))
        first = await call.read()
        assert first.created, "etcd creates no watch"
        return _events(call)


async def _events(call: Any) -> AsyncIterator[tuple[bytes, bytes | None]]:
    # a call that has been read from cannot be iterated
    while (answer := await call.read()) is not grpc.aio.EOF:
        assert not answer.canceled, "etcd has ended the watch"
        for event in answer.events:
            yield event.kv.key, None if event.type == _DELETED else event.kv.value


def _method(kind: Any, path: str, request: str, response: str) -> Any:
    return kind(
        path,
        request_serializer=_CLASSES[request].SerializeToString,
        response_deserializer=_CLASSES[response].FromString,
    )


def _end_of(prefix: bytes) -> bytes:
    """The first key after all keys with the prefix, whose last byte is not 255."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _start(program: str, folder: Path, address: str, peer_address: str) -> subprocess.Popen[bytes]:
    command = [
        program,
        "--name=bench",
        f"--data-dir={folder / 'data'}",
        f"--listen-client-urls=http://{address}",
        f"--advertise-client-urls=http://{address}",
        f"--listen-peer-urls=http://{peer_address}",
        f"--initial-advertise-peer-urls=http://{peer_address}",
        f"--initial-cluster=bench=http://{peer_address}",
        "--logger=zap",
        "--log-outputs=stderr",
    ]
    # its settings are variables too
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
    with _log(folder).open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=environment)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _version_of(address: str, process: subprocess.Popen[bytes]) -> str | None:
    """Wait until the server answers. Its version, or None if it has ended or does not answer."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        status = _method(channel.unary_unary, *_STATUS)
        ends_s = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < ends_s:
            with suppress(grpc.RpcError):
                version: str = status(_CLASSES["Empty"](), wait_for_ready=True, timeout=0.5).version
                return version
    return None


def _log(folder: Path) -> Path:
    return folder / "log"


def _last_line(folder: Path) -> str:
    lines = _log(folder).read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "it prints nothing"
