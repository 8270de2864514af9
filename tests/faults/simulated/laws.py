"""Owns the laws of agents, registries and the database (1 to 8, 10, 11, 13), and whether all of them have settled."""

from __future__ import annotations

from collections.abc import Mapping

from seedcore.core.answers import Receipt
from seedcore.core.causes import CauseKind
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance, LiveState
from seedcore.core.lifecycle import Status
from tests.faults.simulated.drains import BY_HAND
from tests.faults.simulated.operators import Operators
from tests.faults.simulated.registries import Office
from tests.faults.simulated.world import LEASE_S, World


class Laws:
    """Each check raises Violation."""

    def __init__(self, world: World, operators: Operators) -> None:
        self._world = world
        self.operators = operators
        self._decided_s: dict[str, float] = {}
        self._alone: set[str] = set()
        self._seen_dead: set[str] = set()
        self._rows_seen = 0
        self._epoch_of: dict[str, str] = {}
        self._terms: list[int] = []
        self._writers: dict[int, str] = {}
        world.losses.on_loss = self._note_loss
        world.losses.on_mended = operators.note_mended

    def _note_loss(self) -> None:
        """The database is as it was: what it does not have any more counts as never seen."""
        tables = self._world.tables
        self._terms = [term for term in self._terms if term <= tables.term]
        self._writers = {term: name for term, name in self._writers.items() if term <= tables.term}
        self._seen_dead = {key for key, row in tables.rows.items() if row.status is Status.DEAD} & self._seen_dead
        self._rows_seen = 0
        self._epoch_of.clear()

    def note_decision(self, instance_id: str, *, is_alone: bool) -> None:
        """A registry declares an instance dead; `is_alone`: it has no other that could have missed beats with it."""
        if instance_id not in self._decided_s:
            self._decided_s[instance_id] = self._world.now_s
            if is_alone:
                self._alone.add(instance_id)

    def check_receipt(
        self, office: Office, receipt: Receipt, status: Status | None, is_ready: bool | None = None
    ) -> None:
        """Law 1: what is acknowledged as durable is in the tables now."""
        if not receipt.durable:
            return
        world = self._world
        world.losses.note_receipt(receipt, status)
        row = world.tables.rows.get(receipt.instance_id)
        if world.losses.is_lossy or world.losses.is_unseen_by(office):
            # law 17 looks at it later
            return
        if row is None:
            world.check(False, 1, f"{receipt} was acknowledged and is not there")
            return
        if row.status is Status.DEAD:
            return
        if row.seq < receipt.seq:
            world.check(False, 1, f"{receipt} was acknowledged, committed is {row.seq}")
        # after a loss the registration of an agent may have the number of a readiness that a later one has replaced
        if is_ready is not None and row.seq == receipt.seq and not world.losses.count:
            is_there = (row.hold(HoldKind.READINESS) is None) is is_ready
            world.check(is_there, 1, f"{receipt} was acknowledged as {'' if is_ready else 'not '}ready: {row}")
            world.counts["acknowledged: readiness"] += 1
        if status is not None:
            steps = [step for step in world.tables.transitions if step.instance_id == receipt.instance_id]
            # what it reported under a hold is no transition
            was_held = any(step.hold is not None for step in steps)
            was_so = was_held or status in {step.to_status for step in steps}
            if row.seq == receipt.seq:
                was_so = row.reported_status is status
            # agents repeat their last word only
            if not was_so and not world.losses.count:
                world.check(False, 1, f"{receipt} was acknowledged as {status} and never was so")
        world.counts["acknowledged"] += 1

    def check_unknown(self, office: Office, instance_id: str) -> None:
        """Law 10, of a registry."""
        world, database = self._world, office.registry.writer.database
        is_patient = database.fenced_by is not None or world.now_s - office.began_s <= LEASE_S
        world.check(
            database.is_complete or world.losses.is_lossy or not (world.living_row(instance_id) and is_patient),
            10,
            f"{office.name} does not know {instance_id}",
        )

    def check_writer(self, office: Office, term: int | None) -> None:
        """Law 4, and the laws of the database, at each write that it took."""
        if term is None:
            return
        world = self._world
        world.check(self._writers.setdefault(term, office.name) == office.name, 4, f"two writers of term {term}")
        last = self._terms[-1] if self._terms else 0
        world.check(term >= last, 4, f"{office.name} wrote with term {term} after {last}")
        self._terms.append(term)
        world.losses.look()
        self.check_deaths()
        if not world.losses.is_lossy:
            self._check_epochs()
            self.operators.check_holds()
        self.operators.check_derived(world.tables.rows.values(), "the database")

    def check_deaths(self) -> None:
        """Law 5, for every death that the database has newly."""
        for row in list(self._world.tables.rows.values()):
            if row.status is Status.DEAD and row.instance_id not in self._seen_dead:
                self._seen_dead.add(row.instance_id)
                cause = CauseKind.UNKNOWN if row.cause is None else row.cause.kind
                self._world.counts[f"dead: {cause}"] += 1
                self._check_death(row.instance_id, row.cluster_epoch, cause)

    def _check_death(self, instance_id: str, epoch: str, cause: CauseKind) -> None:
        world = self._world
        process = world.owner(instance_id)
        assert process is not None
        if process.ended_s is not None or cause in {CauseKind.AGENT, CauseKind.OPERATOR}:
            return
        if cause is CauseKind.EPOCH_RETIRED:
            is_retired = world.is_retired(epoch) or world.losses.is_lossy
            world.check(is_retired, 5, f"{process.name} lives, and is dead: {cause}, which is current")
            return
        if instance_id in self._alone and cause is CauseKind.LEASE_EXPIRED:
            # with one instance there is no other to compare its silence with
            return
        # it could not reach the registry for a good part of a lease, and the fault was its own
        at_s = self._decided_s.get(instance_id, world.now_s)
        silent = any(end - start > LEASE_S / 3 and end > at_s - 2 * LEASE_S for start, end in process.troubles)
        # which excuses an expired lease, and no witness of its end; but a process that received its death from a
        # registry that died before the commit lives on as another instance, and the next registry finds that
        has_moved_on = process.reporter is not None and process.reporter.client.instance_id != instance_id
        if has_moved_on and instance_id in self.operators.deregistered:
            return
        if (world.losses.taken_over and has_moved_on) or (world.losses.count and process.is_retired):
            # its death, and what it was told of it, were lost
            return
        is_excused = silent and (cause is CauseKind.LEASE_EXPIRED or has_moved_on)
        world.check(is_excused, 5, f"{process.name} lives, and {instance_id} is dead: {cause}")

    def _check_epochs(self) -> None:
        """Law 11, for every instance that the database has newly."""
        world = self._world
        new = list(world.tables.rows.values())[self._rows_seen :]
        self._rows_seen += len(new)
        for row in new:
            process = world.owner(row.instance_id)
            assert process is not None
            before = self._epoch_of.setdefault(process.actor_id, process.epoch or row.cluster_epoch)
            same_line = world.line_of(row.cluster_epoch) == world.line_of(before)
            is_there = same_line or world.is_of_line(row.cluster_epoch, before)
            world.check(is_there, 11, f"{process.name} was started in {before}, and is in {row.cluster_epoch}")

    def check_history(self) -> None:
        """Laws 2 and 3."""
        last_seq: dict[str, int] = {}
        dead: set[str] = set()
        for step in self._world.tables.transitions:
            if step.instance_id in dead:
                self._world.check(False, 3, f"{step} after it was dead")
            if step.to_status is Status.DEAD:
                dead.add(step.instance_id)
            if step.seq is not None:
                if step.seq <= last_seq.get(step.instance_id, -1):
                    self._world.check(False, 2, f"{step} out of order")
                last_seq[step.instance_id] = step.seq

    def check_memory(self) -> None:
        """Law 13, in the memory of every registry."""
        for office in self._world.offices:
            if office.is_up:
                self.operators.check_derived(office.registry.members, office.name)

    def unsettled(self) -> str | None:
        """Why the world is not yet as laws 6 and 7 want it; None when it is."""
        world = self._world
        office = world.office()
        if office is None:
            return "no registry"
        writer, members = office.registry.writer, office.registry.members
        if writer.problem is not None or not writer.database.recovered or writer.backlog.pending_changes:
            return "the registry has not settled"
        if members.shown.unconfirmed is not None:
            return f"no operator has confirmed an epoch: {members.shown.unconfirmed}"
        wanted: dict[str, tuple[Status, set[HoldKind]]] = {}
        for process in world.processes:
            if process.ended_s is not None:
                for instance_id in process.instance_ids:
                    row = world.tables.rows.get(instance_id)
                    if row is not None and row.status is not Status.DEAD:
                        return f"{process.name} ended, {instance_id} is {row.status}"
                    if row is not None and row.cause is None:
                        return f"{instance_id} is dead without a cause"
                continue
            if process.is_retired:
                continue
            if process.reporter is None:
                return f"{process.name} has not begun"
            client = process.reporter.client
            if client.pending:
                return f"{process.name} keeps {client.pending} changes"
            is_by_hand = process.held_by_hand == client.instance_id or self._is_held_again(client.instance_id)
            held_by = {BY_HAND} if is_by_hand else set()
            if world.drains.is_draining(process.node_id):
                held_by.add(HoldKind.NODE)
            if client.instance_id in self.operators.left_held:
                held_by.add(HoldKind.OPERATOR)
            if not process.is_ready:
                held_by.add(HoldKind.READINESS)
            wanted[client.instance_id] = process.wanted, held_by
        live = {row.instance_id: row for row in world.tables.rows.values() if row.status is not Status.DEAD}
        silent = world.losses.silent_retired(office)
        found = {
            key: (row.reported_status, {hold.kind for hold in row.holds})
            for key, row in live.items()
            if key not in silent
        }
        if found != wanted:
            return f"live are {found}, not {wanted}"
        moved = self._moved(live)
        if moved is not None:
            return moved
        remembered = {key: LiveState.of(row) for key, row in members.index.by_id.items()}
        if remembered != {key: LiveState.of(row) for key, row in live.items()}:
            return f"memory and database differ: {remembered}"
        return None

    def _is_held_again(self, instance_id: str) -> bool:
        """Whether an instance has a hold by hand again that the database had lost: after the registry that mended the
        loss, one joined that had it in memory."""
        world = self._world
        row = world.tables.rows.get(instance_id)
        is_held = row is not None and row.hold(BY_HAND) is not None
        return is_held and world.losses.taken_over > 0 and instance_id in world.held_by_hand

    def _moved(self, live: Mapping[str, Instance]) -> str | None:
        """Whose endpoints the database has wrong."""
        for process in self._world.processes:
            if process.ended_s is None and process.reporter is not None and not process.is_retired:
                client = process.reporter.client
                wanted, found = client.registration.endpoints, live[client.instance_id].endpoints
                if wanted != found:
                    return f"{process.name} is at {wanted}, the database has {found}"
        return None
