"""Extraction of the answer from a text: the last box, else an announced answer, else the last formula or number."""

import re

from launch.inputs.answers.kinds import Answer, Choice, Expression, Group, Named, Relation, Text, Unreadable
from launch.inputs.answers.notation import closing
from launch.inputs.answers.reading import read

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BETWEEN = re.compile(r"[\s$.]*(?:,|;|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\}|\\quad|\\,|\s)*[\s$]*")
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<a>.+?)(?<!\\)\$\$(?!\$)|\\\[(?P<b>.+?)\\\]|(?<!\\)\$(?P<c>[^$\n]+?)(?<!\\)\$|\\\((?P<d>.+?)\\\)",
    re.DOTALL,
)
_ANNOUNCED = re.compile(
    r"(?:final\s+answer|answer|correct\s+(?:option|choice|answer)|(?:option|choice)\s+is|result|solution)"
    r"[^.\n:$\\=\d(]{0,40}?(?:\bis\b|\bare\b|:|=)\s*(?:therefore|thus|simply|then|just|equal\s+to|:)?\s*|####\s*"
    r"|答案\s*(?:应该?)?(?:是|为)?\s*[:\uff1a]?\s*",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![\w.\\])(?:[-−]\s?)?(?:\\?[$€£]\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+)?(?:e[+-]?\d+)?(?:\s?\\?%|°)?"
)
_SMALL_CHOICE = re.compile(r"\s*(?:\\text\w*\s*\{\s*)?([a-j])\s?[.):]\s*\}?\s+\S")
_STORED = re.compile(r"\[\s*['\"].*\]|\{\s*['\"].*\}", re.DOTALL)  # JSON, or as Python writes it
_LONG = 160  # characters of a reference that cannot be one answer


def reference(text: str) -> Answer:
    """Answer of a reference: the text behind its last `####`, in its last box, or the whole of it."""
    text = text.strip()
    if _STORED.fullmatch(text):
        return Unreadable(why="it is the text of a list or an object; store the answer itself")
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    if _BOX.search(text):
        boxed = box(text)
        return Unreadable(why="its box is not closed") if boxed is None else read(boxed)
    whole = read(text)
    if isinstance(whole, Unreadable | Text) or len(text) > _LONG:
        announced = list(_ANNOUNCED.finditer(text))
        if announced:
            return read(_sentence(text[announced[-1].end() :]))
    return whole


def given(completion: str, gold: Answer) -> Answer:
    """Answer of a completion; `gold` only determines which kind of answer is looked for."""
    text = completion.rpartition("</think>")[2] or completion
    if not text.strip():
        text = completion
    if boxes := list(_BOX.finditer(text)):
        boxed = box(text)
        found = Unreadable(why="the last box is not closed") if boxed is None else _as(boxed, gold)
        return found if boxed is None else _choice_behind(text[boxes[-1].end() :], gold, found)
    text = _plain(text)
    announced = list(_ANNOUNCED.finditer(text))
    if announced:
        found = _after(text[announced[-1].end() :], gold)
        if not isinstance(found, Unreadable):
            return found
    return _last(text, gold)


def _as(text: str, gold: Answer) -> Answer:
    """The value of a text; `b. 4` is a choice where the reference is one."""
    found = read(text)
    letter = _SMALL_CHOICE.match(text) if isinstance(gold, Choice) else None
    return Choice(letter=letter.group(1).upper()) if letter and not isinstance(found, Choice) else found


def _choice_behind(text: str, gold: Answer, boxed: Answer) -> Answer:
    """The choice that is announced behind a box in which a formula stands, else what is in the box."""
    if isinstance(gold, Choice) and isinstance(boxed, Expression | Named | Relation):
        text = _plain(text)
        if announced := list(_ANNOUNCED.finditer(text)):
            found = _after(text[announced[-1].end() :], gold)
            return found if isinstance(found, Choice) else boxed
    return boxed


def box(text: str) -> str | None:
    """Content of the last box, or of the last ones with only `and`, `or` or a comma between; None if unclosed."""
    boxes: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        if match.end() < len(text) and text[match.end()] == "{":
            end = closing(text, match.end())
            if end < 0:
                boxes.append((match.start(), -1, ""))
                break
            boxes.append((match.start(), end + 1, text[match.end() + 1 : end]))
        elif bare := re.compile(r"-?[\w.,/]*\w|\S").match(text, match.end()):
            boxes.append((match.start(), bare.end(), bare.group()))
    if not boxes or boxes[-1][1] < 0:
        return None
    joined = [boxes[-1]]
    for one in reversed(boxes[:-1]):
        if one[1] > joined[0][0] or not _connects(text[one[1] : joined[0][0]]):
            break
        joined.insert(0, one)
    contents = list(dict.fromkeys(content for _, _, content in joined))
    return contents[0] if len(contents) == 1 else ", ".join(contents)


def _connects(between: str) -> bool:
    return bool(_BETWEEN.fullmatch(between)) and bool(re.search(r",|;|and|or", between))


def _plain(text: str) -> str:
    """Text without the marks of Markdown: bold, headings, quotes, trailing signs."""
    text = re.sub(r"(?<![\w)*])(\*\*|__)(?=\S)([^\n]{1,300}?)(?<=\S)\1(?![\w(*])", r"\2", text)
    text = re.sub(r"(?m)^[ \t]*(?:#{1,3}\s|>\s|[-*]\s(?=\D))", "", text)
    return text.strip()


def _sentence(text: str) -> str:
    """First sentence or line of `text`, without its full stop."""
    text = text.strip()
    if match := re.match(r"\\\[.*?\\\]|\$\$.*?\$\$(?!\$)", text, re.DOTALL):
        return match.group()
    line = text.split("\n", 1)[0]
    cut = re.search(r"[.!?](?=\s+[A-Z\\(])|[.!?]\s*$|\.(?=\s+\w+\s+\w+)", line)
    return (line[: cut.start()] if cut and not line.rstrip().endswith("!") else line).strip()


def _after(text: str, gold: Answer) -> Answer:
    """The answer with which an announced sentence begins, or which it is as a whole."""
    sentence = _sentence(text)
    if not sentence:
        return Unreadable(why="nothing is announced")
    sentence = re.sub(r"^(?:\s*(?:the|option|choice|about|approximately|equal to|therefore)\s+)+", "", sentence)
    whole = _as(sentence, gold)
    if _fits(whole, gold):
        return whole
    spans = list(_MATH.finditer(sentence))
    if spans and not isinstance(gold, Text):
        return read(_inside(spans[-1]))
    shorter = re.split(r"\s+(?:because|since|which|so|as|when|for|if|where)\b|,\s+(?=[a-z]{3})", sentence, maxsplit=1)[
        0
    ]
    if shorter != sentence and _fits(short := read(shorter), gold):
        return short
    return _last(sentence, gold)


def _fits(found: Answer, gold: Answer) -> bool:
    """Whether a candidate is of a possible kind: words are not, where the reference is a number."""
    if isinstance(found, Unreadable):
        return False
    if isinstance(gold, Text):
        return isinstance(found, Text | Choice | Expression)
    if isinstance(found, Group):
        wanted = gold.items[0] if isinstance(gold, Group) and gold.items else gold
        return all(_fits(item, wanted) for item in found.items)
    if isinstance(found, Named):
        return _fits(found.value, gold)
    return not isinstance(found, Text)


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _last(text: str, gold: Answer) -> Answer:
    """Last candidate of the right kind in running text."""
    if isinstance(gold, Text):
        ending = next((m for m in _MATH.finditer(text) if not text[m.end() :].strip(" .\n")), None)
        return read(_inside(ending)) if ending else _last_words(text, len(gold.words.split()))
    spans = list(_MATH.finditer(text))
    if isinstance(gold, Choice):
        whole = read(_inside(spans[-1])) if spans else _as(text, gold)
        if isinstance(whole, Choice) or (isinstance(whole, Group) and isinstance(whole.items[0], Choice)):
            return whole
        found = list(re.finditer(r"\(([A-J])\)|(?<![\w'])([B-J]|A(?!\s+[a-z]))(?![\w'])", text))
        return Choice(letter=found[-1].group(1) or found[-1].group(2)) if found else read(_sentence(text))
    tail = text[spans[-1].end() :] if spans else text
    if spans and not _NUMBER.search(tail):
        joined = [_inside(spans[-1])]
        for before, after in zip(spans[-2::-1], spans[:0:-1], strict=True):
            if not re.fullmatch(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*", text[before.end() : after.start()]):
                break
            joined.insert(0, _inside(before))
        return read(", ".join(joined))
    text = re.split(r"[\s,]+(?:because|since)\s", text)[0] if re.search(r"(?:because|since)[^\n]*$", text) else text
    whole = read(text) if len(text) <= _LONG and "\n" not in text.strip() else Unreadable(why="")
    if _fits(whole, gold):
        return whole
    return _last_formula(text, several=isinstance(gold, Group))


def _last_words(text: str, count: int) -> Answer:
    """Last words of the last sentence, unless it negates them."""
    lines = [line for line in re.split(r"\n|(?<=[.!?])\s+", text.strip()) if line.strip()]
    words = re.sub(r"[$*`\"]", "", lines[-1]).rstrip(" .!?").split() if lines else []
    if not words or "not" in [word.lower() for word in words]:
        return Unreadable(why="no words")
    return read(" ".join(words[-count:]))


def _last_formula(text: str, *, several: bool) -> Answer:
    """Last run of characters that are no words; `several` admits `and` and `or` in it."""
    for line in reversed([line for line in text.splitlines() if line.strip()]):
        run: list[str] = []
        for token in reversed(line.split()):
            bare = token.strip("$.,;:!?*\"'")
            if re.search(r"\d|\\", bare) or re.fullmatch(r"[-+*/=<>^|≤≥≠±]+|[b-hj-zB-HJ-Z]", bare):
                if token.endswith(":") and run:
                    break
                run.insert(0, token)
            elif run and not (several and bare in ("and", "or")):
                break
            elif run:
                run.insert(0, token)
        while run and run[0] in ("and", "or"):
            run.pop(0)
        formula = read(" ".join(run)) if run else Unreadable(why="no formula")
        if not isinstance(formula, Unreadable | Text):
            return formula
        numbers = [m.group() for m in _NUMBER.finditer(line) if re.search(r"\d", m.group())]
        if numbers:
            return read(numbers[-1])
    return Unreadable(why="neither a box nor a formula")
