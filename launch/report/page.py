"""HTML pages that stand alone: one file, no network, no script, readable by day and by night.

Every value is escaped by the template engine (model text is untrusted); only our own drawings are `Markup`.
The content security policy forbids scripts and anything fetched, should an escape ever be missing.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

_SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
{% include "style.css" %}
</style>
</head>
<body>
<main>
{% block body %}{% endblock %}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --ink: #1b2128; --muted: #5b6672; --grid: #dde2e7; --surface: #ffffff; --page: #f4f6f8;
  --blue: #0b6bb8; --orange: #c2560c; --green: #0f8a67; --purple: #9a4fb0; --red: #b8344a;
  --up: 11 107 184; --down: 194 86 12;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --muted: #98a3af; --grid: #2e363f; --surface: #171c22; --page: #0f1317;
    --blue: #58aef0; --orange: #f0924a; --green: #3cc49b; --purple: #cb8ae0; --red: #f07a8c;
    --up: 88 174 240; --down: 240 146 74;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.sub { color: var(--muted); margin-top: 6px; }
.card { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; padding: 18px 20px; }
.badge { display: inline-block; border-radius: 999px; padding: 1px 10px; font-size: 13px; font-weight: 600;
  border: 1px solid currentColor; margin-left: 10px; vertical-align: 4px; }
.finished { color: var(--green); } .stopped { color: var(--orange); } .failed { color: var(--red); }
.running { color: var(--muted); }
.note { border-left: 4px solid var(--orange); border-radius: 0 8px 8px 0; padding: 10px 16px;
  margin-top: 16px; background: var(--surface); }
.head { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 16px; margin-top: 20px; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.thirds { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 16px; align-items: start; }
@media (max-width: 820px) { .head, .grid, .thirds { grid-template-columns: minmax(0, 1fr); } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--muted); font-size: 13px; padding: 4px 0 4px 12px; }
td { text-align: right; padding: 5px 0 5px 12px; border-top: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:not(:first-child) { white-space: nowrap; } td.strong { font-weight: 650; }
.scroll { overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
dl.numbers dd { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; } figcaption { color: var(--muted); font-size: 13px; margin-top: 6px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible; }
svg text { font-family: inherit !important; }
.sample { margin-bottom: 12px; }
.sample .where { color: var(--muted); font-size: 13px; margin-bottom: 8px; }
.good { color: var(--green); font-weight: 600; } .bad { color: var(--red); font-weight: 600; }
.text { font: 13.5px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text.prompt { color: var(--muted); margin-bottom: 6px; }
.up { background: rgb(var(--up) / var(--a)); border-radius: 3px; }
.down { background: rgb(var(--down) / var(--a)); border-radius: 3px; }
.strongly { text-decoration: underline dotted; text-underline-offset: 3px; }
.key { font-size: 13px; color: var(--muted); margin-bottom: 12px; }
.key span { padding: 1px 7px; color: var(--ink); }
summary { cursor: pointer; font-weight: 600; }
.steps { margin-bottom: 16px; } .steps p { color: var(--muted); font-size: 13px; margin-top: 10px; }
.steps p:first-child { margin-top: 0; }
.steps pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }
.tall { display: none; }
@media (max-width: 560px) {  /* a phone: what stands side by side elsewhere stands one below the other */
  main { padding: 20px 10px 40px; } .card { padding: 14px 12px; }
  table { font-size: 13px; } th, td { padding-left: 8px; } td:first-child { min-width: 76px; }
  .wide { display: none; } .tall { display: block; }
}
details pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto;
  margin: 12px 0 0; }
"""

_REPORT = """{% extends "shell.html" %}
{% macro numbers(title, values) %}
{% if values %}
<section class="card"><h3>{{ title }}</h3>
<dl class="numbers" style="margin-top:8px">
{% for name, value in values %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl></section>
{% endif %}
{% endmacro %}
{% block body %}
<header>
<h1>{{ title }}<span class="badge {{ outcome }}">{{ outcome }}</span></h1>
<p class="sub">{{ subtitle }}</p>
</header>
{% if error %}<p class="note"><strong>The run ended with an error.</strong> {{ error }}</p>{% endif %}
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
<div class="head">
<section class="card scroll">
<table>
<thead><tr><th></th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><td>{{ row.name }}</td>
{% for cell in row.cells %}<td{% if loop.index0 == 1 %} class="strong"{% endif %}>{{ cell }}</td>
{% endfor %}</tr>
{% else %}<tr><td>not evaluated yet</td></tr>
{% endfor %}</tbody>
</table>
</section>
<section class="card"><dl>
{% for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl></section>
</div>
{% if pictures %}<h2>Curves</h2>
<div class="grid">
{% for picture in pictures %}<figure class="card"><h3>{{ picture.title }}</h3>
{{ picture.svg }}
<figcaption>{{ picture.note }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% if next_steps %}<h2>What to do next</h2>
<section class="card steps">
{% for step in next_steps %}<p>{{ step.what }}</p><pre>{{ step.command }}</pre>
{% endfor %}</section>{% endif %}
{% if samples %}<h2>Samples</h2>
{% if has_gaps %}<p class="key"><span class="up" style="--a:.45">blue</span> the teacher finds this token
likelier than the student that wrote it, <span class="down" style="--a:.45">orange</span> less likely; the
stronger, the more. Underlined: by more than {{ strongly }} nats. Hover for the number.</p>{% endif %}
{% for sample in samples %}<article class="card sample">
<p class="where">step {{ sample.step }} · written by version {{ sample.version }} ·
{{ sample.length }} tokens, {{ sample.ending }}
{%- if sample.answer %} · expected answer {{ sample.answer }}{% endif %}
{%- if sample.verdict %} · <span class="{{ sample.verdict_class }}">{{ sample.verdict }}</span>{% endif %}</p>
<p class="text prompt">{{ sample.prompt }}</p>
<p class="text">{% for token in sample.tokens -%}
{% if token.side %}{{ token.space }}<span class="{{ token.side }}"
{{- " " }}style="--a:{{ token.alpha }}" title="{{ token.title }}">
{{- token.text }}</span>{% else %}{{ token.text }}{% endif %}
{%- endfor %}{% if sample.cut %} …{% endif %}</p>
</article>
{% endfor %}{% endif %}
<h2>Account</h2>
<div class="thirds">
{{ numbers("Spent", spent) }}{{ numbers("Trajectories", ledger) }}{{ numbers("Busy", busy) }}
{{- numbers("Versions", versions) }}
</div>
{% if verdict %}<p class="sub">{{ verdict }}</p>{% endif %}
<h2>Configuration</h2>
{% if command %}<section class="card steps"><p>the command</p><pre>{{ command }}</pre></section>{% endif %}
<details class="card"><summary>resolved, without secrets</summary><pre>{{ config }}</pre></details>
{% endblock %}
"""

_COMPARISON = """{% extends "shell.html" %}
{% block body %}
<header><h1>{{ title }}</h1><p class="sub">{{ subtitle }}</p></header>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
<figure class="card" style="margin-top:20px"><div class="wide">{{ svg }}</div><div class="tall">{{ tall }}</div>
<figcaption>{{ caption }}</figcaption></figure>
<h2>{{ table_title }}</h2>
<section class="card scroll"><table>
<thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></section>
<p class="sub">{{ table_note }}</p>
{% endblock %}
"""

_pages = Environment(
    loader=DictLoader(
        {"shell.html": _SHELL, "style.css": _STYLE, "report.html": _REPORT, "comparison.html": _COMPARISON}
    ),
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
