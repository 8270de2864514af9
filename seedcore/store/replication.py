"""How a server keeps its commits: its disk settings and its replication, as far as the role may see them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from seedcore.store.sessions import Connection

# a commit that waits longer than this for a synchronous standby counts as waiting
_LONG_WAIT = "2 s"
_QUORUM = re.compile(r"\s*(?:(?:any|first)\s+)?(\d+)\s*\((.*)\)\s*", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r'"((?:[^"]|"")*)"|([^\s,"]+)')
# they receive the log, and no failover promotes them
_ARCHIVERS = frozenset({"pg_receivewal", "pg_basebackup", "barman_receive_wal"})

_SETTINGS = """
    select pg_is_in_recovery(), current_setting('synchronous_standby_names'), current_setting('synchronous_commit'),
           current_setting('fsync') = 'on', current_setting('full_page_writes') = 'on',
           pg_has_role('pg_read_all_stats', 'usage'),
           (select count(*) from pg_stat_activity
             where wait_event = 'SyncRep' and clock_timestamp() - query_start > %s::text::interval)"""
# an archiver replays nothing; a subscriber, which reads a logical slot, can confirm commits but cannot be promoted
_RECEIVERS = """
    select r.application_name, coalesce(r.sync_state in ('sync', 'quorum'), false), r.replay_lsn is not null,
           exists (select from pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical')
      from pg_stat_replication r"""


@dataclass(frozen=True, slots=True)
class Replication:
    """How the commits of this role reach other servers.

    `names` and `commit`: synchronous_standby_names and synchronous_commit. `standbys` are connected. `confirming` of
    them are synchronous; unless `is_visible` (the role may read pg_stat_replication), those that `names` lists.
    `waiting` commits have waited long for a standby: of every role where that is visible, else of this role.
    """

    is_standby: bool
    names: str
    commit: str
    standbys: int
    confirming: int
    waiting: int
    is_visible: bool

    @property
    def required(self) -> int:
        """The number of standbys that must confirm a commit."""
        if not self.names.strip() or self.commit in {"local", "off"}:
            return 0
        return quorum(self.names)[0]

    @property
    def is_blocked(self) -> bool:
        """Whether commits wait for standbys that do not confirm."""
        return self.required > 0 and (self.confirming < self.required or self.waiting > 0)

    @property
    def is_synchronous(self) -> bool:
        """Whether a commit waits until standbys have it on their disks."""
        return self.required > 0 and self.commit in {"on", "remote_apply"}


@dataclass(frozen=True, slots=True)
class Durability:
    """What the server does for a commit before it acknowledges it, and how the commit reaches other servers."""

    fsync: bool
    full_page_writes: bool
    replication: Replication


def quorum(names: str) -> tuple[int, frozenset[str]]:
    """The number of standbys that synchronous_standby_names requires, and the names in lower case."""
    match = _QUORUM.fullmatch(names)
    number, listed = (int(match[1]), match[2]) if match else (1, names)
    return number, frozenset((quoted.replace('""', '"') or plain).lower() for quoted, plain in _NAME.findall(listed))


async def durability(connection: Connection) -> Durability:
    """Read the settings and the statistics of the server. Raises psycopg.Error."""
    cursor = await connection.execute(_SETTINGS, (_LONG_WAIT,))
    is_standby, names, commit, fsync, full_page_writes, is_visible, waiting = (await cursor.fetchall())[0]
    cursor = await connection.execute(_RECEIVERS)
    receivers = await cursor.fetchall()
    if is_visible:
        standbys = sum(replays and not is_logical for _, _, replays, is_logical in receivers)
        confirming = sum(is_synchronous for _, is_synchronous, _, _ in receivers)
    else:
        _, listed = quorum(names)
        applications = [(name.lower(), is_logical) for name, _, _, is_logical in receivers if name not in _ARCHIVERS]
        standbys = sum(not is_logical for _, is_logical in applications)
        confirming = sum("*" in listed or name in listed for name, _ in applications)
    replication = Replication(is_standby, names, commit, standbys, confirming, waiting, is_visible)
    return Durability(fsync, full_page_writes, replication)
