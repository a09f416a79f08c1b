"""`opd certify`: gradient certificates of methods, computed on tiny models, as a table and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.cli.flags import file_to_write
from launch.config.run_config import run_config
from launch.config.shipped_files import groups
from opd.certify.certificate import Certificate
from opd.certify.certify import certify
from opd.certify.checks.where_to_look import where_to_look
from opd.errors import ConfigurationError, DataError
from opd.method.method import Method


def certify_methods(overrides: Sequence[str], output: str, console: Console) -> int:
    """Certify `method=NAME`, or else all of `conf=DIR`, or all shipped methods; exit status 1 if a property fails.

    Writes a list of certificates as JSON to `output` unless it is "".
    """
    file = file_to_write("certify", output) if output else None
    requested = [o.partition("=")[2] for o in overrides if o.startswith("method=")]
    own = next((o.removeprefix("conf=") for o in overrides if o.startswith("conf=")), "")
    rest = [o for o in overrides if not o.startswith("method=")]
    if "," in "".join(requested):
        raise ConfigurationError(f"method={requested[-1]} names several; give one, or none to certify all of them")
    # A group, because some scorers compare trajectories; `method.x=...` still changes the method's parts.
    torch.set_num_threads(1)  # the world is tiny: a second thread only waits
    grouped = rest if any(o.startswith("prompts") for o in rest) else ["prompts.group_size=2", *rest]
    found = []
    every = sorted(path.stem for path in Path(own, "method").glob("*.yaml")) if own else groups()["method"]
    if not requested and not every:
        raise ConfigurationError(
            f"conf={own} has no method to certify; add one in {Path(own, 'method')}, or name method="
        )
    for name in requested[-1:] or every:
        found.append(_certified(run_config([f"method={name}", *grouped]).method))
        console.print(table(found[-1]))
        said = where_to_look(found[-1])
        for where in dict.fromkeys(said.values()):  # several may point to the same place
            what = "; ".join(name for name, text in said.items() if text == where)
            console.print(Text.assemble((what, "red"), f": {where}."))
    if len(found) > 1:
        console.print(summary(found))
    if file:
        file.write_text(json.dumps([as_json(c) for c in found], indent=1) + "\n")
    return int(not all(c.passed for c in found))


def _certified(method: Method) -> Certificate:
    try:
        return certify(method)
    except DataError as error:  # of parts, which know no method's name
        raise DataError(f"method {method.name} cannot be certified: {error}") from error


def table(certificate: Certificate) -> Table:
    """Table of one certificate: property, measured value, bound, verdict."""
    title = Text.assemble(f"{certificate.method}: ", _verdict(certificate), style="table.title")
    shown = Table(title=title, caption=f"promise: {certificate.promise}")
    shown.add_column("property")
    for heading in ("measured", "bound", "verdict"):
        shown.add_column(heading, justify="right")
    for row in certificate.rows:
        bound = f"{row.bound.value} {row.tolerance:.3g}"
        shown.add_row(row.name, f"{row.measured:.2e}", bound, "pass" if row.passed else Text("FAIL", style="red"))
    for name, why in certificate.skipped.items():
        shown.add_row(name, "", "", why, style="dim")
    return shown


def summary(certificates: Sequence[Certificate]) -> Table:
    """Table with one row per certified method."""
    shown = Table(title="certificates")
    for heading in ("method", "verdict", "properties", "fails"):
        shown.add_column(heading)
    for c in certificates:
        shown.add_row(c.method, _verdict(c), str(len(c.rows)), "; ".join(c.failures))
    return shown


def _verdict(certificate: Certificate) -> Text:
    return Text("certified", style="green") if certificate.passed else Text("REFUSED", style="red")


def as_json(certificate: Certificate) -> dict[str, Any]:
    """One certificate as JSON values; a number that is not finite becomes null."""
    return {
        "method": certificate.method,
        "promise": certificate.promise,
        "passed": certificate.passed,
        "properties": [
            {
                "property": row.name,
                "measured": row.measured if abs(row.measured) < float("inf") else None,
                "bound": row.bound.value,
                "tolerance": row.tolerance,
                "verdict": "pass" if row.passed else "fail",
            }
            for row in certificate.rows
        ],
        "does not apply": dict(certificate.skipped),
    }
