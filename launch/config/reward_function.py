"""A reward that is a plain Python function, as a grader."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.errors import ConfigurationError
from opd.settings.ranges import Deadline, Names
from opd.settings.validation import settings

ONE, ALL = ("completion", "answer"), ("completions", "answers")
FORMS = "(completion, answer) or (completion) for one number, (completions, answers) for a list"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class RewardFunction:
    """A user's function as a grader: `def reward(completion: str, answer: str) -> float`.

    The names of its parameters say what it is given: `completion` and `answer` one at a time, `completions` and
    `answers` a whole list, for a list of rewards. The answer may be left out; what else stands in its place of the
    configuration (`settings`) is given by keyword. Raises `ConfigurationError` about another signature.
    """

    name: Names
    function: Callable[..., Any] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    # seconds that one call may take
    deadline_s: Deadline = 5.0

    def __post_init__(self) -> None:
        parameters = self._parameters
        given = [n for n in (*ONE, *ALL) if n in parameters]
        others = {n: p for n, p in parameters.items() if n not in given}
        strange = [n for n, p in others.items() if n not in self.settings and p.default is p.empty and _by_name(p)]
        unknown = sorted(self.settings.keys() - others.keys()) if not _takes_any(parameters) else []
        if given not in (["completion"], list(ONE), ["completions"], list(ALL)) or strange:
            raise ConfigurationError(
                f"graders.{self.name}: a reward function is called with {FORMS}, but {self.function.__qualname__} "
                f"has ({', '.join(parameters)}); rename its parameters"
                + (f", or set graders.{self.name}.{strange[0]}=..." if strange and given else "")
            )
        if inspect.iscoroutinefunction(self.function) or inspect.isgeneratorfunction(self.function):
            raise ConfigurationError(
                f"graders.{self.name}: {self.function.__qualname__} gives a coroutine or a generator when called, and "
                "no reward; return a number, or name a dataclass with `async def grade(self, completions, answers)`"
            )
        if unknown:
            raise ConfigurationError(
                f"graders.{self.name}.{unknown[0]}: {self.function.__qualname__} has no such parameter; it has "
                f"{', '.join(parameters)}"
            )

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def needs_answer(self) -> bool:
        """Whether it cannot be called without a reference answer."""
        answer = [p for n, p in self._parameters.items() if n in ("answer", "answers")]
        return bool(answer) and answer[0].default is inspect.Parameter.empty

    @property
    def one_by_one(self) -> bool:
        """Whether it is called for each completion."""
        return "completion" in self._parameters

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order."""
        if self.one_by_one:
            pairs = zip(completions, answers, strict=True)
            return [self._called(completion=completion, answer=answer) for completion, answer in pairs]
        return self._called(completions=list(completions), answers=list(answers))

    def _called(self, **values: Any) -> Any:
        """Result of the function for the values that it has a parameter for, wherever in its signature."""
        given = {name: values[name] for name in self._parameters if name in values}
        only = [n for n, p in self._parameters.items() if p.kind is p.POSITIONAL_ONLY and n in given]
        first = [given.pop(name) for name in only]
        return self.function(*first, **given, **self.settings)


def _by_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
