"""One spelling for the many notations of LaTeX, Unicode and plain text. Pure text in, text out."""

import re
import unicodedata
from functools import cache

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ", "π": "\\pi ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\neq ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "∅": "\\emptyset ", "ø": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ", "°": "\\degree ",
    "º": "\\degree ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}", "⟨": "\\langle ", "⟩": "\\rangle ", "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}",
    "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}",
    "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "μ": "\\mu ",
    "ω": "\\omega ", "φ": "\\phi ", "σ": "\\sigma ", "ρ": "\\rho ", "Δ": "\\Delta ", "δ": "\\delta ",
    "ε": "\\epsilon ", "∶": ":", "，": ",", "（": "(", "）": ")", "：": ":", "；": ";", "％": "%", "\u00a0": " ",
    "。": ".", "∕": "/", "⁄": "/", "∖": "\\setminus ", "∉": "\\notin ", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SAME = {
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "ne": "neq", "lt": "<", "gt": ">", "dfrac": "frac",
    "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "varnothing": "emptyset",
    "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|", "cdotp": "cdot", "ast": "cdot", "wedge": "land", "vee": "lor",
    "sim": "approx", "simeq": "approx", "varepsilon": "epsilon", "varphi": "phi", "R": "mathbb{R}",
    "smallsetminus": "setminus", "backslash": "setminus", "textdegree": "degree",
    "degrees": "degree", "percent": "%", "euro": "€", "pounds": "£",
}  # fmt: skip
FUNCTIONS = frozenset(
    re.findall(
        r"\w+", "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log lg exp gcd lcm min max det"
    )
)
_WORDS = {
    "pi": "\\pi ", "infinity": "\\infty ", "inf": "\\infty ", "oo": "\\infty ", "theta": "\\theta ",
    "alpha": "\\alpha ", "beta": "\\beta ", "gamma": "\\gamma ", "lambda": "\\lambda ", "omega": "\\omega ",
    "phi": "\\phi ", "union": "\\cup ", "degrees": "\\degree ", "degree": "\\degree ", "percent": "\\% ",
    "percentage": "\\% ",
}  # fmt: skip
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|md|up)?|math(?:rm|it|bf|sf|tt|cal|scr|frak|normal)|mbox|hbox|operatorname\*?"
    r"|boldsymbol|bm|rm|bf|emph|underline)\s*\{((?:[^{}]|\^\s*\{-?\d+\})*)\}"
)
_UNITS = frozenset("msgLNJWVAKC")  # single letters that are units where they stand upright behind a number
_NOTHING = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|rm|bf)(?![A-Za-z])"
)
_SPACE = re.compile(r"(?<!\\)\\(?:[,;: ]|quad|qquad|thinspace|enspace|hspace\*?\{[^{}]*\}|hfill|newline)(?![A-Za-z])|~")
_THOUSANDS = re.compile(r"(?<![\w.,\\^/{ ])[1-9]\d{0,2}(?: \d{3})+(?![\w,^/]| \d|\s*/)")  # 10 000; not 2 125/1000
_NUMBER = r"\d+(?:\.\d+)?|\.\d+"


def canonical(text: str) -> str:
    r"""`text` in canonical spelling, e.g. `$\dfrac12\,$` as `\frac{1}{2}` and `sqrt(5)` as `\sqrt{5}`."""
    text = _undollared(_unicode(text).strip())
    text = re.sub(r"\\\\\s*\[-?[\d.]+\s*(?:pt|em|ex|mm|cm)\]", r"\\\\", text)
    text = re.sub(r"(?<!\\)\\(\(|\)|\[|\])", " ", text)
    text = _NOTHING.sub("", text).replace("\\!", "")
    text = re.sub(r"(?<=\d)(?:\\,|\{,\}|,\\,|\{,\\,\})(?=\d{3}(?!\d))", ",", text)
    text = _SPACE.sub(" ", text)
    text = _THOUSANDS.sub(lambda m: m.group().replace(" ", ","), text)
    text = re.sub(r"\\([A-Za-z]+)(?![A-Za-z])", _renamed, text)
    text = _worded(_texts(text))
    text = re.sub(r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?", r"\\degree ", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    text = _operators(text)
    text = _arguments(_repeating(text))
    return _trimmed(text)


def _unicode(text: str) -> str:
    text = re.sub("[∛∜]", lambda m: "\\sqrt[3]" if m.group() == "∛" else "\\sqrt[4]", text)
    text = re.sub(r"√\s*\(", r"\\sqrt(", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", "\\sqrt ")
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda m: "^{" + "".join(_RAISED[c] for c in m.group()) + "}", text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda m: "_{" + "".join(_LOWERED[c] for c in m.group()) + "}", text)
    return "".join(c if c.isascii() else _SIGNS.get(c) or _other(c) for c in text)


@cache
def _other(sign: str) -> str:
    """Spelling of a character by its properties in Unicode: `−` and all dashes are `-`, `⅚` a fraction, `５` is 5."""
    kind, wide, name = unicodedata.category(sign), unicodedata.normalize("NFKC", sign), unicodedata.name(sign, "")
    if sign == "µ":  # of units; the letter is another character
        return sign
    if kind == "Nd":
        return str(unicodedata.digit(sign))
    if kind in ("Pd", "Zs", "Cf"):
        return {"Pd": "-", "Zs": " ", "Cf": ""}[kind]
    if parts := re.fullmatch(r"(\d+)\u2044(\d+)", wide):
        return f"\\frac{{{parts[1]}}}{{{parts[2]}}}"
    if wide.isascii():
        return wide
    if wide != sign:  # letters of mathematical alphabets
        return "".join(c if c.isascii() else _SIGNS.get(c) or _other(c) for c in wide)
    if greek := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (?:FINAL )?([A-Z]+)", name):
        letter = greek[2].lower().replace("lamda", "lambda")
        return f"\\{letter if greek[1] == 'SMALL' else letter.title()} "
    return sign


def _undollared(text: str) -> str:
    r"""Text without the `$` that delimit math; a dollar sign before money becomes `\$`."""
    plain = re.findall(r"(?<!\\)\$", text)
    if len(plain) == 1:
        return re.sub(r"(?<!\\)\$(?=\s*[\d.])", r"\\$", text).replace("$", "\\$").replace("\\\\$", "\\$")
    if len(plain) > 1 and re.fullmatch(r"\$[\d.,]+(?:\s*(?:,|and|or|;)\s*\$[\d.,]+)+", text):
        return text.replace("$", "\\$")
    return re.sub(r"(?<!\\)\$", " ", text)


def _renamed(command: re.Match[str]) -> str:
    name = command.group(1)
    if name not in _SAME:
        return command.group()
    new = _SAME[name]
    return {"<": "<", ">": ">", "|": "|", "[": "[", "]": "]", "€": "€", "£": "£"}.get(new, "\\" + new) + (
        " " if new.isalpha() else ""
    )


def _texts(text: str) -> str:
    """Fonts as `\\text{...}`; names of functions as commands; a single letter as itself."""
    if listed := re.fullmatch(
        r"\\text\{((?:[-+]?\d[\d.,/]*\s*)(?:(?:,|and|or|,\s*and|,\s*or)\s*[-+]?\d[\d.,/]*\s*)+)\}", text
    ):
        return listed.group(1)

    def one(font: re.Match[str]) -> str:
        inside = re.sub(r"\^\s*\{(-?\d+)\}", r"^\1", font.group(1))
        before_call = re.match(r"\s*[({_\\]", font.string[font.end() :])
        word = inside.strip()
        if word and not re.search(r"[^\W\d_]", word):
            return inside
        if word in FUNCTIONS and (word not in ("min", "sec") or before_call):
            return f"\\{word} "
        if word.lower() in ("percent", "percentage", "pct", "%", "\\%"):
            return "\\% "
        if word.lower() in ("degree", "degrees", "deg"):
            return "\\degree "
        if counted := re.fullmatch(r"\s*([-+]?\d[\d.,]*)\s+(\D+)", inside):
            return f"{counted.group(1)}\\text{{ {counted.group(2)}}}"
        math = font.group().startswith(("\\math", "\\operatorname", "\\bold", "\\bm"))
        if (
            font.group().startswith("\\mathrm")
            and word in _UNITS
            and re.search(r"[\d}/]\s*$", font.string[: font.start()])
        ):
            return f"\\text{{{word}}}"
        if len(word) == 1 and word.isalpha() and math and not inside.startswith(" "):
            return word
        return f"\\text{{{inside}}}"

    before = ""
    while before != text:
        before = text
        text = _FONT.sub(one, text)
    return text


_WORD = re.compile(r"\\text\{[^{}]*\}|(?<![\\A-Za-z])[^\W\d_]*[^\W\d_\x00-\x7f][^\W\d_]*")


def _worded(text: str) -> str:
    """Words of letters beyond ASCII as `\\text{...}`: 星期二, Bézier."""
    return _WORD.sub(lambda m: m.group() if m.group().startswith("\\text{") else f"\\text{{{m.group()}}}", text)


def _operators(text: str) -> str:
    """Plain `**`, `*`, `<=`, `sqrt(2)`, `pi`, `1e-5` as LaTeX; the content of `\\text{}` is left alone."""
    return "".join(
        part if part.startswith("\\text{") else _plain(part) for part in re.split(r"(\\text\{[^{}]*\})", text)
    )


def _plain(text: str) -> str:
    text = text.replace("**", "^").replace("*", "\\cdot ")
    text = text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\neq ").replace("==", "=")
    text = re.sub(rf"({_NUMBER})[eE]([+-]?\d+)(?![\dA-Za-z.])", r"\1\\times 10^{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt", text)
    functions = "|".join(sorted(FUNCTIONS, key=len, reverse=True))
    text = re.sub(rf"(?<![A-Za-z\\])({functions})(?=\s*[(^\d]|\s+[a-zA-Z\\](?![A-Za-z]))", r"\\\1 ", text)
    return re.sub(r"(?<![A-Za-z\\{])([A-Za-z]+)(?![A-Za-z}])", lambda m: _WORDS.get(m.group(1), m.group(1)), text)


def _repeating(text: str) -> str:
    """`0.1\\overline{6}` as a fraction."""

    def fraction(match: re.Match[str]) -> str:
        whole, fixed, period = match.group(1) or "0", match.group(2), match.group(3)
        low = int(whole + fixed or "0")
        return f"\\frac{{{int(whole + fixed + period) - low}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"

    return re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", fraction, text)


def _arguments(text: str) -> str:
    """Braces around every argument: `\\frac12`, `\\sqrt5`, `x^10`, `x^(1/2)`, `\\sqrt(x+1)`."""
    out, at = [], 0
    pattern = re.compile(r"\\text\{[^{}]*\}|\\frac(?![A-Za-z])|\\sqrt(?![A-Za-z])|\\binom(?![A-Za-z])|\^|_")
    while match := pattern.search(text, at):
        out.append(text[at : match.end()])
        at = match.end()
        if match.group().startswith("\\text"):
            continue
        root = re.match(r"\s*\[[^\[\]]*\]", text[at:]) if match.group() == "\\sqrt" else None
        if root:
            out.append(root.group().strip())
            at += root.end()
        for _ in range(2 if match.group() in ("\\frac", "\\binom") else 1):
            argument, at = _argument(text, at, match.group())
            out.append(f"{{{_arguments(argument)}}}")
    return "".join([*out, text[at:]])


def _argument(text: str, at: int, command: str) -> tuple[str, int]:
    """The argument of `command` that begins at `at`, without its braces, and where it ends."""
    while at < len(text) and text[at] == " ":
        at += 1
    if at >= len(text):
        return "", at
    if text[at] == "{" or (text[at] == "(" and command in ("\\sqrt", "^")):
        end = closing(text, at)
        if end > 0:
            return text[at + 1 : end], end + 1
    one = r"\\[A-Za-z]+(?:\{[^{}]*\})*|-?\d+|-?[A-Za-z]" if command in ("^", "\\sqrt") else r"\\[A-Za-z]+|\d|[A-Za-z]"
    match = re.compile(one if command != "_" else r"\d+|[A-Za-z]|\\[A-Za-z]+").match(text, at)
    if match is None:
        return text[at], at + 1
    return match.group(), match.end()


def closing(text: str, at: int) -> int:
    """Position where the bracket that opens at `at` is closed; -1 if never. Escaped braces do not count as braces."""
    pairs, depth, i = {"{": "}", "(": ")", "[": "]"}, 0, at
    opening, end = text[at], pairs[text[at]]
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == opening) - (text[i] == end)
        if depth == 0:
            return i
        i += 1
    return -1


def _trimmed(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    before = ""
    while before != text:
        before = text
        text = re.sub(r"(?:(?<!\\)[.,;:?]|\\\\)+$", "", text).strip().strip('`"*').strip()
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
    return text
