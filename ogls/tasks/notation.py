"""The ways of writing one answer become one way: symbols, markdown, wrappers, brackets, lists."""

from __future__ import annotations

import re
import unicodedata

# ---- one way of writing: `clean` ----

_SYMBOL_NAMES = r"""
00d7:\times 00b7:\cdot 22c5:\cdot 2219:\cdot 00b1:\pm 2213:\mp 2264:\le 2265:\ge 2260:\ne 2248:\approx 221e:\infty
222a:\cup 2229:\cap 2208:\in 2205:\emptyset 2218:\circ 03c0:\pi 03b1:\alpha 03b2:\beta 03b3:\gamma 03b4:\delta
03b8:\theta 03bb:\lambda 03bc:\mu 00b5:\mu 03c6:\phi 2220:\angle 211d:\mathbb{R} 2124:\mathbb{Z} 2115:\mathbb{N}
00b0:^{\circ} 00ba:^{\circ} 2103:^{\circ}C 2109:^{\circ}F 221b:\sqrt[3] 2215:/ 2044:/ 00f7:/ 2236:: 2019:' 2032:'
2026:\ldots
"""
_HYPHENS, _BLANKS = "\u2212\u2013\u2014\u2010\u2011\ufe63", "\u00a0\u2002\u2003\u2009\u200a\u202f\u3000"
_NOTHING = "\u200b\u2060\ufeff\u20ac\u00a3\u00a5\u20b9"  # nothing to see, and currencies
_FRACTIONS = {  # one half is U+00BD, which Unicode takes apart into 1, a slash and 2
    chr(code): r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKD", chr(code)).split("\u2044"))
    for code in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F))
}
_SYMBOLS = {chr(int(row[:4], 16)): row[5:] + " " * row[-1].isalpha() for row in _SYMBOL_NAMES.split()}
_TABLE = str.maketrans(
    dict.fromkeys(_HYPHENS, "-")
    | dict.fromkeys(_BLANKS, " ")
    | dict.fromkeys(_NOTHING, "")
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    | _SYMBOLS
    | _FRACTIONS
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f"
_LOWERED = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"
_RAISED_TABLE, _LOWERED_TABLE = str.maketrans(_RAISED, "0123456789+-n"), str.maketrans(_LOWERED, "0123456789")
_SCRIPT = re.compile(f"[{_RAISED}]+|[{_LOWERED}]+")
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9.]+|\\?[A-Za-z]+)?)")


def vocabulary(words: str) -> frozenset[str]:
    """Returns the words of a text as a set."""
    return frozenset(words.split())


FUNCTIONS = vocabulary(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt min max gcd lcm det arg"
)
"""Names that are mathematics although they look like words."""
_CONSTANTS = {"pi": r"\pi", "infinity": r"\infty", "infty": r"\infty", "theta": r"\theta", "percent": "%", "pct": "%"}
_CONSTANTS |= {"percentage": "%"}
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|operatorname\*?|mbox|hbox|boldsymbol|bm|bold|emph)"
    r"(?:\s*\{((?:[^{}]|\{[^{}]*\})*)\}|\s+([A-Za-z])\b)"
)
_RM = re.compile(r"\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}")
_COMMAND_NAMES = r"""
\leqslant:\le \geqslant:\ge \leq:\le \geq:\ge \neq:\ne \lt:< \gt:> \lbrace:\{ \rbrace:\} \%:% \degree:^{\circ} \colon::
\imath:i \simeq:\approx \uppi:\pi \lparen:( \rparen:) \varnothing:\emptyset \cdotp:\cdot \dfrac:\frac \tfrac:\frac
\cfrac:\frac
"""
_SPACES = r"\, \; \: \quad \qquad \thinspace \enspace"
_SILENT = r"""
\! \$ \( \) \[ \] \left \right \bigl \bigr \big \Big \Bigl \Bigr \displaystyle \textstyle \limits \nolimits
\therefore \implies \Rightarrow \Longrightarrow \textdollar
"""
_COMMANDS = (
    {
        name: latex + " " * (latex[-1].isalpha() and latex != r"\frac")
        for name, _, latex in (row.partition(":") for row in _COMMAND_NAMES.split())
    }
    | dict.fromkeys((*_SPACES.split(), "\\ "), " ")
    | dict.fromkeys(_SILENT.split(), "")
    | {r"\lor": " or ", r"\vee": " or ", r"\land": " and ", r"\wedge": " and "}
)
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_BOLD = re.compile(r"(?<!\S)(\*\*|__)([^*_\s]+)\1(?=$|[\s.,;:])")
_MARKS = ("**", "__", "*", "_", "`", '"', "'")
_LEADING = re.compile(
    r"(?:\\text\{)?\s*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result|solution|total|sum|value)s?"
    r"\s*(?:(?:is|are)\b\s*[:=]?|[:=])\s*\}?\s*[:=]?",
    re.IGNORECASE,
)
_CURRENCY = re.compile(r"^(?:US|USD|EUR|GBP|INR|CAD|AUD|Rs\.?)\s*(?=[\d.])")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\{?\s*(?:\\text\{)?(?:st|nd|rd|th)\}?\}?$")
_ASCII = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", ":=": "=", "==": "=", "...": r"\ldots "}
_ASCII_SIGN = re.compile("|".join(map(re.escape, _ASCII)))


def clean(answer: str) -> str:
    """Returns the answer in LaTeX without ornaments: what remains in ``\\text{...}`` is words and nothing else."""
    text = answer.translate(_TABLE)
    if not text.isascii():
        text = _SCRIPT.sub(_script, _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3] or ''}}}", text))
    if "\\" in text or "~" in text or "$" in text or "{" in text:
        text = _COMMAND.sub(lambda m: _COMMANDS.get(m[0], m[0]), text)
        text = text.replace("~", " ").replace("$", "").replace("{,}", ",")
        for _ in range(3):  # one wrapper may hold another
            unwrapped = _WRAPPER.sub(_unwrapped, _RM.sub(_unwrapped, text))
            if unwrapped == text:
                break
            text = unwrapped
    text = _BOLD.sub(r"\2", _ASCII_SIGN.sub(lambda m: _ASCII[m[0]], text))
    return _SQRT.sub(r"\\sqrt{\1}", _WORD.sub(_named, _bare(text))) if not text.isdigit() else text


_SQRT = re.compile(r"\\sqrt\s*\(([^()]*)\)")


def _script(found: re.Match[str]) -> str:
    raised = found[0][0] in _RAISED
    return f"^{{{found[0].translate(_RAISED_TABLE)}}}" if raised else f"_{{{found[0].translate(_LOWERED_TABLE)}}}"


def _unwrapped(found: re.Match[str]) -> str:
    inside = (found[1] or found[2] or "").strip() if found.re is _WRAPPER else found[1].strip()
    if inside.casefold().strip(", ") in ("and", "or"):
        return f" {inside.casefold()} "
    if _WORDS_ONLY.fullmatch(inside) and inside not in FUNCTIONS and (len(inside) > 1 or inside in LETTER_UNITS):
        return rf"\text{{{inside}}}"
    if _UNIT_FORMULA.fullmatch(inside):  # m/s^2 stays upright
        return _LETTERS.sub(r"\\text{\g<0>}", inside)
    return inside if len(inside) == 1 else f" {inside} "


LETTER_UNITS = frozenset("mgshlLtNJWVAKCF")
"""Letters that may be a unit where they are upright or stand apart."""
_WORDS_ONLY = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'/-])*")
_LETTERS = re.compile(r"[A-Za-z]+")
_UNIT_FORMULA = re.compile(r"[A-Za-z ./]*(?:\^(?:\{-?[1-4]\}|[1-4])[A-Za-z ./]*)+")
_WORD = re.compile(r"\\text\{[^{}]*\}|\\?[A-Za-z]+")


def _named(found: re.Match[str]) -> str:
    word = found[0]
    if word in FUNCTIONS:
        return "\\" + word
    return _CONSTANTS.get(word, _CONSTANTS.get(word[6:-1], word) if word.startswith(r"\text{") else word)


def _bare(text: str) -> str:
    """Returns the text without marks around it, punctuation at its end, "=" or "the answer is" at its beginning."""
    while True:
        before, text = text, text.strip()
        for mark in _MARKS:
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)]
        text = text.rstrip(".,;:\\ ")
        text = text.removeprefix("=").removeprefix(":").removeprefix(r"\approx ").removesuffix("=")
        text = _ORDINAL.sub("", _CURRENCY.sub("", text))
        leading = _LEADING.match(text)
        if leading and leading.end() < len(text):
            text = text[leading.end() :]
        if text == before:
            return text


# ---- parts: `split` ----

_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|[^\W\d_]+|[0-9]+|\s+|.", re.DOTALL)
_OPENING = frozenset(("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin"))
_CLOSING = frozenset((")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end"))
LIST_SEPARATORS = frozenset((",", ";", "and", "or", r"\\"))


def tokens_of(text: str) -> list[str]:
    r"""Returns the tokens: commands, words in ``\text{...}``, runs of letters, digits, spaces, and other signs."""
    return _TOKEN.findall(text)


def split(text: str, separators: frozenset[str], thousands: bool = False) -> list[str]:
    """Returns the parts between separators that no bracket encloses; with `thousands` the comma of 1,234 is none."""
    tokens, parts, depth = tokens_of(text), [""], 0
    for i, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth < 0:
            return [text]
        if depth == 0 and token in separators and not (thousands and token == "," and _groups(tokens, i)):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _groups(tokens: list[str], comma: int) -> bool:
    before, after = tokens[comma - 1 : comma], tokens[comma + 1 : comma + 2]
    return bool(before and after and before[0].isdigit() and len(before[0]) <= 3 and re.fullmatch(r"\d{3}", after[0]))


def enclosed(text: str) -> tuple[str, str]:
    r"""Returns the bracket around all of it, ``(``, ``{`` or ``\{``, and what it holds; for none, "" and the text."""
    tokens = tokens_of(text)
    pairs = {"(": (")", "("), "{": ("}", "{"), r"\{": (r"\}", r"\{"), r"\langle": (r"\rangle", "(")}
    if len(tokens) < 2 or tokens[0] not in pairs or tokens[-1] != pairs[tokens[0]][0]:
        return "", text
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and i < len(tokens) - 1:
            return "", text
    return pairs[tokens[0]][1], "".join(tokens[1:-1]).strip()
