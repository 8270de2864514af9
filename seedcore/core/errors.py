"""One tree of errors. Each crosses process boundaries, so each keeps its positional arguments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seedcore.core.answers import NotResolved
    from seedcore.core.causes import Cause

_TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none: what fits in a log line."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """As `first_line`, the last one: where a traceback is the text, what was raised stands at its end."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    # Ray colours the names of its tasks, also where no terminal shows them
    return _TERMINAL_CODES.sub("", str(error)).strip().splitlines() or [type(error).__name__]


class RegistryError(Exception):
    """Root of every error this package raises on purpose."""


class ExplainedError(RegistryError):
    """An error with one argument: why. Its text is `_text` with that."""

    _text = "{why}"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return self._text.format(why=self.why)


class InvalidInputError(RegistryError, ValueError):
    """A value breaks a stated limit; nothing was changed."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(field, why)
        self.field = field
        self.why = why

    def __str__(self) -> str:
        return f"{self.field}: {self.why}"


class ConfigurationError(RegistryError):
    """A setting is wrong; the message is one line that names the variable."""

    def __init__(self, variable: str, why: str) -> None:
        super().__init__(variable, why)
        self.variable = variable
        self.why = why

    def __str__(self) -> str:
        return f"{self.variable}: {self.why}"


class UnknownInstanceError(RegistryError):
    """No instance with this id is registered."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(instance_id)
        self.instance_id = instance_id

    def __str__(self) -> str:
        return f"instance {self.instance_id} is not registered; register it first"


class InstanceDeadError(RegistryError):
    """The instance is dead, which is final: come back as a new instance."""

    def __init__(self, instance_id: str, cause: Cause | None = None) -> None:
        super().__init__(instance_id, cause)
        self.instance_id = instance_id
        self.cause = cause

    def __str__(self) -> str:
        why = "" if self.cause is None else f" ({self.cause})"
        return f"instance {self.instance_id} is dead{why}; dead is final, register a new instance"


class NodeDeadError(RegistryError):
    """Ray has declared the node dead that the registration names; nothing was taken."""

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)
        self.node_id = node_id

    def __str__(self) -> str:
        return (
            f"node {self.node_id} is dead in Ray's node table, for good, so no process registers from it: "
            "start the agent on a live node (or correct RAY_NODE_ID)"
        )


class RegistrationDelayedError(ExplainedError):
    """The agent was declared dead, or refused, several times in a row: it waits before it registers again. Raised in
    its own process."""


class ForbiddenTransitionError(RegistryError):
    """The lifecycle has no such edge."""

    def __init__(self, instance_id: str, current: str, wanted: str) -> None:
        super().__init__(instance_id, current, wanted)
        self.instance_id = instance_id
        self.current = current
        self.wanted = wanted

    def __str__(self) -> str:
        return f"instance {self.instance_id} is {self.current} and cannot become {self.wanted}"


class InstanceConflictError(RegistryError):
    """The instance id belongs to another logical id."""

    def __init__(self, instance_id: str, logical_id: str) -> None:
        super().__init__(instance_id, logical_id)
        self.instance_id = instance_id
        self.logical_id = logical_id

    def __str__(self) -> str:
        return f"instance {self.instance_id} already belongs to another agent than {self.logical_id!r}"


class RetiredEpochError(RegistryError):
    """The epoch was current once and cannot come back."""

    def __init__(self, epoch: str) -> None:
        super().__init__(epoch)
        self.epoch = epoch

    def __str__(self) -> str:
        return f"epoch {self.epoch!r} is retired and cannot come back; use the current or a new one"


class EpochLimitError(RegistryError):
    """Too many epochs are staged; most likely an epoch is generated for each process."""

    def __init__(self, epoch: str) -> None:
        super().__init__(epoch)
        self.epoch = epoch

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch!r} cannot be staged: too many staged epochs wait already; "
            "give CLUSTER_EPOCH one value for the whole fleet"
        )


class BacklogFullError(RegistryError):
    """The bounded queue of changes is full; nothing was taken, try again later."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.limit} changes already wait for the database; try again later"


class StoreUnavailableError(ExplainedError):
    """The database cannot be used now: not reached, too slow, without our tables. It may be used later."""

    _text = "the database is away: {why}"


class StoreRejectedError(ExplainedError):
    """The database refused a value: it is of the wrong type, or breaks a constraint. Sending it again is no use."""

    _text = "the database refused: {why}"


class SchemaError(ExplainedError):
    """The database's schema and this code do not fit together."""


class RegistryUnavailableError(ExplainedError):
    """The registry actor cannot be asked now."""

    _text = "the registry is away: {why}"


class RegistryReplacedError(RegistryUnavailableError):
    """The registry that was called is gone; the one that replaced it knows only what is durable."""


class DirectoryUnavailableError(ExplainedError):
    """Ray's own listing cannot be asked now."""

    _text = "Ray's actor listing is away: {why}"


class SessionError(ExplainedError):
    """Ray cannot be called: this process is not connected to it, or the handle is of another connection."""


class ForkedProcessError(ExplainedError):
    """This process was forked from one whose connections and threads it does not have."""


class VersionMismatchError(RegistryError):
    """The running registry actor and this code are too many versions apart to understand each other."""

    def __init__(self, running: int, ours: int) -> None:
        super().__init__(running, ours)
        self.running = running
        self.ours = ours

    def __str__(self) -> str:
        apart = f"the running registry has protocol {self.running}, this code {self.ours}: "
        if self.running > self.ours:
            return f"{apart}install the registry's version here too, then start this process again"
        return f"{apart}replace the registry with `seedcore registry upgrade`, run where this version is installed"


class NotResolvableError(RegistryError):
    """The agent certainly has no routable instance. `reason` is the kind; `detail` explains it for people."""

    def __init__(self, logical_id: str, reason: NotResolved, detail: str) -> None:
        super().__init__(logical_id, reason, detail)
        self.logical_id = logical_id
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"agent {self.logical_id!r} cannot be resolved ({self.reason}): {self.detail}"


class CannotKnowError(RegistryError):
    """Whether the agent lives cannot be known now: no source that knows it answers."""

    def __init__(self, logical_id: str, why: str) -> None:
        super().__init__(logical_id, why)
        self.logical_id = logical_id
        self.why = why

    def __str__(self) -> str:
        # "*": the question was about no agent in particular
        about = "" if self.logical_id == "*" else f" about agent {self.logical_id!r}"
        return f"cannot know now{about}: {self.why}"


class ResolveTimeoutError(CannotKnowError):
    """A blocking look-up did not end within the time limit of its caller."""


class RunningLoopError(ExplainedError):
    """A blocking call was made in a running event loop, which it would stop; the message names the call to await."""


class NotAcceptingWorkError(RegistryError):
    """The agent drains or has stopped, or a process without which it does not work has ended."""

    def __init__(self, agent_id: str, status: str, why: str | None = None) -> None:
        super().__init__(agent_id, status, why)
        self.agent_id = agent_id
        self.status = status
        self.why = why

    def __str__(self) -> str:
        why = "" if self.why is None else f" ({self.why})"
        advice = "; dead is final, make a new one" if self.status == "dead" else ""
        return f"agent {self.agent_id!r} is {self.status}{why} and takes no new work{advice}"


class AgentCallError(RegistryError):
    """A call to an agent failed, or did not answer in time."""

    def __init__(self, agent_id: str, why: str) -> None:
        super().__init__(agent_id, why)
        self.agent_id = agent_id
        self.why = why

    def __str__(self) -> str:
        return f"agent {self.agent_id!r}: {self.why}"


class RegistryFullError(RegistryError):
    """The registry has as many live instances, or uses as much memory for them, as it may; nothing was taken."""

    def __init__(self, limit: str, remedy: str) -> None:
        super().__init__(limit, remedy)
        self.limit = limit
        self.remedy = remedy

    def __str__(self) -> str:
        return f"the registry has reached its limit of {self.limit}: {self.remedy}"


class FollowersFullError(RegistryError):
    """As many followers as may wait for changes do so already; ask without waiting, or later."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.limit} followers wait for changes already; ask again later, or without waiting"


class ActorGoneError(NotResolvableError):
    """The agent's actor has died, or its name belongs to no actor or to another one."""


class FencedError(RegistryError):
    """A newer registry has started on the same database: this one may not write any more, and nothing was written.

    `term` is this registry's (0: it never had one), `in_force` the newer one's.
    """

    def __init__(self, term: int, in_force: int) -> None:
        super().__init__(term, in_force)
        self.term = term
        self.in_force = in_force

    def __str__(self) -> str:
        other = "has the same term" if self.term == self.in_force else f"has term {self.in_force}"
        return (
            f"this registry (term {self.term}) only reads: another registry process, which {other}, writes to its "
            "database. End one of them, or point it at a database of its own"
        )


class NotDurableError(RegistryError):
    """A change is not committed to the database yet. It is not lost: its client keeps it and sends it again."""

    def __init__(self, instance_id: str, status: str, why: str) -> None:
        super().__init__(instance_id, status, why)
        self.instance_id = instance_id
        self.status = status
        self.why = why

    def __str__(self) -> str:
        return (
            f"instance {self.instance_id} is {self.status}, which is not committed yet: {self.why}; "
            "the client keeps the change and sends it again with its next call"
        )
