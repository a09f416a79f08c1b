"""HTML pages that stand alone: one file, no network, no script, readable by day and by night.

The pages are in `templates/`. Every value is escaped by the template engine (model text is untrusted); only our own
drawings are `Markup`. The content security policy forbids scripts and anything fetched, should an escape ever be
missing.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_pages = Environment(
    loader=PackageLoader("launch.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def render_report(values: Mapping[str, Any]) -> str:
    """The page of one run."""
    return _pages.get_template("report.html").render(values)


def render_comparison(values: Mapping[str, Any]) -> str:
    """The page of several runs side by side."""
    return _pages.get_template("comparison.html").render(values)
