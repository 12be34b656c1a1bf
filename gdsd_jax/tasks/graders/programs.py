r"""Finds the program of a completion: the fenced block that defines the requested names, else unfenced code.

Fences are runs of ``` or ~~~ at the start of a line, indented or not, with any name of Python or none. Behind text on
the same line, a fence with a name opens a block and one without may end it. A fence inside a docstring does not end a
block: the block ends at the first fence that leaves a program that parses. Earlier blocks that define or import what it
lacks come in front of it. A text that begins with code may have its opening fence in the prompt. Everything runs in a
worker, because parsing alone may take seconds or gigabytes.
"""

import ast
import re
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

MAX_TEXT = 50_000
MAX_FENCES = 64
MAX_PARSES = 60
MAX_HELPERS = 8
_FENCE = re.compile(
    r"^(?:[ \t]{0,12}(?:[-*+>]\s|\d{1,2}[.)]\s)?[ \t]{0,8}|(?P<before>[^\n`]{1,400}))"
    r"(?P<fence>`{3,}|(?<![^\s])~{3,})[ \t]*(?P<name>[\w+#.-]*)[^\n`]*$",
    re.MULTILINE,
)
_LANGUAGES = {"", "py", "python", "python2", "python3", "py3", "python3.11", "code", "pycon"}
_MARKED = re.compile(r"\[(?:BEGIN|PYTHON)\][ \t]*\n?(.*?)(?:\[DONE\]|\[END\]|\[/PYTHON\]|\Z)", re.DOTALL)
_DONE = re.compile(r"^\[(?:DONE|END)\]", re.MULTILINE)
# The first line of a body that continues a prompt.
_BODY = re.compile(r"(?:[ \t]*\n)*[ \t]+\S")
_CODE_LINE = re.compile(r"^(?:def |async def |class |import |from \w[\w.]* import |@\w)", re.MULTILINE)
_DEFINITION = re.compile(r"^[ \t]*(?:async +def|def|class)[ \t]+(\w+)", re.MULTILINE)
_INLINE = re.compile(r"`((?:def|class) [^`\n]+)`")
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)


class Block(NamedTuple):
    """The position of a piece of code in the normalised text."""

    start: int
    end: int


def normal(completion: str) -> str:
    """Returns the completion with uniform line ends."""
    return completion[-MAX_TEXT:].replace("\r\n", "\n").replace("\r", "\n")


def parses(text: str) -> bool:
    """Returns whether a text is valid Python for this interpreter."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def locate(completion: str, names: tuple[str, ...], prompt: str) -> dict[str, float]:
    """Returns the position of a completion's program: start, end, whether it is fenced, and whether it parses.

    Args:
      names: the names that the tests call; the last block that defines one of them is the program.
      prompt: the text that a bare body continues; empty if there is none.

    All values are numbers, as a worker returns them. Positions are in `normal(completion)`; start is -1 without code.
    """
    text = normal(completion)
    found = _blocks(text)
    fenced = bool(found)
    chosen = _choose(text, found, set(names)) if found else _unfenced(text, prompt)
    if chosen is None:
        return {"start": -1.0, "end": -1.0, "fenced": float(fenced), "parses": 0.0}
    is_python = parses(complete(text[chosen.start : chosen.end], names, prompt))
    place = {"start": float(chosen.start), "end": float(chosen.end)}
    for number, block in enumerate(_helpers(text, found, chosen) if is_python else ()):
        place |= {f"start{number}": float(block.start), f"end{number}": float(block.end)}
    return {**place, "fenced": float(fenced), "parses": float(is_python)}


def joined(completion: str, place: Mapping[str, float]) -> str:
    """Returns the code at a position that `locate` has returned, after the earlier blocks that it needs."""
    text = normal(completion)
    pieces = [text[int(place["start"]) : int(place["end"])]] if place["start"] >= 0 else []
    number = 0
    while f"start{number}" in place:
        pieces.append(text[int(place[f"start{number}"]) : int(place[f"end{number}"])])
        number += 1
    return "\n".join(textwrap.dedent(piece).strip("\n") for piece in reversed(pieces)) if number else "".join(pieces)


def complete(code: str, names: tuple[str, ...], prompt: str) -> str:
    """Returns a piece of code as a whole program: without common indentation, and a bare body after its prompt.

    A program that defines the prompt's function gets the prompt's imports and helpers in front; `from __future__`
    imports stay first.
    """
    program = textwrap.dedent(code).strip("\n")
    if not prompt:
        return program
    entry = names[0] if names else ""
    head = re.search(rf"^(?:async +)?def +{re.escape(entry)}\b", prompt, re.MULTILINE)
    if re.search(rf"^(?:(?:async +)?def|class) +{re.escape(entry)}\b|^{re.escape(entry)}\s*=", program, re.MULTILINE):
        future = "".join(_FUTURE.findall(program))
        preamble = prompt[: head.start()] if head else ""
        return f"{future}{preamble}\n{_FUTURE.sub('', program)}"
    # A body with more after it, such as a call at the start of a line, has no common indentation.
    body = program if program[:1] in (" ", "\t") else textwrap.indent(program, "    ")
    return f"{prompt.rstrip()}\n{body}\n"


def _blocks(text: str) -> list[Block]:
    fences = [fence for fence, _ in zip(_FENCE.finditer(text), range(MAX_FENCES), strict=False)]
    found, index, budget = [], 0, MAX_PARSES
    if fences and not fences[0]["name"] and not fences[0]["before"] and _begins_with_code(text[: fences[0].start()]):
        # The opening fence was in the prompt.
        found, index = [Block(0, fences[0].start())], 1
    while index < len(fences):
        opening = fences[index]
        if opening["before"] and not (opening["name"] and _is_python(opening)):
            index += 1
            continue
        closing = [
            (later, fences[later])
            for later in range(index + 1, len(fences))
            if fences[later]["fence"][0] == opening["fence"][0]
            and len(fences[later]["fence"]) >= len(opening["fence"])
            and not fences[later]["name"]
        ]
        start = min(opening.end() + 1, len(text))
        if not closing:
            # A block that was cut off.
            found += [Block(start, len(text))] if _is_python(opening) else []
            break
        chosen = next((each for each in closing if not each[1]["before"]), closing[0])
        if _is_python(opening):
            for candidate in closing[:8]:
                budget -= 1
                if budget < 0:
                    break
                if parses(textwrap.dedent(text[start : _code_end(candidate[1])])):
                    chosen = candidate
                    break
            found.append(Block(start, _code_end(chosen[1])))
        index = chosen[0] + 1
    return found


def _begins_with_code(text: str) -> bool:
    return bool(_CODE_LINE.match(text) or _BODY.match(text))


def _code_end(closing: re.Match) -> int:
    """Returns the end of the code before a closing fence, which may follow code on its own line."""
    return closing.start("fence") if closing["before"] else closing.start()


def _helpers(text: str, blocks: list[Block], chosen: Block) -> list[Block]:
    """Returns the earlier blocks that give names which the chosen one lacks, from the last to the first."""
    found: list[Block] = []
    needed = _lacking(text, chosen)
    for block in reversed([block for block in blocks if block.end <= chosen.start][-MAX_HELPERS:]):
        given = _given(text, block)
        if needed & given:
            found.append(block)
            needed = (needed | _lacking(text, block)) - given
    return found


def _code(text: str, block: Block) -> str:
    return textwrap.dedent(text[block.start : block.end]).strip("\n")


def _given(text: str, block: Block) -> set[str]:
    """Returns the names that a block defines, imports or sets at its top level; none if it does not parse."""
    try:
        body = ast.parse(_code(text, block)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    imports = [alias for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = {alias.asname or alias.name.partition(".")[0] for alias in imports}
    found |= {target.id for node in body if isinstance(node, ast.Assign) for target in node.targets if _is_name(target)}
    return found | {node.name for node in body if isinstance(node, definitions)}


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _lacking(text: str, block: Block) -> set[str]:
    """Returns the names that a block reads and never sets."""
    try:
        nodes = list(ast.walk(ast.parse(_code(text, block))))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = list(filter(_is_name, nodes))
    set_here = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    set_here |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    set_here |= {node.asname or node.name.partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    set_here |= set(_DEFINITION.findall(text, block.start, block.end))
    return {node.id for node in names} - set_here


def _is_python(fence: re.Match) -> bool:
    return fence["name"].lower() in _LANGUAGES


def _choose(text: str, blocks: list[Block], names: set[str]) -> Block:
    """Returns the last block that defines one of the names, else the last definition, else the last text."""
    defined = [set(_DEFINITION.findall(text, block.start, block.end)) for block in blocks]
    for wanted in (lambda own: own & names, bool):
        for block, own in zip(reversed(blocks), reversed(defined), strict=True):
            if wanted(own):
                return block
    filled = [block for block in blocks if text[block.start : block.end].strip()]
    if filled and filled[0].start == 0:  # its opening fence is in the prompt
        return filled[0]
    return filled[-1] if filled else blocks[-1]


def _unfenced(text: str, prompt: str) -> Block | None:
    """Finds code without a fence: between markers, or from the first line of code as far as it parses."""
    marked = _MARKED.search(text)
    if marked:
        return Block(marked.start(1), marked.end(1))
    done = _DONE.search(text)
    text = text[: done.start()] if done else text
    is_body = bool(prompt) and _BODY.match(text) is not None
    first = _CODE_LINE.search(text)
    if first is None and not is_body:
        inline = [Block(*found.span(1)) for found in _INLINE.finditer(text)]
        whole = [block for block in inline[:MAX_FENCES] if parses(text[block.start : block.end])]
        if whole and not prompt:
            return whole[-1]
        # A bare body, or code of another form such as an assignment.
        return Block(0, len(text)) if text.strip() else None
    if first is None or (is_body and text[: first.start()].strip()):
        start, head = 0, "def body():\n"
    else:
        start, head = first.start(), ""
    end = len(text)
    for _ in range(MAX_PARSES // 2):
        if parses(head + text[start:end]):
            return Block(start, end)
        cut = text.rfind("\n", start, end)
        if cut <= start:
            break
        end = cut
    return Block(start, len(text))
