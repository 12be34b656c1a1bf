"""Compares ratios, times and remainders: 6:8 is 3:4, 3:00 is 3 o'clock, 3 (mod 7) is 3."""

from collections.abc import Callable

from gdsd_jax.tasks.graders import scalars, values
from gdsd_jax.tasks.graders.kinds import Answer, Ratio, Residue, Scalar


def same(gold: Answer, answer: Answer, rule: Callable[[Answer, Answer], bool]) -> bool:
    """Returns whether two answers, of which at least one is a ratio or time, are the same; `rule` compares parts."""
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        halves = gold.half == answer.half or not (gold.half and answer.half)
        if not halves or len(gold.parts) != len(answer.parts):
            return False
        return all(map(rule, gold.parts, answer.parts)) or _proportional(gold, answer)
    ratio, scalar = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    if not all(isinstance(part, Scalar) and len(part.trees) == 1 for part in (scalar, *ratio.parts)):
        return False
    if len(ratio.parts) == 2 and ratio.texts[1] == "00" and scalar.unit in ("", "am", "pm") and not scalar.percent:
        # Three o'clock.
        halves = ratio.half == scalar.unit or not (ratio.half and scalar.unit)
        return halves and values.equal(ratio.parts[0].trees[0], scalar.trees[0])
    if scalar.percent or scalar.unit or len(ratio.parts) != 2 or _is_time(ratio):
        return False
    quotient = ("/", ratio.parts[0].trees[0], ratio.parts[1].trees[0])
    return scalar.trees[0][0] == "/" and values.equal(quotient, scalar.trees[0])


def _proportional(gold: Ratio, answer: Ratio) -> bool:
    """Returns whether two ratios are one: 6:8 is 3:4, but 1:15 is no time of 3:45."""
    sides = [part for ratio in (gold, answer) for part in ratio.parts]
    if not all(isinstance(part, Scalar) and len(part.trees) == 1 and not part.percent for part in sides):
        return False
    if _is_time(gold) or answer.half:
        return False
    shares = [[values.exact(part.trees[0]) for part in ratio.parts] for ratio in (gold, answer)]
    if any(not share for each in shares for share in each):
        return False
    return len({one / other for one, other in zip(*shares, strict=True)}) == 1


def same_remainder(gold: Answer, answer: Answer) -> bool:
    """Returns whether a remainder is written once with its modulus and once without: 3 (mod 7) and 3."""
    residue, scalar = (gold, answer) if isinstance(gold, Residue) else (answer, gold)
    if not all(isinstance(each, Scalar) and len(each.trees) == 1 for each in (residue.value, residue.modulus, scalar)):
        return False
    value, modulus = (values.exact(each.trees[0]) for each in (residue.value, residue.modulus))
    return None not in (value, modulus) and 0 <= value < modulus and scalars.same(residue.value, scalar)


def _is_time(ratio: Ratio) -> bool:
    if len(ratio.texts) != 2:
        return False
    hour, minute = ratio.texts
    return bool(ratio.half) or (hour.isdecimal() and minute.isdecimal() and len(minute) == 2 and int(minute) < 60)
