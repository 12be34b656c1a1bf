r"""Splits an answer, in LaTeX or plain text, into tokens, with one spelling for whatever differs only in appearance.

Unicode signs, styling commands, spaces, thousands separators and delimiters of mathematics are gone after this step.
Words inside `\text{}` stay words; letters of mathematics become symbols. The time is linear in the length of the text.
"""

import re
from typing import NamedTuple

MAX_LENGTH = 2_000


class Unreadable(ValueError):
    """Raised if an answer cannot be read: it is too long or unbalanced, or does not follow the grammar."""


class Token(NamedTuple):
    """One token. `kind` is number, symbol, word, command, separator or sign; `written`: it is text, not mathematics."""

    kind: str
    text: str
    written: bool = False


_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "－": "-", "×": "\\times ", "✕": "\\times ",
    "÷": "\\div ", "·": "\\cdot ", "∙": "\\cdot ", "⋅": "\\cdot ", "∗": "*", "⁄": "/", "∕": "/", "√": "\\surd ",
    "∛": "\\cbrt ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ",
    "≡": "\\equiv ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ",
    "°": "\\degree ", "º": "\\degree ", "…": "\\ldots ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "％": "%",
    "＝": "=", "＋": "+", "（": "(", "）": ")", "，": ",", "：": ":", "；": ";", "．": ".", "∶": ":",
    "′": "'", "’": "'",
    "€": "\\currency{euro}", "£": "\\currency{pound}", "¥": "\\currency{yen}", "¢": "\\text{ cents}", "⟨": "\\langle ",
    "⟩": "\\rangle ", "∠": "\\angle ", "∖": "\\setminus ", "ℎ": "h", "ⅈ": "i", "∣": "|",
    "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "\u200b": "", "\u2060": "", "\ufeff": "",
}  # fmt: skip
_GREEK_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
_GREEK_WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
_GREEK = dict(zip(_GREEK_LETTERS, _GREEK_WORDS.split(), strict=True))
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
    "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_TABLE = str.maketrans(
    _SIGNS
    | {sign: f"\\{name} " for sign, name in _GREEK.items()}
    | {sign: f"\\frac{{{top}}}{{{bottom}}}" for sign, (top, bottom) in _VULGAR.items()}
    | dict(zip("０１２３４５６７８９", "0123456789", strict=True))
)

# Separators that only separate thousands, and those that may also be a list's comma or a space.
_THIN = r"(?:,\\!(?:\s|\\\s)?|\{,\}|\\text\{,\}|\\[,:; ]|~)"
_LOOSE = r"(?:,\\!(?:\s|\\\s)?|\{,\}|\\text\{,\}|\\[,:; ]|~|,|\x20)"
_GROUPS = {
    loose: re.compile(rf"(?<![0-9.])[0-9]{{1,3}}(?:{separator}[0-9]{{3}})+(?![0-9])")
    for loose, separator in ((False, _THIN), (True, _LOOSE))
}
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_LEXEME = re.compile(
    r"\\(?P<environment>begin|end)\s*\{(?P<name>\w+\*?)\}(?:\{[clr|]*\})?"
    r"|\\(?P<command>[A-Za-z]+)"
    r"|\\(?P<escaped>.)"
    r"|(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+(?![\w.]))?|\.[0-9]+)"
    r"|(?P<letters>[^\W\d_]+)"
    r"|(?P<power>\*\*)|(?P<compare><=|>=|!=|==)"
    r"|(?P<space>\s+)|(?P<sign>.)",
    re.DOTALL,
)

_TEXT = {"text", "mbox", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "hbox", "emph", "textup"}
_ROMAN = {"mathrm", "operatorname", "rm", "mathsf", "mathtt"}
_DROPPED = {
    "left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "Biggl", "Biggr",
    "displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "quad", "qquad", "bf", "it", "em", "large",
    "Large", "LARGE", "huge", "Huge", "small", "normalsize", "tiny", "boldsymbol", "mathbf", "mathit", "mathcal",
    "bm", "pmb", "underline", "boxed", "fbox", "ensuremath", "bold", "mathnormal", "middle", "hfill", "enspace",
    "thinspace", "negthinspace", "space", "nobreak", "allowbreak", "mathop", "mathopen", "mathclose", "mathbin",
    "bfseries", "itshape", "centering", "therefore", "implies", "Rightarrow", "boxtext", "mathstrut", "strut",
    "scriptsize", "footnotesize", "bbox", "tt", "sf", "sc", "nonumber", "hskip", "mathord", "mathrel",
}  # fmt: skip
_LAYOUT = {"aligned", "align", "align*", "equation", "equation*", "gather", "gather*", "gathered", "split", "center"}
_ARGUMENT_DROPPED = {
    "color", "textcolor", "colorbox", "hspace", "vspace", "phantom", "hphantom", "vphantom", "label", "tag",
}  # fmt: skip
_ALIASES = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le",
    "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "lbrace": "{", "rbrace": "}",
    "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "ast": "*", "times": "*", "cdot": "*", "bullet": "*",
    "cdotp": "*", "div": "/", "colon": ":", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots",
    "infin": "infty", "varnothing": "emptyset", "varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta",
    "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "prime": "'", "land": "and", "lor": "or",
    "wedge": "and", "vee": "or", "backslash": "setminus", "iff": "equiv", "simeq": "approx", "sim": "approx",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "measuredangle": "angle", "bar": "overline",
}  # fmt: skip
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp",
    "sqrt", "gcd", "lcm", "min", "max", "abs",
}  # fmt: skip
_PLAIN = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "cbrt": "cbrt", "sqrt": "surd", "infinity": "infty",
    "inf": "infty",
}  # fmt: skip
_GREEK_NAMES = set(_GREEK.values())
# Names that are read as one symbol even without a backslash; shorter Greek names are products of letters.
_SPELLED = {"pi", "theta", "alpha", "beta", "gamma", "lambda", "sigma", "omega"}
_NUMBER_WORDS = {"percent": "%", "percents": "%", "degree": "degree", "degrees": "degree"}
UNITS = {
    "cm", "mm", "km", "kg", "mg", "ml", "in", "ft", "yd", "mi", "lb", "lbs", "oz", "hr", "hrs", "sec", "secs", "min",
    "mins", "mph", "kph", "kmh", "sq", "cents", "cent", "dm", "nm", "hz", "rad", "deg", "day", "days", "hour", "hours",
    "inch", "unit", "units", "am", "pm", "cc", "usd", "feet", "foot", "year", "years", "mile", "miles", "men", "cubic",
    "square", "per",
}  # fmt: skip
_UNIT_LETTERS = set("mgshlLJNWV")
_ANSWERS = {
    "yes", "no", "true", "false", "odd", "even", "none", "all", "red", "if", "is", "not", "for", "than", "the", "so",
    "to",
}  # fmt: skip


_STYLE = r"\\(?:text|textrm|mathrm|mbox|rm)\{\s*"
# A unit as a fraction of words: \frac{\text{m}}{\text{s}^2}.
_WORDS = rf"\{{\s*{_STYLE}([a-z ]{{1,30}})\}}"
_RATE = re.compile(rf"\\[dt]?frac\s*{_WORDS}\s*\}}\s*{_WORDS}(\s*\^\s*\{{?[23]\}}?)?\s*\}}")
_ORDINAL = re.compile(
    rf"(?<=[0-9])(?:\^\{{{_STYLE}(?:st|nd|rd|th)\s*\}}\}}|\^\{{\s*(?:st|nd|rd|th)\s*\}}|\^?{_STYLE}(?:st|nd|rd|th)\s*\}}"
    r"|(?:st|nd|rd|th)(?![A-Za-z]))"
)
_MODULUS = re.compile(r"\(\s*\\?(?:text\{\s*)?mod(?:\s*\})?[\s~]*([0-9]{1,9})\s*\)")
_TEMPERATURE = re.compile(rf"\\degree\s*(?:{_STYLE}([CFK])\s*\}}|([CFK])(?![A-Za-z]))")
# The letter x as a multiplication sign: 1.6 x 10^8.
_TIMES = re.compile(r"(?<=[0-9])(\s{0,3})[xX](?=\s{0,3}10\s?(?:\^|\*\*))")
_DOTS = re.compile(r"\.\s?\.\s?\.")
_BRACED_SIGN = re.compile(r"\{\s*([,:;])\s*\}")


def translate(text: str) -> str:
    """Returns the text with Unicode signs spelled in LaTeX."""
    for signs, mark in ((_RAISED, "^"), (_LOWERED, "_")):
        run = f"[{''.join(signs)}]+"
        text = re.sub(run, lambda found: f"{mark}{{{''.join(signs[c] for c in found[0])}}}", text)  # noqa: B023
    text = _DEGREE.sub(r"\\degree ", text.translate(_TABLE))
    text = _RATE.sub(r"\\text{\1/\2}\3", text)
    text = _TIMES.sub(r"\1\\times ", _DOTS.sub(r"\\ldots ", _ORDINAL.sub("", text)))
    return _TEMPERATURE.sub(r"\\degree ", _MODULUS.sub(r"\\pmod{\1}", text))


def tokenize(text: str, loose: bool = True) -> list[Token]:
    """Returns the tokens of an answer.

    Args:
      loose: "1,000" and "1 000" are one number; otherwise a plain comma or space always separates.

    Raises Unreadable for a text of more than `MAX_LENGTH` characters, and for braces that do not match.
    """
    if len(text) > MAX_LENGTH:
        raise Unreadable("too long")
    text = translate(text)
    if loose or not re.search(r"\d,0\d", text):
        text = _GROUPS[loose].sub(lambda number: re.sub(r"\\text|\D", "", number[0]), text)
    return _Lexer(_BRACED_SIGN.sub(r"\1", text)).run()


class _Lexer:
    """Walks over the text with a stack of open braces, which knows those that only hold text."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[Token] = []
        self.braces: list[str] = []
        self.waiting = ""  # what the next brace opens: "text", "roman", or "" for a group

    def run(self) -> list[Token]:
        position = 0
        while position < len(self.text):
            found = _LEXEME.match(self.text, position)
            position = found.end()
            if found["environment"] and found["name"] not in _LAYOUT:
                self.add("command", f"{found['environment']}:{found['name']}")
            elif found["command"]:
                position = self.command(found["command"], position)
            elif found["escaped"]:
                self.escaped(found["escaped"])
            elif found["number"]:
                self.add("number", found["number"])
            elif found["letters"]:
                self.letters(found["letters"])
            elif found["power"]:
                self.add("sign", "^")
            elif found["compare"]:
                self.add(*{"<=": ("command", "le"), ">=": ("command", "ge"), "!=": ("command", "ne")}.get(
                    found["compare"], ("sign", "=")
                ))  # fmt: skip
            elif found["sign"]:
                self.sign(found["sign"])
        if self.braces:
            raise Unreadable("a brace never closes")
        return self.tokens

    def add(self, kind: str, text: str) -> None:
        self.tokens.append(Token(kind, text, "text" in self.braces))

    def command(self, name: str, position: int) -> int:
        """Reads a command and returns the position to continue from, which is after any argument without meaning."""
        name = _ALIASES.get(name, name)
        if name in _TEXT or name in _ROMAN:
            self.waiting = "text" if name in _TEXT else "roman"
        elif name in _DROPPED:
            point = re.match(r"\s*\.", self.text[position : position + 4]) if name in ("left", "right") else None
            return position + point.end() if point else position
        elif name in _ARGUMENT_DROPPED:
            argument = re.compile(r"\s*\{[^{}]*\}").match(self.text, position)
            return argument.end() if argument else position
        elif name == "currency":
            unit = re.compile(r"\{(\w+)\}").match(self.text, position)
            self.add("command", f"currency:{unit[1] if unit else ''}")
            return unit.end() if unit else position
        elif name in ("mathbb", "Bbb"):
            letter = re.compile(r"\s*\{?\s*([A-Z])\s*\}?").match(self.text, position)
            if letter is None:
                raise Unreadable(name)
            self.add("command", f"set:{letter[1]}")
            return letter.end()
        elif name in ("and", "or"):
            self.add("separator", name)
        elif name in _GREEK_NAMES and name != "pi":
            self.add("symbol", name)
        elif name in ("{", "}"):
            self.add("command", f"\\{name}")
        elif len(name) == 1 and not name.isalpha():
            self.add("sign", name)
        else:
            self.add("command", name)
        return position

    def escaped(self, character: str) -> None:
        if character in "{}":
            self.add("command", f"\\{character}")
        elif character == "$":
            self.add("command", "currency:dollar")
        elif character == "|":
            self.add("sign", "|")
        elif character in "%&#":
            self.add("sign", character)
        elif character == "\\":
            self.add("command", "\\")
        elif character not in ",;:! ()[]\n\t":
            raise Unreadable(f"\\{character}")

    def sign(self, character: str) -> None:
        if character == "{":
            self.braces.append(self.waiting or "group")
            self.waiting = ""
            if self.braces[-1] == "group":
                self.add("sign", "{")
        elif character == "}":
            if not self.braces:
                raise Unreadable("a brace never opens")
            if self.braces.pop() == "group":
                self.add("sign", "}")
        elif character not in "$~`":
            self.add("sign", character)

    def letters(self, run: str) -> None:
        small = run.lower()
        roman = bool(self.braces) and self.braces[-1] in ("text", "roman")
        if self.waiting:  # \rm x
            roman, self.waiting = True, ""
        if small in ("and", "or"):
            self.add("separator", small)
        elif small in _NUMBER_WORDS:
            word = _NUMBER_WORDS[small]
            self.add("sign" if word == "%" else "command", word)
        elif run in FUNCTIONS or run in _PLAIN or run == "pi":
            is_unit = run in UNITS and roman  # \text{min}
            self.add("word", run) if is_unit else self.add("command", _PLAIN.get(run, run))
        elif len(run) == 1 or (run in _SPELLED and not roman):
            is_unit = run in _UNIT_LETTERS and roman  # \mathrm{m}
            self.tokens.append(Token("symbol", run, is_unit or "text" in self.braces))
        elif roman or len(run) > 3 or small in UNITS or small in _ANSWERS:
            self.tokens.append(Token("word", run, True))
        else:
            for letter in run:
                self.add("symbol", letter)


def flat(tokens: list[Token]) -> str:
    """Returns one string for the tokens, without spaces; words in lower case."""
    return "".join(token.text.lower() if token.kind == "word" else token.text for token in tokens if token.text != "")
