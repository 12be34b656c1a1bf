"""Finds the answer of a completion in tags and `\\boxed{}`.

Every function takes linear time in the length of the text, whatever the text is: completions are untrusted, and a
pattern such as `<answer>(.*?)</answer>` takes quadratic time on a run of opening tags.
"""


def tagged(text: str, tag: str = "answer") -> list[str]:
    """Returns the contents of every `<tag> ... </tag>`, from left to right, case-sensitive and not nested.

    A second opening tag before the closing one belongs to the content, as in the references' patterns.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    found = []
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            break
        found.append(text[start:end])
        start = text.find(opening, end + len(closing))
    return found


def last_answer(text: str) -> str | None:
    """Returns the content of the last complete `<answer>`, or None."""
    return next(reversed(tagged(text)), None)


def first_answer(text: str) -> str | None:
    """Returns the content of the first complete `<answer>`, or None."""
    return next(iter(tagged(text)), None)


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{ ... }` up to its balancing brace; None without a closed box."""
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start:index]
    return None
