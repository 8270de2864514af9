"""Which characters a name may have, and how text of any origin is shown.

As PRECIS has it for free text (RFC 8264): no controls (C0, C1), no format characters such as bidirectional overrides,
no line separators, no surrogates, private or unassigned characters. Joiners are allowed where scripts and emoji need
them.
"""

from __future__ import annotations

import json
from unicodedata import category

_JOINERS = "\u200c\u200d"


def first_unfit(text: str) -> str | None:
    """The first character that a name cannot have, or None."""
    if text.isprintable():
        return None
    return next((char for at, char in enumerate(text) if not _is_fit(text, at)), None)


def shown(text: str, keep: str = "") -> str:
    """The same text with such characters, those of `keep` apart, as JSON escapes: in JSON it means the same."""
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or _is_fit(text, at) else json.dumps(char)[1:-1] for at, char in enumerate(text)
    )


def _is_fit(text: str, at: int) -> bool:
    char = text[at]
    # of separators, str.isprintable knows the plain space alone
    return char.isprintable() or category(char) == "Zs" or (char in _JOINERS and _is_between(text, at))


def _is_between(text: str, at: int) -> bool:
    """Whether a joiner has characters to join; in ASCII it would only make two names look the same."""
    around = text[at - 1 : at + 2] if at > 0 else ""
    return len(around) == 3 and all(char.isprintable() and not char.isascii() for char in (around[0], around[2]))
