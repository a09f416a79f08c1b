"""Instructions that a program can check, such as `at least 300 words`: those of IFEval (arXiv 2311.07911).

A reference is a JSON list of objects with an `id`, as the data set names it, and its arguments. What needs a language
detector is not checked here; sentences are told apart by punctuation, where the paper's program has a trained model.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]


def follows(completion: str, answer: str) -> float:
    """1.0 if a completion follows every instruction of the reference (prompt-level strict accuracy), else 0.0."""
    text = completion.rpartition("</think>")[2] if "</think>" in completion else completion
    return float(bool(text.strip()) and all(CHECKS[one["id"]](text, one) for one in json.loads(answer)))


def trouble(answer: str) -> str:
    """Reason why a reference cannot be checked; "" if it can."""
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        return "it is no JSON list of instructions"
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        return "it is no JSON list of instructions"
    for one in given:
        if one.get("id") not in CHECKS:
            return f"instruction {str(one.get('id'))[:60]!r} is not checked here"
        try:
            CHECKS[one["id"]]("Some text.", one)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, re.error) as error:
            return f"instruction {one['id']} has other arguments than it needs ({type(error).__name__}: {error})"
    return ""


def _related(count: int, relation: str, bound: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r}")
    return count >= bound if relation == "at least" else count < bound


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _sentences(text: str) -> int:
    return len([piece for piece in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if _words(piece)])


def _has(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _paragraphs(text: str, given: Arguments) -> bool:
    pieces = re.split(r"\s?\*\*\*\s?", text)
    inner = [piece for i, piece in enumerate(pieces) if piece.strip() or 0 < i < len(pieces) - 1]
    return all(piece.strip() for piece in inner) and len(inner) == int(given["num_paragraphs"])


def _nth_paragraph(text: str, given: Arguments) -> bool:
    """Whether there are so many paragraphs, and the n-th begins with a word."""
    pieces = [piece.strip() for piece in re.split(r"\n\n", text) if piece.strip()]
    first, nth = str(given["first_word"]).lower(), int(given["nth_paragraph"])
    if len(pieces) != int(given["num_paragraphs"]) or not 0 < nth <= len(pieces):
        return False
    words = pieces[nth - 1].split()
    return bool(words) and re.sub(r"[.,?!'\"].*", "", words[0].lstrip("'\"")).lower() == first


def _highlights(text: str, given: Arguments) -> bool:
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found.strip("*").strip()]
    return len(single) + len(double) >= int(given["num_highlights"])


def _sections(text: str, given: Arguments) -> bool:
    mark = re.escape(str(given["section_spliter"]).strip())
    return len(re.split(rf"\s?{mark}\s?\d+\s?", text)) - 1 >= int(given["num_sections"])


def _is_json(text: str, _: Arguments) -> bool:
    inner = re.sub(r"^```(?:json|JSON|Json)?|```$", "", text.strip()).strip()
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _two(text: str, _: Arguments) -> bool:
    pieces = text.split("******")
    inner = [p.strip() for i, p in enumerate(pieces) if p.strip() or 0 < i < len(pieces) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _postscript(text: str, given: Arguments) -> bool:
    mark = str(given["postscript_marker"])
    letters = [re.escape(c) + (r"\.?\s?" if c.isalpha() else r"\s?") for c in mark if c not in ". "]
    return bool(re.search(rf"(?m)\s*{''.join(letters)}.*$", text, re.IGNORECASE))


def _case(text: str, *, upper: bool) -> bool:
    return (text.isupper() if upper else text.islower()) and bool(_words(text))


CHECKS: Mapping[str, Check] = {
    "keywords:existence": lambda t, g: all(_has(t, str(word)) for word in list(g["keywords"])),
    "keywords:frequency": lambda t, g: _related(_has(t, g["keyword"]), g["relation"], int(g["frequency"])),
    "keywords:forbidden_words": lambda t, g: (
        not any(re.search(rf"\b{re.escape(str(word))}\b", t, re.IGNORECASE) for word in list(g["forbidden_words"]))
    ),
    "keywords:letter_frequency": lambda t, g: _related(
        t.lower().count(str(g["letter"]).lower()), g["let_relation"], int(g["let_frequency"])
    ),
    "length_constraints:number_sentences": lambda t, g: _related(_sentences(t), g["relation"], int(g["num_sentences"])),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda t, g: _related(len(_words(t)), g["relation"], int(g["num_words"])),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda t, g: len(re.findall(r"\[.*?\]", t)) >= int(g["num_placeholders"]),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda t, g: (
        len(re.findall(r"(?m)^\s*(?:\*[^*].*|-.*)$", t)) == int(g["num_bullets"])
    ),
    "detectable_format:constrained_response": lambda t, _: any(
        f"My answer is {word}." in t for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda t, _: any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", t)),
    "combination:two_responses": _two,
    "combination:repeat_prompt": lambda t, g: t.strip().lower().startswith(str(g["prompt_to_repeat"]).strip().lower()),
    "startend:end_checker": lambda t, g: t.strip().strip('"').lower().endswith(str(g["end_phrase"]).strip().lower()),
    "startend:quotation": lambda t, _: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda t, g: _related(
        sum(word.isupper() for word in _words(t)), g["capital_relation"], int(g["capital_frequency"])
    ),
    "change_case:english_capital": lambda t, _: _case(t, upper=True),
    "change_case:english_lowercase": lambda t, _: _case(t, upper=False),
    "punctuation:no_comma": lambda t, _: "," not in t,
}
