"""Robust graders of numbers, arithmetic and programs, and where each finds the answer of a completion."""

import json

import numpy as np
import pytest

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, code, resolve
from gdsd_jax.tasks.graders import extract, numbers
from gdsd_jax.tasks.graders.arithmetic import right

# The right number, a completion, and 1 where it gives that number.
NUMBERS = [
    ("45", "<answer>45 people in 3 vans</answer>", 1),
    ("45", "<answer>45 pages on day 3</answer>", 1),
    ("45", "<answer>45 miles every 2 days</answer>", 1),
    ("45", "<answer>45 or more</answer>", 0),
    ("45", "<answer>45 more than 4</answer>", 0),
    ("45", "<answer>45 plus 4</answer>", 0),
    ("45", "<answer>45x2</answer>", 0),
    ("45", "<answer>45 pears then 4 plums</answer>", 0),
    ("45", "<answer>45 pears 4 plums</answer>", 0),
    ("45", "<answer>from 45 to 50</answer>", 0),
    ("45", "<answer>45 (50)</answer>", 0),
    ("45", "<answer>45 | 50</answer>", 0),
    ("45", "<answer>45 \\mid 50</answer>", 0),
    ("45", "<answer>45 tens</answer>", 0),
    ("45", "<answer>f(45)</answer>", 0),
    ("9500", "<answer>9.5k</answer>", 1),
    ("9500", "<answer>about 9.5 thousand people</answer>", 1),
    ("9500", "<answer>9'500</answer>", 1),
    ("9500", "<answer>nine thousand five hundred dollars</answer>", 1),
    ("9500", "<answer>9500 km</answer>", 1),
    ("72", "\\boxed{\\text{seventy-two}}", 1),
    ("72", "<answer>The answer is seventy-two clips.</answer>", 1),
    ("70", "<answer>seventy-two</answer>", 0),
    ("9", "<answer>9k</answer>", 0),
    ("9", "<answer>about 9 thousand people</answer>", 0),
    ("2", "<answer>half of the two</answer>", 0),
    ("9500", "\\boxed{9{,}500}", 1),
    ("9500", "9,\\!500", 1),
    ("9500", "<answer>9\\,500</answer>", 1),
    ("9500", "#### 9,500", 1),
    ("9500", "The answer is 9,500 dollars.", 1),
    ("9500", "<answer>$9,500.00</answer>", 1),
    ("9500", "<answer>9 500</answer>", 1),
    ("9500", "\\boxed{9500 \\text{ dollars}}", 1),
    ("9500", "<answer>\\$9500</answer>", 1),
    ("9500", "9500", 1),
    ("9500", "So she earns $9{,}500.", 1),
    ("9500", "#### $9,500 per year", 1),
    ("9500", "**9,500**", 1),
    ("9500", "<answer>**9,500**</answer>", 1),
    ("9500", "<answer>The profit is $9,500 in 2 years</answer>", 1),
    ("9500", "<answer>x = 9,500 dollars</answer>", 1),
    ("9500", "<answer>9000 + 500 = 9500</answer>", 1),
    ("9500", "<answer>9500 = 9000 + 500</answer>", 1),
    ("9500", "<answer>She has 9500 eggs</answer>", 1),
    ("9500", "#### 9500 eggs (19 * 500)", 1),
    ("9500", "<answer>9500.0</answer>", 1),
    ("9500", "\\boxed{9.5 \\text{ thousand}}", 1),
    ("9500", "<answer>Answer: 9500</answer>", 1),
    ("9500", "\\boxed{\\textbf{9500}}", 1),
    ("9500", "\\boxed{9500}.", 1),
    ("9500", "the final answer is \\boxed{9500}", 1),
    ("9500", "The answer is: 9500", 1),
    ("9500", "The answer is \\$9{,}500.", 1),
    ("9500", "<answer>€9,500</answer>", 1),
    ("9500", "9500 dollars", 1),
    ("9500", "<answer>nine thousand, 9500</answer>", 1),
    ("9500", "<answer>9500 ft^2</answer>", 1),
    ("9500", "<answer>9500 m3</answer>", 1),
    ("9500", "<answer>about 9500</answer>", 1),
    ("9500", "<answer>= 9500</answer>", 1),
    ("9500", "\\boxed{500}", 0),
    ("9500", "#### 500", 0),
    ("9500", "<answer>9,500 or 9,600</answer>", 0),
    ("9500", "<answer>9501</answer>", 0),
    ("9500", "-9500", 0),
    ("9500", "<answer>-9,500</answer>", 0),
    ("9500", "\\boxed{}", 0),
    ("9500", "<answer></answer>", 0),
    ("9500", "<answer>95000-500</answer>", 0),
    ("9500", "<answer>9500-1</answer>", 0),
    ("9500", "\\boxed{\\frac{9500}{2}}", 0),
    ("9500", "<answer>19500</answer>", 0),
    ("9500", "\\boxed{9{,}501}", 0),
    ("9500", "<answer>\\boxed{}</answer>", 0),
    ("9500", "\\boxed{9500", 0),
    ("9500", "work 9500 <answer>?</answer>", 0),
    ("9500", "<answer>9500 + 2 eggs</answer>", 0),
    ("9500", "<answer>9500%</answer> of", 1),
    ("9500", "<answer>9500, 9600</answer>", 0),
    ("-18", "−18", 1),
    ("-18", "<answer>-\\$18</answer>", 1),
    ("-18", "<answer>- 18</answer>", 1),
    ("-18", "\\boxed{- 18}", 1),
    ("-18", "\\boxed{-\\$18}", 1),
    ("-18", "#### −18", 1),
    ("-18", "<answer>$-18</answer>", 1),
    ("-18", "<answer>–18 dollars</answer>", 1),
    ("-18", "<answer>a loss of -18 dollars</answer>", 1),
    ("-18", "<answer>20-18</answer>", 0),
    ("-18", "<answer>20 - 18</answer>", 0),
    ("-18", "18", 0),
    ("-18", "<answer>x-18</answer>", 0),
    ("-18", "<answer>20 eggs - 18 eggs</answer>", 0),
    ("0.5", "\\boxed{\\frac{1}{2}}", 1),
    ("2", "\\boxed{\\frac{1}{2}}", 0),
    ("1", "\\boxed{\\frac{1}{2}}", 0),
    ("0.5", "<answer>1/2 cup</answer>", 1),
    ("2", "<answer>1/2 cup</answer>", 0),
    ("1", "<answer>1/2 cup</answer>", 0),
    ("0.5", "0.5", 1),
    ("2", "0.5", 0),
    ("1", "0.5", 0),
    ("0.5", "<answer>½</answer>", 1),
    ("2", "<answer>½</answer>", 0),
    ("1", "<answer>½</answer>", 0),
    ("0.5", "\\boxed{\\frac12 \\text{ hour}}", 1),
    ("2", "\\boxed{\\frac12 \\text{ hour}}", 0),
    ("1", "\\boxed{\\frac12 \\text{ hour}}", 0),
    ("0.5", "<answer>50%</answer>", 1),
    ("2", "<answer>50%</answer>", 0),
    ("1", "<answer>50%</answer>", 0),
    ("18", "#### 18 dollars every 2 weeks", 1),
    ("2", "#### 18 dollars every 2 weeks", 0),
    ("18", "<answer>18 dollars every 2 weeks</answer>", 1),
    ("2", "<answer>18 dollars every 2 weeks</answer>", 0),
    ("18", "\\boxed{18\\text{ per }2\\text{ weeks}}", 1),
    ("2", "\\boxed{18\\text{ per }2\\text{ weeks}}", 0),
    ("18", "<answer>18 m^2</answer>", 1),
    ("2", "<answer>18 m^2</answer>", 0),
    ("18", "\\boxed{18\\ \\text{m}^2}", 1),
    ("2", "\\boxed{18\\ \\text{m}^2}", 0),
    ("18", "<answer>18 sq. ft</answer>", 1),
    ("2", "<answer>18 sq. ft</answer>", 0),
    ("18", "<answer>It takes 18 hours and she has 2 left</answer>", 1),
    ("2", "<answer>It takes 18 hours and she has 2 left</answer>", 0),
    ("15", "The answer is not 15.", 0),
    ("15", "more than 15", 0),
    ("15", "<answer>15 (or 16)</answer>", 0),
    ("15", "<answer>maybe 15, maybe 16</answer>", 0),
    ("15", "<answer>fifteen or sixteen</answer>", 0),
    ("15", "<answer>15 and a half</answer>", 0),
    ("15.5", "<answer>15 and a half</answer>", 1),
    ("15", "<answer>15 squared inches of it</answer>", 0),
    ("15", "<answer>half of 15</answer>", 0),
    ("15", "<answer>15 hours 30 minutes</answer>", 0),
    ("15", "<answer>negative 15</answer>", 0),
    ("-15", "<answer>negative 15</answer>", 1),
    ("15", "<answer>x ≥ 15</answer>", 0),
    ("15", "<answer>15? No, 16</answer>", 0),
    ("15", "<answer>15 16 17</answer>", 0),
    ("15", "<answer>15% of 100</answer>", 0),
    ("2", "<answer>2 hours or 120 minutes in all</answer>", 1),
    ("3", "<answer>3:00 PM</answer>", 1),
    ("15", "14.6 ≈ 15", 1),
    ("15", "So she has 15!", 1),
    ("1500", "<answer>15 hundred of them, for 3 days</answer>", 1),
]

# Answers inside the tags, for 3, 5, 7 and the target 22, and for 10, 4, 60 and 24.
OF_22 = [
    ("not 3*5+7", 0),
    ("3*5 + 7 is the expression", 1),
    ("3*5 + 7 is not it", 0),
    ("3*5 + 7 squared", 0),
    ("|3*5+7|", 0),
    ("3 × 5 + 7", 1),
    ("3·5+7", 1),
    ("3*5−(−7)", 1),
    ("3 \\times 5 + 7", 1),
    ("(3 * 5) + 7", 1),
    ("((3*5)+7)", 1),
    ("$3*5+7$", 1),
    ("$$3*5+7$$", 1),
    ("\\(3*5+7\\)", 1),
    ("\\[3*5+7\\]", 1),
    ("**3*5+7**", 1),
    ("Expression: 3*5+7.", 1),
    ("3*5+7=22", 1),
    ("3*5+7 = 22.", 1),
    ("(=22) 3*5+7", 0),
    ("3*5 + 7 (= 22)", 1),
    ("7 + 3 x 5", 1),
    ("7 + 3 X 5", 1),
    ("\\left(3 \\cdot 5\\right) + 7", 1),
    ("\\boxed{3*5+7}", 1),
    ("$\\boxed{3 \\times 5 + 7 = 22}$", 1),
    ("Answer: 3*5+7", 1),
    ("The answer is 3*5+7", 1),
    ("3*5+7 = 15+7 = 22", 1),
    ("(3 * 5 + 7)", 1),
    ("[3*5]+7", 1),
    ("{3*5}+7", 1),
    ("3\\,*\\,5+7", 1),
    ("\\text{3*5+7}", 1),
    ("We get 22 by 3*5+7", 1),
    ("```\n3*5+7\n```", 1),
    ("Using all the numbers: 3*5+7", 1),
    ("(3*5+7 = 22)", 1),
    ("3 ∙ 5 + 7", 1),
    ("3*5+7;", 1),
    ("+3*5+7", 1),
    ("3*5+7+0", 0),
    ("3*5", 0),
    ("3*5+7 = 23", 0),
    ("3*5+7 or 7+3*5", 0),
    ("3*5=15\n15+7=22", 0),
    ("3//5+7", 0),
    ("3^5+7", 0),
    ("35-7-3-3", 0),
    ("15+7", 0),
    ("3*5+7-1+1", 0),
    ("", 0),
    ("()", 0),
    ("3 5 7", 0),
    ("3*5+7!", 0),
    ("a+3*5+7*0", 0),
    ("\\sqrt{3*5+7}", 0),
    ("7+5+3", 0),
    ("37-15", 0),
    ("3*5+7%", 0),
    ("57-35", 0),
    ("2*3*5+7", 0),
    ("x3*5+7", 0),
    ("3.0*5+7", 1),
    ("3e0*5+7", 0),
    ("3,*5+7", 0),
    ("-3*5+7", 0),
    ("3*5+7/1", 0),
    ("3*5 plus 7", 1),
    ("7 plus 3 multiplied by 5", 1),
    ("7 minus 3 times 5", 0),
    ("3•5+7", 1),
    ("• 3*5+7", 1),
    ("3*5+7=22 (each number once)", 1),
    ("3*5 (first) + 7", 1),
    ("3*5+7 -> 22", 1),
    ("3*5+7 == 22", 1),
    ("First 3*5=15, then 15+7=22. Expression: 3*5+7", 1),
    ("3*5+7. Expression: 15+7", 0),
    ("3*5 → 15 → 15+7 → 22", 0),
    ("3*5 (+7)", 0),
    ("3*5+8 (nearly)", 0),
]
OF_24 = [
    ("\\frac{60}{10}*4", 1),
    ("\\dfrac{60}{10} \\times 4", 1),
    ("\\frac{60 \\cdot 4}{10}", 1),
    ("60÷10×4", 1),
    ("(60/10)(4)", 1),
    ("4(60/10)", 1),
    ("4 \\cdot \\frac{60}{10} = 24", 1),
    ("\\frac{60*4}{10}", 1),
    ("4*\\left(\\frac{60}{10}\\right)", 1),
    ("4 \\frac{60}{10}", 1),
    ("24 = \\frac{60}{10} \\cdot 4", 1),
    ("60 divided by 10 times 4 (done)", 1),
]
# Whole completions, for 22.
WHOLE = [
    ("The steps.\n3*5=15\nso 3*5+7=22", 1),
    ("3*5=15\n15+7=22", 0),
    ("<reasoning>\nw 1+1=2\n</reasoning>\n<answer>\n3*5+7\n", 1),
    ("\\boxed{3*5+7}", 1),
    ("<answer>1</answer> 3*5+7", 0),
    ("1*3 \\boxed{3*5+7} 9+9", 1),
]


@pytest.mark.parametrize(("gold", "completion", "wanted"), NUMBERS)
def test_numbers(gold, completion, wanted):
    assert numbers.equal(gold, completion) == bool(wanted)


@pytest.mark.parametrize(
    ("completion", "of", "target", "wanted"),
    [
        *((f"<answer>\n{text}\n</answer>", [3, 5, 7], 22, wanted) for text, wanted in OF_22),
        *((f"<answer>\n{text}\n</answer>", [10, 4, 60], 24, wanted) for text, wanted in OF_24),
        *((text, [3, 5, 7], 22, wanted) for text, wanted in WHOLE),
    ],
)
def test_arithmetic(completion, of, target, wanted):
    assert right(completion, of, target) == bool(wanted)
    reward = TASKS["countdown"].score(completion, {"numbers": of, "target": target})["equation"]
    assert (reward == 1.0) <= bool(wanted)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{8} at first, then \\boxed{9}", "9"),
        ("\\boxed{8}, $\\boxed{9}$", "8, 9"),
        ("\\boxed{8} \\text{ or } \\boxed{9}", "8, 9"),
        ("\\boxed{8}<answer>9</answer>", "9"),
        ("<answer>\\boxed{8}</answer> The answer is 9.", "8"),
        ("<answer>1</answer><answer>\\boxed{8", None),
        ("<answer>\\boxed{}</answer>", None),
        ("The final answer is $8$. I hope it is correct.", "$8$"),
        ("**Answer:** 8", "8"),
        ("\\fbox{8}", "8"),
        ("\\boxed 8$", "8"),
        ("<answer> 8", "8"),
        ("\\boxed{" * 500, None),
        ("", None),
    ],
)
def test_where_the_answer_is(completion, answer):
    if completion.startswith("<answer>1</answer>"):
        answer = "1"  # an answer that closes comes before one that does not
    assert extract.answer(completion) == answer


SOLUTION = "def add(a, b):\n    return a + b"
FRAMES = [
    "```\n{}\n```", "```py\n{}\n```", "```python3 \n{}\n```", "~~~python\n{}\n~~~", "````python\n{}\n````", "{}",
    "Sure, like this:\n\n{}\n\nIt adds.", "[BEGIN]\n{}\n[DONE]", "```python\n{}\n```\n```\n```", "```python\n{}",
    "```python\n{}\n```\nUsage:\n```python\nprint(add(4, 4))\n```", "<answer>\n```python\n{}\n```\n</answer>",
    "```bash\nls\n```\n```\n{}\n```", "{}\n```\nIt adds.\n```\n5\n```", "```text\n0\n```\n\n{}\n",
    "```python\ndef add(a, b): return 0\n```\nBetter:\n```python\n{}\n```",
    "Sure! ```python\n{}\n```", "```python\n{}```", "Here: ```py\n{}```\nDone.", "{}\n[DONE]\n\nMore.",
    "[PYTHON]\n{}\n[/PYTHON]",
]  # fmt: skip
CHANGES = {"as it is": ("", ""), "CRLF": ("\n", "\r\n"), "indented": ("```", "  ```")}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    "change", [str, lambda text: text.replace("\n", "\r\n"), lambda text: text.replace("```", "  ```")]
)
def test_programs(frame, change):
    completion = change(frame.replace("{}", SOLUTION))
    namespace = {}
    exec(located(completion, ("add",), ""), namespace)  # the test's own program
    assert namespace["add"](2, 3) == 5


@pytest.mark.parametrize("more", ["", "\nUse:\n```python\nprint(add(1, 2))\n```"])
def test_earlier_blocks_give_what_a_program_lacks(more):
    helpers = [
        "zero = 0",
        "from math import (\n    floor,\n)",
        "def low(a):\n    return floor(a)",
        "def plus(a, b):\n    return low(a) + b + zero",
    ]
    blocks = [*helpers, "def add(a, b):\n    return plus(a, b)"]
    namespace = {}
    exec(located("\n\n".join(f"```python\n{block}\n```" for block in blocks) + more, ("add",), ""), namespace)
    assert namespace["add"](2, 3) == 5
    # What it does not use, and what does not parse, is left out.
    others = ["x = input()", "def plus(a, b) return", "def add(a, b):\n    return plus"]
    text = "\n\n".join(f"```python\n{block}\n```" for block in others)
    assert located(text, ("add",), "") == others[-1]


def test_a_program_between_single_back_ticks():
    assert located("Use `add` as in `def add(a, b): return a + b`.", ("add",), "") == "def add(a, b): return a + b"


def test_a_fence_in_a_docstring_ends_no_block():
    inner = '    """Adds.\n\n    ```\n    add(1, 2)\n    ```\n    """\n'
    namespace = {}
    exec(located(f"```python\ndef add(a, b):\n{inner}    return a + b\n```\nDone.", ("add",), ""), namespace)
    assert namespace["add"](2, 3) == 5


PROMPT = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(d):\n    """Of a disc of diameter d."""\n'


@pytest.mark.parametrize(
    "completion",
    [
        "    return math.pi * half(d) ** 2\n",
        "```python\n    return math.pi * half(d) ** 2\n```",
        "    return math.pi * half(d) ** 2\n```\nThat is all.\n```\n3\n```",
        "return math.pi * half(d) ** 2",
        "    return math.pi * half(d) ** 2\n\n\narea(3)\n\n\ndef other():\n    pass\n",
        "\n    return math.pi * half(d) ** 2\n\nThis is the area of the disc.\n",
        "```python\ndef area(d):\n    return math.pi * half(d) ** 2\n```",
        "```python\nfrom __future__ import annotations\ndef area(d: float):\n    return math.pi * half(d) ** 2\n```",
        PROMPT + "    return math.pi * half(d) ** 2\n",
    ],
)
def test_a_prompt_gives_imports_helpers_and_the_head_of_a_body(completion):
    namespace = {}
    exec(located(completion, ("area",), PROMPT), namespace)
    assert namespace["area"](2) == pytest.approx(np.pi)


def located(completion, names, prompt):
    place = code.programs.locate(completion, names, prompt)
    return code.programs.complete(code.programs.joined(completion, place), names, prompt)


def test_reward_and_metric_of_a_program_are_one_verdict(monkeypatch):
    row = code.to_row("here", {"question": "Write one().", "test_cases": ["assert one() == 1"]})
    verdicts = iter([code.Verdict.REFUSED, code.Verdict.TIMED_OUT, code.Verdict.PASSED])
    monkeypatch.setattr(code.sandbox, "judge", lambda programs, backend: [[next(verdicts)] for _ in programs])
    completion = "```python\ndef one():\n    return 1  # judged once\n```"
    # A program that no sandbox has run is judged again, one near its limit of time is not.
    assert [code.measure(completion, row)["passed"] for _ in range(2)] == [0, 0]
    assert code.score(completion, row)["tests"] == 0 and next(verdicts) == code.Verdict.PASSED


def test_rows_of_an_array_with_imports_for_their_tests(tmp_path):
    row = {"prompt": "Write half(x).", "code": "def half(x):\n    return x / 2", "test_imports": ["import math"],
           "test_list": ["assert math.isclose(half(3), 1.5)"]}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row], indent=1))
    rows = TASKS["code"].rows(path=tmp_path / "rows.json")
    assert TASKS["code"].metrics([f"```python\n{row['code']}\n```"], rows)["passed"] == 1
    (tmp_path / "rows.json").write_text('[{"prompt": 1},\n 2]')
    with pytest.raises(UserError, match="item 2: a JSON object"):
        code.read(tmp_path / "rows.json", sandboxed=False)
    (tmp_path / "rows.json").write_text('[{"prompt": 1},\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        code.read(tmp_path / "rows.json", sandboxed=False)


def test_graders_are_chosen_by_name():
    completion, row = "\\boxed{4x}", {"answer": "y = 4x"}
    assert TASKS["math"].grader == resolve("math", grader="robust").grader == "robust"
    public = resolve("math", grader="public")
    assert public.weights == TASKS["math"].weights and public.metrics_named == TASKS["math"].metrics_named
    assert TASKS["math"].reward([completion], [row]) == 0 and public.reward([completion], [row]) == 2
    assert resolve("math", grader="public").grader == "public"
    with pytest.raises(UserError, match="config.task.grader.*robust, public"):
        resolve("math", grader="strict")
