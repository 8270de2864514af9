"""What a subclass of RayAgent must keep to. Checked when the class is made, before there is an actor of it."""

from __future__ import annotations

import inspect
from typing import Any

from seedcore.core.errors import InvalidInputError

_RAYS_OWN = "_ray_trace_ctx"


def check_overrides(subclass: type[Any], base: type[Any]) -> None:
    """Raise InvalidInputError for an override of one of the base's async methods that cannot be called like it."""
    for name, method in vars(base).items():
        if name.startswith("_") or not inspect.iscoroutinefunction(method):
            continue
        override = inspect.getattr_static(subclass, name)
        if override is not method:
            _check(f"{subclass.__name__}.{name}", override, name, inspect.signature(method))


def check_awaitable(result: object, subclass: type[Any], name: str, base: type[Any]) -> None:
    """Raise InvalidInputError where a method that had to be async has returned what cannot be awaited."""
    if not inspect.isawaitable(result):
        raise _wrong(f"{subclass.__name__}.{name}", name, inspect.signature(getattr(base, name)), "is not async")


def _check(field: str, override: object, name: str, wanted: inspect.Signature) -> None:
    is_bound_late = not isinstance(override, staticmethod)
    function = inspect.unwrap(getattr(override, "__func__", override))  # type: ignore[arg-type]
    if not inspect.isfunction(function):
        # an object that may return an awaitable: `check_awaitable` looks at the call
        return
    if inspect.isasyncgenfunction(function):
        raise _wrong(field, name, wanted, "must return its result, and it yields")
    if not inspect.iscoroutinefunction(function):
        raise _wrong(field, name, wanted, "is not async")
    needed = [one for one in _shown(wanted).parameters.values() if one.default is one.empty]
    named = {one.name: one for one in needed if one.kind is one.KEYWORD_ONLY}
    placed = [one for one in needed if one.kind is not one.KEYWORD_ONLY]
    try:
        inspect.signature(function).bind(*placed[not is_bound_late :], **named)
    except TypeError as error:
        raise _wrong(field, name, wanted, f"cannot be called: {error}") from None


def _wrong(field: str, name: str, wanted: inspect.Signature, why: str) -> InvalidInputError:
    return InvalidInputError(field, f"{why}; write `async def {name}{_shown(wanted)}`")


def _shown(signature: inspect.Signature) -> inspect.Signature:
    # Ray adds a parameter to the methods of a class of which it has made an actor in this process
    named = [one.replace(annotation=one.empty) for one in signature.parameters.values() if one.name != _RAYS_OWN]
    return signature.replace(parameters=named, return_annotation=signature.empty)
