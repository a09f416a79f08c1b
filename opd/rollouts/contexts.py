"""Builders of the context in which a teacher reads a trajectory, from the trajectories of its group."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol

from opd.errors import ConfigurationError
from opd.method.rewards import task_rewards
from opd.method.templates import Ids, NoRoomError, shortened
from opd.ports import Context, Need, Role
from opd.settings.auto import Auto
from opd.settings.ranges import In, Template, Tokens
from opd.settings.validation import settings
from opd.types import Trajectory

THINKING = re.compile(r".*</think>", re.DOTALL)


class TeacherContext(Protocol):
    """Part that builds what a teacher reads before each trajectory of a group, once they are written."""

    @property
    def needs_engines(self) -> frozenset[Need]:
        """Engines that it calls."""
        ...

    @property
    def min_group(self) -> int:
        """Size of the smallest group for which it can build anything."""
        ...

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[Ids | None]":
        """Token ids per trajectory of one group, in order; None where there is nothing to show."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptAlone:
    """The teacher's prompt as it is (`Prompt.teacher_ids`), with nothing added: plain distillation."""

    needs_engines: ClassVar[frozenset[Need]] = frozenset()
    min_group: ClassVar[int] = 1

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[Ids | None]":
        return [t.prompt.teacher_ids for t in trajectories]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SuccessfulSibling:
    """Context of the first other trajectory of the group that succeeded, or of an environment's words (SDPO).

    arXiv 2601.20802. A trajectory succeeded if its reward is at least `threshold`. `{completion}` of the template
    `solution` is its text, without what stands before `</think>`. Where no sibling succeeded, `{feedback}` of the
    template `feedback` is what the environment said in the trajectory itself; one that has neither is shown
    nothing, and is not trained. `{prompt}` is the student's prompt, `{answer}` the reference answer. Wording: ours,
    after the released code.
    """

    min_group: ClassVar[int] = 2
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.GRADER)})

    # least reward of a success
    threshold: Annotated[float, In(1e-6, 1, because="0 takes every answer for right")] = 0.5
    # what the teacher reads where a sibling succeeded
    solution: Template = "{prompt}\n\nCorrect solution:\n\n{completion}\n\nCorrectly solve the original question."
    # what it reads where an environment alone said something
    feedback: Template = (
        "{prompt}\n\nFeedback on an earlier attempt:\n\n{feedback}\n\nCorrectly solve the original question."
    )
    # longest context in tokens; a longer solution or feedback loses its end
    longest: Tokens = 10240

    def __post_init__(self) -> None:
        _needs(self, "solution", "completion")
        _needs(self, "feedback", "feedback")

    @property
    def shows(self) -> tuple[str, ...]:
        """Templates of what it builds, without what is made while the run lasts."""
        return tuple(
            text.replace("{completion}", "").replace("{feedback}", "") for text in (self.solution, self.feedback)
        )

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[Ids | None]":
        rewards = await task_rewards(trajectories, context)
        winners = [i for i, reward in enumerate(rewards) if reward >= self.threshold]
        return [self._one(i, winners, trajectories, context) for i in range(len(trajectories))]

    def _one(
        self, number: int, winners: list[int], trajectories: Sequence[Trajectory], context: Context
    ) -> "Ids | None":
        mine, other = trajectories[number], next((i for i in winners if i != number), None)
        if other is not None:
            theirs = trajectories[other]
            text = context.tokenizer.decode(theirs.token_ids[theirs.loss_mask])
            shown = {"completion": THINKING.sub("", text)}
            return shortened(self.solution, mine.prompt, shown, "completion", self.longest, context)
        said = context.tokenizer.decode(mine.token_ids[~mine.loss_mask])
        if not said.strip():
            return None
        return shortened(self.feedback, mine.prompt, {"feedback": said}, "feedback", self.longest, context)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Draft:
    """The trajectory itself, as a draft that is to be rewritten (TRD, arXiv 2606.08432), in a template.

    `{completion}` is its text, `{prompt}` the student's prompt and `{answer}` the reference answer, for a privileged
    self. The draft loses its end where context and rewritten text would have more than `room` tokens; a prompt that
    is too long without any draft is shown nothing. Wording: ours, after the meaning of the paper's prompt.
    """

    min_group: ClassVar[int] = 1
    needs_engines: ClassVar[frozenset[Need]] = frozenset()

    # tokens that the rewriting model can hold, the context and the rewritten text; AUTO is student.max_model_len
    room: Tokens | Auto = Auto.AUTO
    # tokens of that which are kept free for the rewritten text
    free: Tokens
    # what is read before the text is rewritten
    template: Template = (
        "{prompt}\n\nAn initial solution:\n\n{completion}\n\nRewrite the initial solution. Keep its structure and its "
        "line of reasoning where possible, keep correct steps and fix errors. Write the rewritten solution alone."
    )

    def __post_init__(self) -> None:
        _needs(self, "template", "completion")

    @property
    def shows(self) -> tuple[str, ...]:
        """Templates of what it builds, without what is made while the run lasts."""
        return (self.template.replace("{completion}", ""),)

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[Ids | None]":
        return [self._one(t, context) for t in trajectories]

    def _one(self, trajectory: Trajectory, context: Context) -> "Ids | None":
        if isinstance(self.room, Auto):
            raise ConfigurationError(
                "Draft.room is AUTO, which the plan of a run decides, but this part is in no run; set a number"
            )
        said = {"completion": context.tokenizer.decode(trajectory.token_ids)}
        try:
            return shortened(self.template, trajectory.prompt, said, "completion", self.room - self.free, context)
        except NoRoomError:
            return None


def _needs(builder: Any, field: str, name: str) -> None:
    """Refuse a template without the text that it is there to show."""
    template = getattr(builder, field)
    if f"{{{name}}}" not in template:
        raise ConfigurationError(
            f"{type(builder).__name__}.{field} shows a teacher nothing without {{{name}}}, but got {template[:60]!r}; "
            f"write {{{name}}} where that text belongs"
        )


def with_room(part: Any, tokens: int) -> Any:
    """The same method or part, with `tokens` of room for every draft in it whose `room` is AUTO."""
    if isinstance(part, Mapping):
        inside = {key: with_room(value, tokens) for key, value in part.items()}
        return inside if any(inside[key] is not value for key, value in part.items()) else part
    if isinstance(part, type) or not is_dataclass(part):
        return part
    if isinstance(part, Draft) and isinstance(part.room, Auto):
        return replace(part, room=tokens)
    whole: Any = part
    was = {f.name: getattr(whole, f.name) for f in fields(whole) if f.init}
    now = {name: with_room(value, tokens) for name, value in was.items()}
    changed = {name: value for name, value in now.items() if value is not was[name]}
    return replace(whole, **changed) if changed else part
