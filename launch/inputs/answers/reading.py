"""Text of one answer as a value: brackets, lists, relations, matrices, units, choices and words."""

import re
from typing import TypeGuard

from launch.inputs.answers import ratios, units
from launch.inputs.answers.kinds import (
    BARE,
    SET,
    TUPLE,
    Answer,
    Choice,
    Expression,
    Group,
    Matrix,
    Named,
    Ratio,
    Relation,
    Text,
    Union,
    Unreadable,
)
from launch.inputs.answers.notation import FUNCTIONS, canonical

MOST = 1000  # characters of an answer; what is longer is a text to be read by people
_DEEPEST = 40  # brackets within brackets; LaTeX that people write has fewer than ten
_WORDS = 8  # words of a text that can be compared
_THOUSANDS = re.compile(r"(?:\\\$\s*)?[+-]?(?:\\\$\s*)?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?![\d,])")
_SIGNS = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\neq|\\approx|\\equiv|\\in(?![A-Za-z])|[=<>]")
_FLIPPED = {">": "<", "\\ge": "\\le"}
_CHOICE = re.compile(r"\(([A-Ja-j])\)|([A-J])|([A-J])\s*[.):]|\[([A-J])\]")
_CHOICE_OF = re.compile(r"(?:\(([A-Ja-j])\)|([A-J])\s*[.):](?!\S*\d*\s*[:]))\s*(?P<of>(?![,;&]|and\b|or\b)\S.*)")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{[^{}]*\})?'*(?:\s*\([^()=]*\))?|\\text\{[^{}]*\}|\\(?:vec|hat|bar|mathbf|angle|overline)\s*\{?[^{}=]*\}?"
    r"|\\frac\{d(?:\^\{\d\})?\s*\w?\}\{d\w(?:\^\{\d\})?\}|\|\\(?:vec|overrightarrow|mathbf)\s*\{?\w+\}?\|"
    r"|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)|[A-Za-z]\^\{-1\}\([A-Za-z]\)|[A-Z][a-z]*(?: [a-z]+){0,4}|\\angle [A-Z]+"
)
_DIGITS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BASES = {word: str(base) for base, word in enumerate(_DIGITS, start=2)}
_NONE = re.compile(r"no (?:real |integer )?solutions?|none|empty set|does not exist|dne", re.IGNORECASE)
_HOLE = re.compile(r"\\mathbb\{R\}\s*(?:\\setminus|-)\s*\\\{([^,;]*)\\\}")  # all numbers but one
_MODULUS = re.compile(
    r"(.*?\d)\s*(?:\\pmod\s*\{?\s*(\w+)\s*\}?|\(?\s*(?:\\text\{\s*\(?\s*mod(?:ulo)?\s*\}|\\b?mod)\s*\{?\s*(\w+)\s*\}?\s*\)?)"
)
_LED = re.compile(  # words before a value, which they do not turn into another
    r"\\text\{(?!\s*(?:not|no|never|neither|at\s+least|at\s+most|more|less|fewer|greater|between|over|under)\b)[^{}]*\}"
    r"\s*(?![\s,;=<>:^]|\\(?:text|in|le|ge|neq|approx|cdot|times)(?![A-Za-z]))(.*\d.*)"
)
_OPEN, _CLOSE = ("(", "[", "\\{", "\\langle"), (")", "]", "\\}", "\\rangle")


def read(text: str) -> Answer:
    """The value of an answer that stands alone (not in a sentence)."""
    if len(text) > MOST:
        return Unreadable(why=f"longer than {MOST} characters")
    spelled = canonical(text)
    if not spelled:
        return Unreadable(why="empty")
    if not balanced(spelled):
        return Unreadable(why="braces are not balanced")
    if depth(spelled) > _DEEPEST:
        return Unreadable(why=f"brackets are nested more than {_DEEPEST} deep")
    return _read(spelled)


def balanced(text: str) -> bool:
    """Whether all braces are closed."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0 and text.count("\\begin") == text.count("\\end")


def depth(text: str) -> int:
    """Nesting depth of brackets of any kind."""
    deepest = now = 0
    for bracket in re.findall(r"[{}()\[\]]", text):
        now += 1 if bracket in "{([" else -1
        deepest = max(deepest, now)
    return deepest


def _read(text: str) -> Answer:
    text = text.strip()
    if choice := _choice(text):
        return choice
    if time := ratios.clock(text):
        return time
    if _THOUSANDS.fullmatch(text):
        return _leaf(text)
    if led := _LED.fullmatch(text):
        return _read(led.group(1))  # words before a value
    for attempt in (_list, _union, _relation, _bracketed, _matrix, _ratio, _plus_minus):
        found = attempt(text)
        if found is not None:
            return found
    return _leaf(text)


def _choice(text: str) -> Choice | None:
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    plain = re.sub(
        r"\s+", " ", re.sub(r"^(?:option|choice|answer)\s+(?=\(?[A-Ja-j]\b)", "", plain, flags=re.IGNORECASE)
    )
    if match := _CHOICE.fullmatch(plain):
        return Choice(letter=next(g for g in match.groups() if g).upper())
    if match := _CHOICE_OF.fullmatch(plain):
        of = re.sub(r"^\s*(?:\\text\{\s*)?\(?[A-Ja-j][.):]+\s*\}?", "", text).strip()
        return Choice(letter=(match.group(1) or match.group(2)).upper(), of=_read(of if balanced(of) else match["of"]))
    return None


def parts(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` split where `separator` stands outside all brackets."""
    found, depth, start, at = [], 0, 0, 0
    token = re.compile(r"\\(?:begin|end)\{[^{}]*\}|\\langle(?![A-Za-z])|\\rangle(?![A-Za-z])|\\[{}]|[()\[\]{}]")
    while at < len(text):
        if depth == 0 and (cut := separator.match(text, at)) and cut.end() > at:
            found.append(text[start:at])
            start = at = cut.end()
        elif bracket := token.match(text, at):
            name = bracket.group()
            depth += 1 if name.startswith("\\begin") or name in ("\\langle", "\\{", "(", "[", "{") else -1
            at = bracket.end()
        else:
            command = re.compile(r"\\[A-Za-z]+|\\.").match(text, at)
            at = command.end() if command else at + 1
    return [*found, text[start:]]


_COMMA = re.compile(
    r"\s*[,;]?\s*\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}\s*|\s*[,;]?\s+(?:and|or)\s+|\s*[,;]\s*|\s*\\lor\s+|\s*\\land\s+"
)


def _list(text: str) -> Answer | None:
    """Several answers: `1, 3`, `x = 1 or x = 3`, `y = 1, 3`."""
    items = _rejoined(parts(text, _COMMA))
    if len(items) < 2 or (_is_prose(text) and len(items) > 5):
        return None
    if not all(item.strip() for item in items):
        return Unreadable(why="an empty item in a list")
    read_items = [_read(item) for item in items]
    if all(isinstance(item, Text) for item in read_items) and len(text.split()) > _WORDS:
        return Unreadable(why=f"a text of more than {_WORDS} words")
    first = read_items[0]
    if isinstance(first, Named) and not any(isinstance(item, Named | Relation) for item in read_items[1:]):
        return Named(name=first.name, value=Group(brackets=BARE, items=(first.value, *read_items[1:])))
    flat = [one for item in read_items for one in (item.items if _is_bare(item) else (item,))]
    return Group(brackets=BARE, items=tuple(flat))


def _is_bare(item: Answer) -> TypeGuard[Group]:
    return isinstance(item, Group) and item.brackets == BARE


def _rejoined(items: list[str]) -> list[str]:
    """Items with thousands separators joined again: `1,000` in `1,000 dollars` or `x = 12,500`."""
    joined = [items[0]]
    for item in items[1:]:
        if re.search(r"(?:^|[^\d.,])[1-9]\d{0,2}(?:,\d{3})*$", joined[-1]) and re.match(r"\d{3}(?![\d])", item):
            joined[-1] += f",{item}"
        else:
            joined.append(item)
    return joined


def _union(text: str) -> Answer | None:
    items = parts(text, re.compile(r"\s*\\cup(?![A-Za-z])\s*"))
    return Union(items=tuple(_read(item) for item in items)) if len(items) > 1 else None


def _relation(text: str) -> Answer | None:
    sides = [side.strip() for side in parts(text, _SIGNS)]
    if len(sides) < 2:
        return None
    if any(_is_prose(side) and not _is_name(side) for side in sides[:-1]):
        return Unreadable(why="an equation in a sentence")
    signs = _signs(text, sides)
    if not all(sides):
        return _read(sides[-1]) if len(sides) == 2 and sides[-1] and signs[-1] in "=\\approx" else None
    if signs == ["\\in"]:
        return Named(name=_spaceless(sides[0]), value=_read(sides[1]), member=True)
    if all(sign in ("=", "\\approx", "\\equiv") for sign in signs):
        return _equation(sides, signs)
    if all(sign in _FLIPPED for sign in signs):
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    return Relation(sides=tuple(sides), signs=tuple(signs))


def _signs(text: str, sides: list[str]) -> list[str]:
    signs, at = [], 0
    for side in sides[:-1]:
        at = text.index(side, at) + len(side)
        match = _SIGNS.search(text, at)
        assert match is not None
        signs.append(match.group())
        at = match.end()
    return signs


def _equation(sides: list[str], signs: list[str]) -> Answer:
    if _is_name(sides[0]):
        return Named(name=_spaceless(sides[0]), value=_read(sides[-1]))
    if len(sides) > 2 and not any(_symbols(side) for side in sides[1:]):  # m + n = 256 + 37 = 293
        return Named(name=_spaceless(sides[0]), value=_read(sides[-1]))
    if len(sides) == 2 and _is_name(sides[1]):
        return Named(name=_spaceless(sides[1]), value=_read(sides[0]))
    if not any(_symbols(side) for side in sides):  # a calculation: its end is the answer
        return _read(sides[0] if signs[-1] == "\\approx" and len(sides) == 2 else sides[-1])
    return Relation(sides=tuple(sides), signs=tuple("=" for _ in signs))


def _is_name(side: str) -> bool:
    if side in ("e", "i", "\\pi", "\\infty", "\\emptyset"):
        return False
    return bool(_NAME.fullmatch(side)) and side.lstrip("\\").split("(")[0].strip() not in FUNCTIONS


def _symbols(side: str) -> bool:
    """Whether a side holds a variable."""
    bare = re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", " ", side)
    return bool(re.search(r"[A-DF-Za-df-hj-z]", bare)) or bool(re.search(r"\\(?:theta|alpha|beta|lambda|phi)", side))


def _spaceless(text: str) -> str:
    return re.sub(r"\s+", "", text)


_BUILDER = re.compile(r"[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||:)\s*")


def _bracketed(text: str) -> Answer | None:
    opening = next((o for o in _OPEN if text.startswith(o)), None)
    closing = next((c for c in _CLOSE if text.endswith(c)), None)
    if opening is None or closing is None or not _wraps(text):
        return None
    inside = text[len(opening) : len(text) - len(closing)].strip()
    if opening == "\\{":
        if builder := _BUILDER.match(inside):
            inside = inside[builder.end() :]
            condition = _read(inside)
            if isinstance(condition, Relation | Named):
                return condition
        items = [item for item in parts(inside, _COMMA) if item.strip()] if inside else []
        return Group(brackets=SET, items=tuple(_read(item) for item in items))
    items = parts(inside, re.compile(r"\s*[,;]\s*"))
    if len(items) < 2:
        return _read(inside) if inside and (opening, closing) in (("(", ")"), ("[", "]")) else None
    if not all(item.strip() for item in items):
        return Unreadable(why="an empty item in brackets")
    brackets = ("(", ")") if opening == "\\langle" else (opening, closing)
    return Group(brackets=brackets, items=tuple(_read(item) for item in items))


def _wraps(text: str) -> bool:
    """Whether the first bracket closes at the very end."""
    depth = 0
    tokens = list(re.finditer(r"\\langle(?![A-Za-z])|\\rangle(?![A-Za-z])|\\[{}]|[()\[\]{}]", text))
    for token in tokens:
        depth += 1 if token.group() in ("\\langle", "\\{", "(", "[", "{") else -1
        if depth == 0:
            return token.end() == len(text)
    return False


def _matrix(text: str) -> Answer | None:
    match = re.fullmatch(
        r"(?:\\[{]|[\[(|])?\s*\\begin\{([pbvBV]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}\s*(?:\\[}]|[\])|])?",
        text,
        re.DOTALL,
    )
    if match is None:
        return None
    rows = [row for row in parts(match.group(2), re.compile(r"\s*\\\\\s*")) if row.strip()]
    cells = [[cell.strip() for cell in parts(row, re.compile(r"\s*&\s*"))] for row in rows]
    if not cells or not all(cell for row in cells for cell in row):
        return Unreadable(why="a matrix with empty cells")
    return Matrix(rows=tuple(tuple(_read(cell) for cell in row) for row in cells))


def _ratio(text: str) -> Answer | None:
    items = parts(text, re.compile(r"\s*:\s*|\s+to\s+(?=\d)|\s*\\text\{\s*to\s*\}\s*"))
    if len(items) < 2 or not all(re.search(r"[\dA-Za-z})]\s*$", i) and not _is_prose(i) for i in items):
        return None
    return Ratio(items=tuple(_read(item) for item in items))


def _plus_minus(text: str) -> Answer | None:
    if not re.search(r"\\[pm]{2}(?![A-Za-z])", text) or not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return None
    both = []
    for upper in (True, False):
        signs = {"\\pm": "+" if upper else "-", "\\mp": "-" if upper else "+"}
        one = re.sub(r"\\(?:pm|mp)(?![A-Za-z])", lambda m, signs=signs: signs[m.group()], text)
        both.append(_read(re.sub(r"^\s*\+\s*", "", one)))
    return Group(brackets=BARE, items=tuple(both))


def _leaf(text: str) -> Answer:
    unwrapped = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if re.fullmatch(r"\\emptyset|\{\}", text) or _NONE.fullmatch(unwrapped):
        return Group(brackets=SET, items=())
    if re.fullmatch(r"\\mathbb\{R\}|all real numbers|all reals", unwrapped, re.IGNORECASE):
        return Group(brackets=("(", ")"), items=(Expression(latex="-\\infty"), Expression(latex="\\infty")))
    if re.fullmatch(r"\\mathbb\{[ZNQC]\}(?:\^\{?[-+*\d]\}?|_\{?[-+*\d]\}?)?", unwrapped):  # k in Z: a set by its name
        return _text(unwrapped)
    if hole := _HOLE.fullmatch(text):
        point = Expression(latex=hole.group(1).strip())
        below, above = Expression(latex="-\\infty"), Expression(latex="\\infty")
        return Union(items=(Group(brackets=TUPLE, items=(below, point)), Group(brackets=TUPLE, items=(point, above))))
    if base := re.fullmatch(r"([0-9A-Fa-f]*\d[0-9A-Fa-f]*|\([0-9A-F]+\))_\{(?:\\text\{)?\s*(\w+)\s*\}?\}", text):
        return Expression(latex=base.group(1).strip("()"), base=_BASES.get(base.group(2), base.group(2)))
    if base := re.fullmatch(r"([0-9A-F]+)\s*(?:\\text\{)?\s*\(?\s*base\s+(\w+)\s*\)?\s*\}?", text):
        return Expression(latex=base.group(1), base=_BASES.get(base.group(2), base.group(2)))
    if modulus := _MODULUS.fullmatch(text):
        return Expression(latex=modulus.group(1).strip(), base=f"mod {modulus.group(2) or modulus.group(3)}")
    number, unit = units.split(text)
    if _is_prose(number) or (not re.search(r"\d", number) and "\\text{" in text and number == text):
        return _text(unwrapped)
    if not re.search(r"[\dA-Za-z]", number):
        return Unreadable(why="neither a number, nor a letter, nor a word")
    return Expression(latex=_grouped(number), unit=unit)


def _grouped(number: str) -> str:
    """Text without thousands separators."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number)


def _is_prose(text: str) -> bool:
    """Whether the text is words, and not symbols that are multiplied."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    bare = re.sub(r"\\begin\{[^{}]*\}|\\end\{[^{}]*\}|\\[A-Za-z]+(?:\{[A-Za-z]\})?|_\{[^{}]*\}", " ", bare)
    runs = [run for run in re.findall(r"[A-Za-z]+", bare) if run not in FUNCTIONS]
    if not runs:
        return False
    longest = max(len(run) for run in runs)
    if re.fullmatch(r"[A-Za-z][A-Za-z' .\-]*", bare.strip()):
        if len(runs) == 1 and longest == 3:
            return bool(re.search(r"[aeiou]", bare, re.IGNORECASE)) and "abc" not in bare.lower()
        return (
            longest >= 3 or (longest == 2 and bool(re.fullmatch(r"(?i)no|ok|up|pm|am", bare.strip()))) or len(runs) > 2
        )
    return longest >= 4 or (longest == 3 and not re.search(r"[=^\\+*/]", text))


def _text(words: str) -> Answer:
    plain = re.sub(r"[^\w\s.:/%+-]", " ", words.replace("\\", " ").replace("'", "")).casefold()
    plain = " ".join(word for word in plain.replace("-", " ").split() if word not in ("a", "an", "the")).strip(" .:")
    if not plain:
        return Unreadable(why="no words")
    if len(plain.split()) > _WORDS:
        return Unreadable(why=f"a text of more than {_WORDS} words")
    return Text(words=plain)
