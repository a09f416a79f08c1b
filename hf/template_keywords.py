"""Keywords of a chat template: the names that it reads without having set them."""

from collections.abc import Iterator, Sequence

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""Variables of a template that are no keywords: they say what to render."""
_FUNCTIONS = frozenset({"raise_exception", "strftime_now"})  # transformers' own globals


class _Generation(Extension):
    """Block `{% generation %}`, by which some templates mark what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def keywords(template: str) -> frozenset[str]:
    """Names that `template` reads where it need not have set them itself: its switches, and its special tokens.

    `jinja2.meta` would also name variables that every branch sets. Raises `TemplateError` for what is no template.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    found = set(_reads(environment.parse(template).body, set()))
    return frozenset(found - GIVEN - _FUNCTIONS - environment.globals.keys())


def _reads(parts: Sequence[nodes.Node], known: set[str]) -> Iterator[str]:
    """Names that are read in `parts` and not in `known`, which learns the names that are set on every way through."""
    for part in parts:
        match part:
            case nodes.Name(name=name, ctx="load"):
                if name not in known:
                    yield name
            case nodes.Name(name=name):
                known.add(name)
            case nodes.Assign(target=target, node=value):
                yield from _reads([value, target], known)
            case nodes.If(test=test, body=body, elif_=more, else_=otherwise):
                yield from _reads([test, *(one.test for one in more)], known)
                ways = [(branch, set(known)) for branch in (body, *(one.body for one in more), otherwise)]
                for branch, way in ways:
                    yield from _reads(branch, way)
                known |= set[str].intersection(*(way for _, way in ways))
            case nodes.For(target=target, iter=items, body=body, else_=otherwise, test=test):
                yield from _reads([items], known)
                inside = known | {"loop"}
                yield from _reads([target, *([test] if test else []), *body], inside)
                yield from _reads(otherwise, set(known))
            case nodes.Macro(args=arguments, defaults=defaults, body=body):
                yield from _reads(defaults, known)
                yield from _reads([*arguments, *body], known | {"caller", "varargs", "kwargs"})
                known |= {part.name}
            case nodes.With(targets=targets, values=values, body=body):
                yield from _reads(values, known)
                yield from _reads([*targets, *body], set(known))
            case nodes.AssignBlock(target=target, filter=through, body=body):
                yield from _reads([*([through] if through else []), *body], set(known))
                yield from _reads([target], known)
            case nodes.CallBlock() | nodes.FilterBlock() | nodes.Scope():
                yield from _reads([*part.iter_child_nodes()], set(known))
            case _:
                yield from _reads([*part.iter_child_nodes()], known)
