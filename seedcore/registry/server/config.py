"""The configuration of a registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seedcore.core.memory_bound import MAX_INSTANCE_BYTES
from seedcore.core.wire import wire


@wire
@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """The configuration of a registry. Times are in seconds, capacities and limits in entries."""

    ray_cluster: str
    node_id: str = ""
    namespace: str = "seedcore"
    store_kind: str = "postgres"
    epoch: str | None = None
    beat_interval_s: float = 5.0
    lease_s: float = 15.0
    max_beats_per_s: float = 10_000.0
    flush_interval_s: float = 1.0
    linger_s: float = 0.003
    durable_wait_s: float = 2.0
    reconnect_grace_s: float = 5.0
    call_timeout_s: float = 5.0
    sweep_limit: int = 1000
    batch_limit: int = 5000
    beat_batch_limit: int = 50_000
    change_capacity: int = 100_000
    max_instances: int = 250_000
    feed_capacity: int = 10_000
    journal_capacity: int = 20_000
    max_followers: int = 500
    max_relays: int = 1000
    direct_followers: int = 50
    place_kept_s: float = 10.0
    retry_max_s: float = 5.0
    epoch_check_s: float = 5.0
    term_idle_s: float = 20.0
    compare_s: float = 60.0
    prune_s: float = 60.0
    prune_limit: int = 5000
    keep_history_s: float = 30 * 86_400.0
    freeze_floor: int = 2
    freeze_share: float = 0.25
    freeze_max_s: float = 300.0
    stop_deadline_s: float = 5.0
    notes: tuple[str, ...] = ()
    log_format: Literal["text", "json"] = "text"
    agent_call_s: float = 5.0
    max_instance_bytes: int = MAX_INSTANCE_BYTES
