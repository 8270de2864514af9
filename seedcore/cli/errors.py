"""The errors of the command, the exit code of every error, and its one line on stderr."""

from __future__ import annotations

from seedcore.core.errors import (
    CannotKnowError,
    ConfigurationError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.discovery.problems import ProblemCode

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_CANNOT_KNOW = 4
EXIT_INTERRUPTED = 130

# the option or argument that sets a field
_TYPED_AS = {
    "cluster_epoch": "epoch",
    "count": "--count",
    "duration_s": "--for",
    "ids": "ID",
    "label": "--label",
    "label key": "--label",
    "labels": "--label",
    "logical_id": "agent",
    "node_id": "--node",
    "organ_id": "--organ",
    "reason": "--reason",
    "selector": "--selector",
    "verdict": "--verdict",
}


class HttpProblemError(RegistryError):
    """A deployment refused a request. `detail` is its message."""

    def __init__(self, status: int, detail: str, code: ProblemCode) -> None:
        super().__init__(status, detail, code)
        self.status = status
        self.detail = detail
        self.code = code

    def __str__(self) -> str:
        return self.detail


class NeverRegisteredError(RegistryError):
    """No agent has ever registered under a logical id. `known` describes what Ray knows of the name."""

    def __init__(self, logical_id: str, known: str) -> None:
        super().__init__(logical_id, known)
        self.logical_id = logical_id
        self.known = known

    def __str__(self) -> str:
        return f"no agent has ever registered as {self.logical_id!r}; {self.known}"


class NothingSelectedError(RegistryError):
    """The options of a command select no agent."""

    def __init__(self, verb: str) -> None:
        super().__init__(verb)
        self.verb = verb

    def __str__(self) -> str:
        return f"no agent to {self.verb}: none matches the node (by its full id), organ, selector and a status for it"


class NoClusterError(RegistryError):
    """There is no Ray cluster to connect to. `is_absent`: this user runs none on this machine, as opposed to one that
    cannot be joined."""

    remedy = "start `serve run serve_config.yaml`, or set RAY_ADDRESS"

    def __init__(self, why: str, is_absent: bool = False) -> None:
        super().__init__(why, is_absent)
        self.why = why
        self.is_absent = is_absent

    def __str__(self) -> str:
        return (
            f"no Ray cluster to connect to ({self.why}): start one with `serve run serve_config.yaml` or "
            "`ray start --head`, or set RAY_ADDRESS; RAY_AUTH_MODE must be the same as in the cluster"
        )


class SeveralClustersError(NoClusterError):
    """This user runs several Ray clusters on this machine, and RAY_ADDRESS names none of them."""

    remedy = "set RAY_ADDRESS to one of them"

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}, or SEEDCORE_URL to a deployment"


class NotServedError(RegistryError):
    """SEEDCORE_URL is set, and the command is not served over HTTP."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return (
            "SEEDCORE_URL is set, and this command is not served over HTTP: unset SEEDCORE_URL and run the command in "
            "the deployment's Ray cluster, or set RAY_ADDRESS to that cluster"
        )


def exit_code_of(error: RegistryError) -> int:
    """Return the exit code that an error ends the command with."""
    match error:
        case HttpProblemError(code=ProblemCode.NO_SUCH_ROUTE):
            # the server has no such route: it is not a SeedCore deployment
            return EXIT_CANNOT_KNOW
        case HttpProblemError():
            return {404: EXIT_NOT_FOUND, 422: EXIT_USAGE, 503: EXIT_CANNOT_KNOW}.get(error.status, EXIT_FAILED)
        case NeverRegisteredError() | NothingSelectedError() | NotResolvableError() | UnknownInstanceError():
            return EXIT_NOT_FOUND
        case ConfigurationError() | InvalidInputError() | NotServedError() | SeveralClustersError():
            return EXIT_USAGE
        case CannotKnowError() | NoClusterError() | RegistryUnavailableError() | StoreUnavailableError():
            return EXIT_CANNOT_KNOW
        case _:
            return EXIT_FAILED


def message_of(error: RegistryError) -> str:
    """Return the message of an error. A wrong value is named by its option or argument, not by its Python field."""
    if isinstance(error, InvalidInputError):
        return f"{_TYPED_AS.get(error.field, error.field)}: {error.why}"
    return str(error)
