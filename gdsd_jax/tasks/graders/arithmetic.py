r"""Arithmetic in an answer of Countdown, however it is written: `(3)(5) + 7`, `3 \times 5 + 7 = 22`, `22 = 3*5+7`.

An answer is untrusted text. A small parser reads it and computes it in exact fractions. Text that the parser does not
know, or finds too long, is no expression. One expression is an answer; two are not, even if both are right.
"""

import operator
import re
from fractions import Fraction

from gdsd_jax.tasks.graders import extract
from gdsd_jax.tasks.graders.tokens import translate

# Longer answers are unusable. The bound also limits the digits of every integer in the computation.
MAX_EXPRESSION = 1000
# Longer answers, with the words around an expression, are not read.
MAX_ANSWER = 4 * MAX_EXPRESSION

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}
# Numbers as in Python: an integer does not start with 0, and a decimal may lack the digits on either side of its point.
_TOKEN = re.compile(
    r"(?P<number>(?:0+|[1-9][0-9]*)(?![0-9.])|[0-9]+\.[0-9]*|\.[0-9]+)|(?P<symbol>[-+*/()])|[ \t\f]+|(?P<line>[\r\n]+)"
)


def compute(expression: str) -> Fraction | None:
    """Returns the exact value of an arithmetic expression, or None if the text is none.

    An expression has numbers, signs, + - * / and parentheses, with Python's precedence, but neither `**` nor `//`. A
    line break is allowed only inside parentheses. Two stacks replace recursion, so that no nesting is too deep. The
    value is None for a division by zero, and for more than `MAX_EXPRESSION` characters.
    """
    expression = expression.strip()
    if len(expression) > MAX_EXPRESSION:
        return None
    values: list[Fraction] = []
    pending: list[str] = []
    position, expects_operand = 0, True
    try:
        while position < len(expression):
            token = _TOKEN.match(expression, position)
            if token is None or (token["line"] and "(" not in pending):
                return None
            position = token.end()
            symbol = token["symbol"]
            if token["number"]:
                if not expects_operand:
                    return None
                values.append(Fraction(token["number"]))
                expects_operand = False
            elif symbol is None:
                continue
            elif symbol == "(" and expects_operand:
                pending.append("(")
            elif symbol == ")" and not expects_operand and "(" in pending:
                _reduce(values, pending, 1)
                pending.pop()
            elif symbol in "+-" and expects_operand:
                pending += ["negate"] if symbol == "-" else []
            elif symbol in "+-*/" and not expects_operand:
                _reduce(values, pending, PRECEDENCE[symbol])
                pending.append(symbol)
                expects_operand = True
            else:
                return None
        if expects_operand:
            return None
        _reduce(values, pending, 1)
    except ZeroDivisionError:
        return None
    return None if pending else values[0]


def _reduce(values: list[Fraction], pending: list[str], precedence: int) -> None:
    """Applies the pending operations whose precedence is at least this high."""
    while pending and PRECEDENCE[pending[-1]] >= precedence:
        symbol = pending.pop()
        right = values.pop()
        values.append(-right if symbol == "negate" else OPERATIONS[symbol](values.pop(), right))


_COMMANDS = (
    (re.compile(r"\\(?:times|cdot|ast|bullet)(?![A-Za-z])|×|\\\*"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:left|right|big|Big|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ()\[\]]|\$|`|~"), " "),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|boldsymbol|boxed|fbox)\s?(?=\{)"), " "),
    (re.compile(r"\\[{]"), "{"),
    (re.compile(r"\\[}]"), "}"),
    (re.compile(r"(?<=[0-9)}\]])(\s{0,3})[xX•∙](\s{0,3})(?=[0-9({\[])"), r"\1*\2"),
    *(
        (re.compile(rf"(?<=[0-9)}}\]])\s{{1,3}}(?i:{words})\s{{1,3}}(?=[0-9({{\[])"), sign)
        for words, sign in (("times|multiplied by", "*"), ("divided by", "/"), ("plus", "+"), ("minus", "-"))
    ),
    # A remark in parentheses, without a number.
    (re.compile(r"(?<=[0-9)}\] ])\([^()0-9]{0,80}[A-Za-z][^()0-9]{0,80}\)"), " "),
    (re.compile(r"(\\[dtc]?frac)\s{0,3}([0-9])\s{0,3}([0-9])(?![0-9])"), r"\1{\2}{\3}"),
    (re.compile(r"(?i)\b(?:is equal to|equals(?: to)?|equal to)\b|≈|\\approx"), "="),
    (re.compile(r"\(\s{0,3}=\s{0,3}([0-9.]{1,30})\s{0,3}\)"), r"=\1"),
    (re.compile(r"==|[-=]{1,2}>|→|⇒|⟹|\\(?:to|rightarrow|Rightarrow|longrightarrow|implies)(?![A-Za-z])"), "="),
)
# What comes before the one expression of an answer that also shows the steps to it.
_STATED = re.compile(r"(?i)\b(?:expression|equation|solution|answer)(?:\*\*)?(?:\s{0,3}:|\s{1,3}is\b:?)")
_FRACTION = re.compile(r"\\[dtc]?frac\s{0,3}\{([^{}]{1,200})\}\s{0,3}\{([^{}]{1,200})\}")
_RUN = re.compile(r"[-+*/()=0-9. \t]+")
_ARITHMETIC = "-+*/()=0123456789."
# Signs that a run is part of something else: adjacent letters, powers, factorials, bars, LaTeX commands or a "not".
_BEFORE = re.compile(r"(?:[^\W_]|[\^!%_|]\s?|\\[A-Za-z]+\s?|(?i:\b(?:not|never)|n't)\s{1,3})\Z")
_AFTER = re.compile(r"[^\W_]|[\^!%_|\\]")
# Words that may follow a run after a space, because they only describe it.
_SAID = re.compile(r"(?<=[ \t])(?i:is|which|because|works|gives|makes|using)\b(?!\s+(?:not|wrong|incorrect)\b)")
_JOINT = re.compile(r"(?<=[0-9)])([ \t]{0,3})(?=\()|(?<=\))([ \t]{0,3})(?=[0-9])")


def plain(text: str) -> str:
    """Returns the text with LaTeX's operators, fractions and brackets in plain spelling."""
    text = translate(text)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    for _ in range(8):
        text, count = _FRACTION.subn(r"((\1)/(\2))", text)
        if not count:
            break
    return text.translate(str.maketrans("{}[]", "()()"))


def expressions(text: str) -> list[str]:
    """Returns the runs of arithmetic in a text that hold an operation. An equation is one run; a line break ends a run.

    A run that is part of something else, such as a power, is returned as an empty text.
    """
    text, found = plain(text), []
    for match in _RUN.finditer(text):
        run = match[0].strip(" \t.=")
        # Bold marks of Markdown around the whole run.
        while run.startswith("**") and run.endswith("**") and len(run) > 4:
            run = run[2:-2].strip(" \t.=")
        if re.search(r"[0-9)][ \t]*[-+*/(]|\)[ \t]*[0-9]", run):
            is_part = _BEFORE.search(text[max(0, match.start() - 20) : match.start()] + match[0][:1].strip(_ARITHMETIC))
            is_part = is_part or (_AFTER.match(text, match.end()) and not _SAID.match(text, match.end()))
            found.append("" if is_part else run)
    return found


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Returns whether an expression or equation uses exactly these numbers, each once, and reaches the target.

    The first or the last side of an equation is the expression, and every side must equal the target.
    """
    if len(expression) > MAX_EXPRESSION:
        return False
    sides = [_JOINT.sub("*", side.strip()) for side in _unwrapped(expression).split("=")]
    if not all(sides) or any(compute(side) != target for side in sides):
        return False
    return any(sorted(_numbers(side)) == sorted(numbers) for side in {sides[0], sides[-1]})


def _unwrapped(expression: str) -> str:
    """Removes the parentheses around an equation."""
    if "=" in expression and expression.startswith("(") and expression.endswith(")"):
        inner = expression[1:-1]
        if inner.count("(") == inner.count(")") and compute(inner.partition("=")[0]) is not None:
            return inner
    return expression


def _numbers(side: str) -> list[Fraction]:
    return [Fraction(number) for number in re.findall(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+", side)]


def right(completion: str, numbers: list[int], target: int) -> bool:
    """Returns whether the answer of a completion is one expression that solves the problem.

    In a text without tags and box, the last line with an expression counts.
    """
    text = extract.scope(completion)
    held = extract.boxes(text)
    if held is not None:
        found = expressions(held) if len(held) <= MAX_ANSWER else []
    elif text is not completion or len(text) <= MAX_EXPRESSION and "\n" not in text.strip():
        found = expressions(text) if len(text) <= MAX_ANSWER else []
    else:
        lines = (expressions(line) for line in reversed(text.splitlines()[-20:]) if len(line) <= MAX_EXPRESSION)
        found = next(filter(None, lines), [])
    if len(found) > 1 and held is None:
        found = _after_steps(text)
    return len(found) == 1 and solves(found[0], numbers, target)


def _after_steps(text: str) -> list[str]:
    """Returns the expressions after the last "Expression:" or "The answer is"; none if the text has no such place."""
    last = next(reversed(list(_STATED.finditer(text))), None)
    return expressions(text[last.end() :]) if last is not None and len(text) <= MAX_ANSWER else []
