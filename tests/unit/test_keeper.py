"""The registry's keeper starts the registry again, whatever error a start raises."""

from __future__ import annotations

import logging

import pytest

from seedcore.core.errors import RegistryUnavailableError, StoreUnavailableError
from seedcore.core.timeouts import end
from seedcore.discovery.keeper import RegistryKeeper
from seedcore.registry.protocol.messages import PROTOCOL, Hello
from tests.builders import START
from tests.waiting import eventually

HELLO = Hello(PROTOCOL, "0.0", 7, "node", START)


class Cluster:
    """A cluster in which each start of the registry raises the next of `errors`, until none is left."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.has_registry = False

    async def hello(self) -> Hello:
        if not self.has_registry:
            raise RegistryUnavailableError("there is no registry")
        return HELLO

    async def start(self) -> Hello:
        if self.errors:
            raise self.errors.pop(0)
        self.has_registry = True
        return HELLO


@pytest.mark.parametrize("error", [PermissionError("the claim file"), StoreUnavailableError("away")])
async def test_keeper_logs_a_failed_start_and_tries_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(error, error)
    keeper = RegistryKeeper(cluster.hello, cluster.start, period_s=0.001, longest_s=0.01)
    with caplog.at_level(logging.WARNING):
        task = keeper.start()
        try:
            await eventually(lambda: keeper.starts == 1, every_s=0.001)
            assert keeper.failures == 2
            assert str(error) in caplog.text
            # a registry that is lost later is started as well
            cluster.has_registry = False
            await eventually(lambda: keeper.starts == 2, every_s=0.001)
        finally:
            await end(task)
