r"""Parses the tokens of an expression into a tree, without computing anything.

Juxtaposition multiplies, `2\frac{1}{2}` and `2 1/2` are mixed numbers, f, g and h before a parenthesis are functions.
"""

from fractions import Fraction

from gdsd_jax.tasks.graders.tokens import FUNCTIONS, Token, Unreadable, flat
from gdsd_jax.tasks.graders.trees import Tree, number

MAX_DEPTH = 40
_UNKNOWN = set("fghFGH")
_MARKED = {"overline", "vec", "hat", "widehat", "overrightarrow", "overleftrightarrow", "tilde", "dot"}
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_ROUND = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
_CONSTANTS = {"pi", "infty"}
_END = Token("end", "")


def parse(tokens: list[Token]) -> list[Tree]:
    """Returns the tree of an expression or, if it has plus-minus signs, two: with the upper and with the lower signs.

    Raises Unreadable if the tokens are no expression.
    """
    parser = _Parser(tokens, upper=True)
    trees = [parser.whole()]
    return [*trees, _Parser(tokens, upper=False).whole()] if parser.has_signs else trees


class _Parser:
    def __init__(self, tokens: list[Token], upper: bool):
        self.tokens = list(tokens)
        self.upper = upper
        self.index = self.depth = self.bars = 0
        self.has_signs = False

    # -- tokens

    @property
    def next(self) -> Token:
        return self.tokens[self.index] if self.index < len(self.tokens) else _END

    def ahead(self, count: int) -> Token:
        index = self.index + count
        return self.tokens[index] if index < len(self.tokens) else _END

    def take(self) -> Token:
        token = self.next
        self.index += 1
        return token

    def is_sign(self, *texts: str) -> bool:
        return self.next.kind == "sign" and self.next.text in texts

    def is_command(self, *texts: str) -> bool:
        return self.next.kind == "command" and self.next.text in texts

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise Unreadable(f"{text} is missing")

    # -- grammar

    def whole(self) -> Tree:
        tree = self.chosen()
        if self.next is not _END:
            raise Unreadable(f"{self.next.text} at this place")
        return tree

    def chosen(self) -> Tree:
        """Returns a sum, or two of them with `choose` between."""
        tree = self.sum()
        if not self.is_command("choose"):
            return tree
        self.take()
        return ("function", "binom", tree, self.sum())

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self.signed(self.product)
        while self.is_sign("+", "-") or self.is_command("pm", "mp"):
            symbol = self.symbol()
            tree = (symbol, tree, self.signed(self.product))
        self.depth -= 1
        return tree

    def symbol(self) -> str:
        """Returns + or -; for a plus-minus sign, the upper or the lower sign."""
        text = self.take().text
        if text in ("pm", "mp"):
            self.has_signs = True
            return "+" if (text == "pm") == self.upper else "-"
        return text

    def signed(self, inner) -> Tree:
        negative = False
        for _ in range(4):
            if not (self.is_sign("+", "-") or self.is_command("pm", "mp")):
                break
            negative ^= self.symbol() == "-"
        tree = inner()
        return ("-", ("number", Fraction(0), None), tree) if negative else tree

    def product(self) -> Tree:
        tree = self.power()
        while True:
            if self.is_sign("*", "/"):
                symbol = self.take().text
                tree = (symbol, tree, self.signed(self.power))
            elif self.starts_factor():
                if self.next.kind == "number" and self.tokens[self.index - 1].kind == "number":
                    raise Unreadable("two numbers side by side")
                tree = ("*", tree, self.power())
            else:
                return tree

    def starts_factor(self) -> bool:
        kind, text, _ = self.next
        if kind in ("number", "symbol"):
            return True
        if kind == "sign":
            return text in "({[" or (text == "|" and self.bars == 0)
        return kind == "command" and (
            text in FUNCTIONS or text in _MARKED or text in _CONSTANTS or text in _ROUND
            or text in ("frac", "binom", "surd", "cbrt", "angle")
        )  # fmt: skip

    def power(self) -> Tree:
        tree = self.postfix(self.base())
        if self.is_sign("^"):
            self.take()
            tree = ("^", tree, self.exponent())
            tree = self.postfix(tree)
        return tree

    def postfix(self, tree: Tree) -> Tree:
        while self.is_sign("!") or self.is_command("degree"):
            if self.take().text == "!":
                if self.is_sign("!"):
                    raise Unreadable("double factorial")
                tree = ("function", "factorial", tree)
            else:
                tree = ("degree", tree)
        return tree

    def exponent(self) -> Tree:
        if self.is_sign("-", "+"):
            return self.signed(self.exponent)
        tree = self.base()
        if self.is_sign("^"):
            self.take()
            return ("^", tree, self.exponent())
        return tree

    def base(self) -> Tree:
        kind, text, _ = token = self.take()
        if kind == "number":
            return self.numeral(token)
        if kind == "symbol":
            return self.named(text)
        if kind == "sign" and text in _CLOSING:
            return self.group(text)
        if kind == "sign" and text == "|":
            self.bars += 1
            tree = ("function", "abs", self.sum())
            self.bars -= 1
            self.expect("|")
            return tree
        if kind != "command":
            raise Unreadable(f"{text} at this place")
        if text == "frac":
            return ("/", self.argument(), self.argument())
        if text == "binom":
            return ("function", "binom", self.argument(), self.argument())
        if text in ("sqrt", "surd", "cbrt"):
            return self.root(text)
        if text in _ROUND:
            closing, name = _ROUND[text]
            tree = ("function", name, self.sum())
            self.expect(closing)
            return tree
        if text in _CONSTANTS:
            return ("constant", text)
        if text in _MARKED or text == "angle":
            return self.marked(text)
        if text in FUNCTIONS:
            return self.function(text)
        raise Unreadable(f"\\{text}")

    def numeral(self, token: Token) -> Tree:
        text = token.text
        repeating = 1 if self.is_sign(".") and self.ahead(1).text == "overline" else 0
        if self.ahead(repeating).text == "overline" and (repeating or "." in text):
            self.index += repeating + 1
            return self.repeating(text, self.argument())
        tree = number(text)
        if tree[2] is None and "e" not in text.lower():
            fraction = self.mixed()
            if fraction is not None:
                return ("+", tree, ("number", fraction, None))
        return tree

    def repeating(self, text: str, period: Tree) -> Tree:
        digits = self.tokens[self.index - 2].text
        if period[0] != "number" or not digits.isdigit():
            raise Unreadable("a period of digits is needed")
        decimals = len(text.partition(".")[2])
        return ("number", Fraction(text) + Fraction(int(digits), (10 ** len(digits) - 1) * 10**decimals), None)

    def mixed(self) -> Fraction | None:
        """Returns the proper fraction that follows a whole number and belongs to it: 1/2, or one with `frac`."""
        start = self.index
        if self.is_command("frac"):
            self.take()
            parts = [self.argument(), self.argument()]
        elif self.next.kind == "number" and self.ahead(1).text == "/" and self.ahead(2).kind == "number":
            parts = [number(self.next.text), number(self.ahead(2).text)]
            self.index += 3
        else:
            return None
        if all(part[0] == "number" and part[2] is None for part in parts) and 0 < parts[0][1] < parts[1][1]:
            return parts[0][1] / parts[1][1]
        if self.tokens[start].kind == "number":
            raise Unreadable("two numbers side by side")
        self.index = start
        return None

    def argument(self) -> Tree:
        """Returns what a command such as \\frac takes: a group, one digit, one letter or one command."""
        token = self.next
        if token.kind == "number":
            digit, rest = token.text[0], token.text[1:]
            if rest and not token.text.isdigit():
                raise Unreadable("a brace is missing")
            self.index += 1
            if rest:
                self.tokens[self.index - 1 : self.index] = [Token("number", digit), Token("number", rest)]
            return number(digit)
        if token.kind == "sign" and token.text == "{":
            self.take()
            return self.group("{")
        return self.base()

    def group(self, opening: str) -> Tree:
        bars, self.bars = self.bars, 0
        tree = self.chosen()
        self.expect(_CLOSING[opening])
        self.bars = bars
        return tree

    def root(self, name: str) -> Tree:
        degree = ("number", Fraction(3 if name == "cbrt" else 2), None)
        if self.is_sign("[") and name != "cbrt":
            self.take()
            degree = self.group("[")
        if name == "sqrt" and self.next.kind == "number" and len(self.next.text) > 1:
            raise Unreadable("a brace is missing")
        return ("function", "root", self.base(), degree)

    def named(self, name: str) -> Tree:
        """Returns a symbol with its subscript and primes, or a call if it is a function's name."""
        if self.is_sign("_"):
            self.take()
            name = f"{name}_{self.subscript()}"
        while self.is_sign("'"):
            name += self.take().text
        if name in ("e", "i"):
            return ("constant", name)
        if name[:1] in _UNKNOWN and self.is_sign("("):
            return ("unknown", name, *self.arguments())
        return ("symbol", name)

    def subscript(self) -> str:
        token = self.take()
        if token.text != "{":
            if token.kind not in ("number", "symbol", "word"):
                raise Unreadable("a subscript is missing")
            return token.text
        start = self.index
        while self.next is not _END and not self.is_sign("}", "{"):
            self.index += 1
        inside = flat(self.tokens[start : self.index])
        self.expect("}")
        return inside

    def marked(self, command: str) -> Tree:
        """Returns a symbol such as \\overline{AB} or \\angle ABC: a name, not a product."""
        if self.is_sign("{"):
            self.take()
            return ("symbol", f"{command}:{self.letters()}", self.expect("}"))[:2]
        return ("symbol", f"{command}:{self.letters()}")

    def letters(self) -> str:
        name = ""
        while self.next.kind in ("symbol", "word"):
            name += self.take().text
        if not name:
            raise Unreadable("a name is missing")
        return name

    def arguments(self) -> list[Tree]:
        self.expect("(")
        found = [self.sum()]
        while self.is_sign(","):
            self.take()
            found.append(self.sum())
        self.expect(")")
        return found

    def function(self, name: str) -> Tree:
        exponent = base = None
        for _ in range(2):
            if self.is_sign("^"):
                self.take()
                exponent = self.exponent()
            elif self.is_sign("_") and name == "log":
                self.take()
                base = self.argument() if self.next.kind != "number" else number(self.take().text)
        if exponent == ("-", ("number", Fraction(0), None), ("number", Fraction(1), None)) and name in _INVERSE:
            name, exponent = _INVERSE[name], None
        if self.is_sign("("):
            arguments = self.arguments()
        elif name in ("gcd", "lcm", "min", "max"):
            raise Unreadable(f"arguments of {name} are missing")
        else:
            arguments = [self.signed(self.operand)]
        arguments += [base] if base is not None else []
        tree = ("function", name, *arguments)
        return tree if exponent is None else ("^", tree, exponent)

    def operand(self) -> Tree:
        """Returns the argument of a function without parentheses: factors side by side, up to the next function."""
        tree = self.power()
        while self.starts_factor() and self.next.text not in FUNCTIONS and not self.is_sign("(", "[", "{"):
            tree = ("*", tree, self.power())
        return tree
