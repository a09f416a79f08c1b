"""The docs site (`make docs`): the pages of the repository as they are, with a table of contents beside them.

The sources are the whole checkout, of which README.md, the other pages at its top and docs/ are read: every link in
them is right both here and where the repository is browsed. Sphinx wants the names below to be as they are.
"""

import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

DECISIONS = "docs/adr/README"
FAMILIES = "docs/methods/README"
# The table of contents: a group, then its pages, with a shorter title where the page's own is long. A page that is
# missing here, or there, fails the build; docs/adr/ and docs/methods/ are listed by themselves.
NAV = {
    "Start": [
        "Overview <self>",
        "Ten minutes <docs/howto/start>",
        "docs/recipes",
        "From Python <docs/python>",
        "docs/glossary",
        "CONTRIBUTING",
    ],
    "How to": [
        "Your own models <docs/models>",
        "Your own data <docs/data>",
        "Your own reward <docs/grading>",
        "Your own method <docs/adding_a_method>",
        "From the hub and back <docs/hub>",
        "One GPU <docs/howto/one_gpu>",
        "Many GPUs <docs/howto/many_gpus>",
        "How GPUs and memory are planned <docs/gpus>",
        "Resume <docs/howto/resume>",
        "Evaluate on several sets <docs/evaluation>",
        "Compare <docs/comparing>",
        "Sweep settings <docs/sweeps>",
        "Runs with stages <docs/staged_runs>",
        "Adapters <docs/lora>",
        "Look inside a run <docs/howto/debug>",
    ],
    "When something is wrong": [
        "docs/pitfalls",
        "Self-test of a machine <docs/selftest>",
        "The doctor <docs/doctor>",
        "Metrics and alerts <docs/diagnostics>",
        "docs/tracking",
        "Performance <docs/performance>",
        "Reliability <docs/reliability>",
    ],
    "Reference": [
        "docs/commands",
        "docs/reference",
        FAMILIES,
        "docs/schedules",
    ],
    "Explanation": [
        "docs/architecture",
        "docs/life_of_a_batch",
        "The pipeline <docs/pipeline>",
        "docs/certificate",
        "docs/publishing",
        "Teachers <docs/teachers>",
    ],
    "Measured": [
        "docs/benchmarks",
        "The stage locks <docs/stages/locks>",
        "The stage locks_self <docs/stages/locks_self>",
        "The stage locks_reader <docs/stages/locks_reader>",
        "The stage noisy <docs/stages/noisy>",
        "The stage foreign <docs/stages/foreign>",
        "The stage long <docs/stages/long>",
        "Other systems <docs/peers>",
        "docs/mutants",
        "Log of measurements <docs/log>",
        "CHANGELOG",
    ],
    "Decisions": [DECISIONS],
}

project = "opd"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
html_title = f"opd {release}"

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]
myst_heading_anchors = 4  # a link to a heading is checked like a link to a page

html_theme = "furo"
html_copy_source = False
html_use_index = False
html_show_sphinx = html_show_copyright = False


def toctree(pages: list[str], *options: str) -> str:
    """The directive that lists pages."""
    return "\n".join(["\n\n```{toctree}", *options, "", *pages, "```\n"])


def add_contents(_app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page, and those of decisions and methods, a list that their readers elsewhere need not see."""
    if page == root_doc:
        source[0] += "".join(toctree(pages, f":caption: {group}", ":hidden:") for group, pages in NAV.items())
    elif page == DECISIONS:
        source[0] += toctree(
            [path.stem for path in sorted((ROOT / DECISIONS).parent.glob("[0-9]*.md"))], ":maxdepth: 1"
        )
    elif page == FAMILIES:
        families = sorted(path.stem for path in (ROOT / FAMILIES).parent.glob("[a-z]*.md"))
        source[0] += toctree(families, ":hidden:")


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Lead from the site's folder to its first page."""
    if error is None:
        first = f"{root_doc}.html"
        (app.outdir / "index.html").write_text(
            f'<!doctype html>\n<meta charset="utf-8">\n<title>{html_title}</title>\n'
            f'<meta http-equiv="refresh" content="0; url={first}">\n<a href="{first}">{html_title}</a>\n'
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
