"""End-of-text ids of this run, disagreements between the files of a checkpoint about them, and samplers left aside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf.folder import has_config
from hf.stop_tokens import Ends, read_ends, read_generation
from hf.tokenizer import HuggingFaceTokenizer
from teacher_service.config import TeacherConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEnds:
    """`ids` end a completion; `notes` are sentences about files that disagree."""

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def text_ends(path: str, tokenizer: HuggingFaceTokenizer, teachers: Mapping[str, TeacherConfig]) -> TextEnds:
    """Union of all ids in the student's checkpoint, with the token that ends a turn in its chat template.

    Raises `DataError` for an id outside of the model's vocabulary, and where nothing ends a text.
    """
    named, turn = read_ends(path), tokenizer.turn_end()
    ids = tuple(sorted({*named.ids, tokenizer.eos_id, *(() if turn is None else (turn,))}))
    notes = [_disagreement(f"student {path!r}", named, tokenizer)] if named.disagree else []
    notes += _sampler_left_aside(path)
    if turn is not None and turn not in named.ids:
        notes.append(
            f"the chat template of student {path!r} ends a turn with {_shown([turn], tokenizer)}, which none of its "
            "files calls an end of text; completions end there, too"
        )
    for name, teacher in teachers.items():
        if has_config(teacher.path):
            theirs = read_ends(teacher.path, f"teacher {name!r}")
            if not set(theirs.ids) <= set(ids):
                more = _shown(sorted(set(theirs.ids) - set(ids)), tokenizer)
                notes.append(
                    f"teacher {name!r} also ends texts with {more}, after which the student's completions go on; add "
                    "it to the student's generation_config.json if it should end them"
                )
    return TextEnds(ids=ids, notes=tuple(notes))


_NEUTRAL = {"temperature": (1,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,)}
"""Sampling settings of a generation_config.json, and the values with which they change nothing."""


def _sampler_left_aside(path: str) -> list[str]:
    """Note on a sampler that the checkpoint suggests, with which published figures of it may have been measured."""
    said = read_generation(path)
    found = {name: said[name] for name, plain in _NEUTRAL.items() if said.get(name) not in (None, *plain)}
    if not found:
        return []
    listed = ", ".join(f"{name} {value}" for name, value in found.items())
    return [
        f"generation_config.json of student {path!r} suggests {listed}, which a run leaves aside: it trains and "
        "evaluates with samplers of its own, at temperature 1 unless told otherwise (docs/evaluation.md: a set with "
        "another); figures that others published of this model may be of that sampler"
    ]


def _disagreement(whose: str, named: Ends, tokenizer: HuggingFaceTokenizer) -> str:
    listed = ", ".join(f"{file} {_shown(ids, tokenizer)}" for file, ids in named.by_file.items())
    return f"the files of {whose} name different ends of text ({listed}); completions end at each of them"


def _shown(ids: Sequence[int], tokenizer: HuggingFaceTokenizer) -> str:
    return " and ".join(f"{tokenizer.token(i)!r} ({i})" for i in ids)
