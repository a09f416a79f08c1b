"""Survey of all prompts of a source when a run is planned, so that no prompt can end the run later."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np
import xxhash
from rich.progress import track

from hf.tokenizer import HuggingFaceTokenizer
from launch.artifacts.terminal import console
from launch.config.settings import EvaluationConfig, place_of
from opd.errors import DataError
from opd.ports import Listed, PromptSource, Sources
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.generated import GeneratedPrompts
from opd.types import Prompt
from opd.types.prompt_rows import Row

MANY = 5_000  # prompts whose reading is shown, because it takes more than a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Number of prompts of a kind, and the place of the first. Example: `Kind(count=2, first="a.csv line 3")`."""

    count: int = 0
    first: str = ""

    def and_at(self, where: str) -> "Kind":
        """The kind with one more prompt."""
        return Kind(count=self.count + 1, first=self.first or where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Survey of all prompts of a source.

    `longest` and `longest_for_teacher` are tokens with their place, `highest` the largest id of a token, `teachers` and
    `tasks` say where each is first asked for, `first_of` has each task's first prompt, `unanswered_of` the place of its
    first without an answer, `privileged` are read otherwise by the teacher, `ids` are the prompts' own, `texts` digests
    of what the student reads. `total` counts what there is (0: without end, and these are a sample).
    """

    seen: int
    total: int
    longest: tuple[int, str]
    longest_for_teacher: tuple[int, str]
    highest: tuple[int, str]
    first: Prompt
    teachers: Mapping[str, str]
    tasks: Mapping[str, str]
    first_of: Mapping[str, Prompt]
    unanswered_of: Mapping[str, str]
    chats: Kind
    unanswered: Kind
    unknown: Kind
    special: Kind
    repeated: Kind
    privileged: Kind
    ids: frozenset[str] = field(repr=False)
    texts: frozenset[int] = field(repr=False)


def survey(found: Iterable[tuple[Row, Prompt]], total: int, tokenizer: HuggingFaceTokenizer) -> Survey:
    """Survey of prompts, made in one pass."""
    special = tokenizer.special_texts()
    first: Prompt | None = None
    longest = longest_for_teacher = highest = (0, "")
    teachers: dict[str, str] = {}
    tasks: dict[str, str] = {}
    first_of: dict[str, Prompt] = {}
    unanswered_of: dict[str, str] = {}
    chats = unanswered = unknown = marked = repeated = privileged = Kind()
    ids: set[str] = set()
    texts: set[int] = set()
    for row, prompt in found:
        where = row.where or f"prompt {prompt.id!r}"
        first = first or prompt
        longest = max(longest, (len(prompt.student_ids), where), key=lambda pair: pair[0])
        longest_for_teacher = max(longest_for_teacher, (len(prompt.teacher_ids), where), key=lambda pair: pair[0])
        top = max(int(prompt.student_ids.max(initial=0)), int(prompt.teacher_ids.max(initial=0)))
        highest = max(highest, (top, where), key=lambda pair: pair[0])
        teachers.setdefault(prompt.teacher, where)
        tasks.setdefault(prompt.task, where)
        first_of.setdefault(prompt.task, prompt)
        if not isinstance(prompt.source.text if prompt.source else row.prompt, str):
            chats = chats.and_at(where)
        if not prompt.answer:
            unanswered = unanswered.and_at(where)
            unanswered_of.setdefault(prompt.task, where)
        if tokenizer.unknown_id is not None and np.mean(prompt.student_ids == tokenizer.unknown_id) > 0.5:
            unknown = unknown.and_at(where)
        if special is not None and any(special.search(text) for text in _texts(row, prompt)):
            marked = marked.and_at(where)
        digest = xxhash.xxh3_64_intdigest(prompt.student_ids.tobytes())
        if digest in texts:
            repeated = repeated.and_at(where)
        texts.add(digest)
        if not np.array_equal(prompt.student_ids, prompt.teacher_ids):
            privileged = privileged.and_at(where)
        ids.add(prompt.id)
    assert first is not None  # a source without a row has been refused
    return Survey(
        seen=len(ids),
        total=total,
        longest=longest,
        longest_for_teacher=longest_for_teacher,
        highest=highest,
        first=first,
        teachers=teachers,
        tasks=tasks,
        first_of=first_of,
        unanswered_of=unanswered_of,
        chats=chats,
        unanswered=unanswered,
        unknown=unknown,
        special=marked,
        repeated=repeated,
        privileged=privileged,
        ids=frozenset(ids),
        texts=frozenset(texts),
    )


def survey_all(source: PromptSource, sources: Sources, tokenizer: HuggingFaceTokenizer) -> Survey:
    """Survey of all prompts that `source` may ever give; the part independent of the order is cached between plans."""
    if isinstance(source, DatasetPrompts):
        source = replace(source, seed=0, prompts_per_step=1, group_size=1, shuffle=False)
        return survey_once(source, sources, tokenizer)
    if isinstance(source, GeneratedPrompts) and all(
        isinstance(getattr(source, one.name), Hashable) for one in fields(source)
    ):
        return survey_once(replace(source, prompts_per_step=1, group_size=1), sources, tokenizer)
    return _survey_of(source, sources, tokenizer)


def _survey_of(source: PromptSource, sources: Sources, tokenizer: HuggingFaceTokenizer) -> Survey:
    total = source.rows(sources) if isinstance(source, Listed) else 0
    return survey(_shown(_found(source, sources), total, sources.place), total, tokenizer)


survey_once = lru_cache(maxsize=8)(_survey_of)  # a comparison plans the same prompts for every arm and seed


def survey_held_out(
    config: EvaluationConfig, sources: Sources, tokenizer: HuggingFaceTokenizer
) -> Mapping[str, Survey]:
    """Survey of every evaluation set, by name."""
    found = {name: config.held_out(name, sources) for name in config.by_name}
    if empty := [name for name, rows in found.items() if not rows]:
        raise DataError(f"{place_of(empty[0])} has no prompt that could be asked; give it rows, or leave the set out")
    return {name: survey(rows, len(rows), tokenizer) for name, rows in found.items()}


def _found(source: PromptSource, sources: Sources) -> Iterator[tuple[Row, Prompt]]:
    """Rows and prompts of all steps, or of step 0 where a source cannot list what it may give."""
    if isinstance(source, Listed):
        yield from source.every(sources, None)
    else:
        for prompt in {p.id: p for p in source(0, sources)}.values():
            yield Row(prompt="", answer=prompt.answer, where=f"prompt {prompt.id!r}"), prompt


def _shown(found: Iterator[tuple[Row, Prompt]], total: int, place: str) -> Iterable[tuple[Row, Prompt]]:
    """The prompts with a progress bar on a terminal, if it takes a while."""
    if total < MANY:
        return found
    return track(found, f"reading {place}", total=total, console=console(stderr=True), transient=True)


def _texts(row: Row, prompt: Prompt) -> Sequence[str]:
    """Texts of a prompt, without what a chat template writes around them."""
    asked = prompt.source.text if prompt.source else row.prompt
    if isinstance(asked, str):
        return [asked]
    return [message["content"] for message in asked if isinstance(message.get("content"), str)]
