"""The robust grader of mathematics: answers of every kind, right and wrong, and the spellings of one answer."""

import pytest

from gdsd_jax.tasks.graders import compare

# The right answer, an answer, and 1 where they say the same.
MATH = r"""
x=5 | 5 | 1
y = 2x + 3 | 2x+3 | 0
y = 2x + 3 | y=2x+3 | 1
y = 2x + 3 | 2x - y + 3 = 0 | 1
y = 2x + 3 | y - 3 = 2x | 1
y = 2x + 3 | y = 3x+2 | 0
y = -2x | -2x | 0
2k+2 | f(k) = 2k+2 | 1
p - q | x = p-q | 1
x < -5 \text{ or } x > 1 | x < -5 \text{ and } x > 1 | 0
x < -5 \text{ or } x > 1 | x > 1 \text{ or } x < -5 | 1
(-\infty,-2) \cup (-2,2) \cup (2,\infty) | x \ne \pm 2 | 1
(-\infty,2) \cup (2,\infty) | x \ne \pm 2 | 0
7\text{ m/s} | 7\,\mathrm{m/s} | 1
7\text{ m/s} | 7\ \frac{\text{m}}{\text{s}} | 1
7\text{ m/s} | 7\ \frac{\text{m}}{\text{s}^2} | 0
7\text{ m} | 7\,\mathrm{g} | 0
46 | \text{46 is the answer} | 1
37,500 | 37500 | 1
37,500 | 500, 37 | 0
\text{(C)} | \textbf{(C)}\ 12 | 1
\text{(C)} | \text{(C)} + 1 | 0
46 | \text{46 is not the answer} | 0
a_n = 4n - 3 | 4n-3 | 1
x_1 = 4n | 4n | 0
f(x) = 5^x | y = 5^x | 1
f(x) = 5^x | g(x) = 5^x | 0
f(2) = 5 | y = 5 | 0
c = 8 | c = 8 \text{ only} | 1
50^\circ | 50\% | 0
30\% | 30 \text{ km} | 0
30\% \text{ of the class} | 30\% | 1
2,000,000 | 2,00,000 | 0
2,000,000 | 2000000 | 1
x \in [-2,7] | [-2,7] | 1
x \in [-2,7] | -2 \le x \le 7 | 1
x \in [-2,7] | (-2,7) | 0
x \in [-2,7] | y \in [-2,7] | 0
(3,4] | 3 < x \leq 4 | 1
(3,4] | x \in (3,4] | 1
(3,4] | 3 \le x < 4 | 0
(-\infty, 0] | x \le 0 | 1
(-\infty, 0] | (-∞,0] | 1
(-\infty, 2) \cup (3, \infty) | x<2 or x>3 | 1
(-\infty, 2) \cup (3, \infty) | (3,\infty)\cup(-\infty,2) | 1
(-\infty, 2) \cup (3, \infty) | (-inf, 2) U (3, inf) | 1
(-\infty, 2) \cup (3, \infty) | (2,3) | 0
\mathbb{R} \setminus \{2\} | x \neq 2 | 1
(-\infty,2)\cup(2,\infty) | x \ne 2 | 1
(-\infty,\infty) | \mathbb{R} | 1
(-\infty,\infty) | \text{all real numbers} | 1
\emptyset | \text{no solution} | 1
3, 5, 7 | 7, 5, 3 | 1
3, 5, 7 | 3, 5 | 0
3, 5, 7 | 3, 5, 7, 7 | 0
3, 5, 7 | \{3,5,7\} | 1
3, 5, 7 | 3, 5 \text{ and } 7 | 1
3, 5, 7 | 3, 5, and 7. | 1
1,-2 | x = 1 \text{ or } x = -2 | 1
1,-2 | x = 1, -2 | 1
1,-2 | x_1 = 1, x_2 = -2 | 1
1,-2 | x \in \{1,-2\} | 1
(6,31,-1) | 6,31,-1 | 1
(6,31,-1) | (6,-1,31) | 0
(6,31,-1) | a=6, b=31, c=-1 | 1
(6,31,-1) | (a,b,c) = (6,31,-1) | 1
(6,31,-1) | \{6,31,-1\} | 0
(3,4) | y=4, x=3 | 1
(3,4) | x=4, y=3 | 0
\left( 3, \frac{\pi}{2} \right) | r = 3, \theta = \frac{\pi}{2} | 1
\left( 3, \frac{\pi}{2} \right) | (3, \pi/2) | 1
\left( 3, \frac{\pi}{2} \right) | (3, 90^\circ) | 1
52_8 | 52 | 0
52_8 | 42 | 0
52_8 | (52)_8 | 1
52_8 | 52_{\text{eight}} | 1
52_8 | 52_{10} | 0
4210_{5} | 4210_5 | 1
2:45 | 2:45 \text{ p.m.} | 1
2:45 | 2{:}45 | 1
2:45 | \frac{2}{45} | 0
2:45 \text{ PM} | 2:45 \text{ AM} | 0
2:3 | 3:2 | 0
2:3 | 2/3 | 1
3:2:1 | 3:2:1 | 1
75\% | 75 | 1
75\% | \frac34 | 1
75 | 75\% | 1
75 | 0.75 | 0
0.15 | 15\% | 1
0.15 | 15 | 0
12\% | 12 percent | 1
15\mbox{ cm}^2 | 15 cm^2 | 1
15\mbox{ cm}^2 | 15 \text{ square centimeters} | 1
15\mbox{ cm}^2 | 15 \text{ sq cm} | 1
15\mbox{ cm}^2 | 15 \text{ cm} | 0
15\mbox{ cm}^2 | 15 \text{ m}^2 | 0
864 \mbox{ inches}^2 | 864 \text{ in}^2 | 1
864 \mbox{ inches}^2 | 864 square inches | 1
\$36 | 36 | 1
\$36 | \$36.00 | 1
\$36 | 36 dollars | 1
\$36 | 36 \text{ cents} | 0
\$18.90 | 18.9 | 1
\$32,\!348 | 32348 | 1
\$32,\!348 | \$32,348 | 1
5.4 \text{ cents} | 5.4 | 1
5 | 5 \text{ million} | 0
5000000 | 5 \text{ million} | 1
5 | 5x | 0
5 | 5 + x | 0
7 | 7 apples | 1
7 | 7 \text{ apples or } 8 \text{ pears} | 0
7 | 7 \text{ if } x > 0 | 0
7 | \text{at least } 7 | 0
7 | \text{more than }7 | 0
7 | 7 \text{ or more} | 0
7 | n=7 | 1
7 | n \geq 7 | 0
7 | \approx 7 | 1
7 | -7 | 0
7 | |{-7}| | 1
-7 | −7 | 1
\frac{14}{3} | 4\frac{2}{3} | 1
\frac{14}{3} | 4.666667 | 1
\frac{14}{3} | 4.67 | 0
\frac{14}{3} | 4.6666 | 0
\frac{14}{3} | 14/3 | 1
\frac{14}{3} | \frac{28}{6} | 1
\frac{14}{3} | 4 2/3 | 1
3\sqrt{13} | 3√13 | 1
3\sqrt{13} | 3 \sqrt 13 | 0
3\sqrt{13} | \sqrt{117} | 1
3\sqrt{13} | 3*sqrt(13) | 1
3\sqrt{13} | 10.8167 | 0
6 - 5i | 6-5i | 1
6 - 5i | -5i+6 | 1
6 - 5i | 6+5i | 0
90^\circ | \frac{\pi}{2} | 1
90^\circ | 90 degrees | 1
90^\circ | 90 | 1
90^\circ | 90^{\circ} | 1
90^\circ | x=90° | 1
90^\circ | \angle ABC = 90^\circ | 1
\text{(C)} | C | 1
\text{(C)} | (C) | 1
\text{(C)} | \textbf{(C)} | 1
\text{(C)} | D | 0
\text{(C)} | \text{C.} | 1
\text{east} | East | 1
\text{east} | west | 0
\text{ellipse} | \text{an ellipse} | 1
\text{ellipse} | Ellipse. | 1
\text{Navin} | Navin | 1
\text{Tom} | Tom | 1
\text{Yes} | yes | 1
x^3+3x-6 | x^{3} + 3x - 6 | 1
x^3+3x-6 | x**3 + 3*x - 6 | 1
x^3+3x-6 | x^3+3x+6 | 0
(a+5)(b+2) | ab+2a+5b+10 | 1
\cot x | \frac{\cos x}{\sin x} | 1
\cot x | 1/\tan x | 1
\cot x | \tan x | 0
6r^2-4r-24 | 6r²−4r−24 | 1
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{bmatrix} -1&0\\0&-1\end{bmatrix} | 1
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix} -1 & 0 \\ 0 & 1 \end{pmatrix} | 0
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} | \begin{pmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{pmatrix} | 1
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} | \left(-\frac13, \frac23, \frac53\right) | 0
1 \pm \sqrt{19} | 1-\sqrt{19}, 1+\sqrt{19} | 1
1 \pm \sqrt{19} | 1+\sqrt{19} | 0
3 \pm 2 \sqrt{2} | \{3-2\sqrt2, 3+2\sqrt2\} | 1
3 \pm 2 \sqrt{2} | 3 \mp 2\sqrt2 | 1
\{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5, 1-\sqrt5 | 1
\{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5 | 0
\frac{x^2}{9}+\frac{y^2}{4}=1 | 4x^2+9y^2=36 | 1
\frac{x^2}{9}+\frac{y^2}{4}=1 | 9x^2+4y^2=36 | 0
x^2+y^2=25 | x^2 + y^2 - 25 = 0 | 1
x^2+y^2=25 | x^2 + y^2 = 5^2 | 1
.0000672 | 6.72 \times 10^{-5} | 1
.0000672 | 6.72e-5 | 1
.0000672 | .0000673 | 0
11,\! 111,\! 111,\! 100 | 11111111100 | 1
11,\! 111,\! 111,\! 100 | 11,111,111,100 | 1
11,\! 111,\! 111,\! 100 | 11{,}111{,}111{,}100 | 1
58,500 | 58500 | 1
\frac{270}7\text{ degrees} | \frac{270}{7}^\circ | 1
\frac{270}7\text{ degrees} | 38\frac{4}{7} | 1
\frac{20000}{\pi} | 20000/\pi | 1
\frac{11+9a}{20} | \frac{9a+11}{20} | 1
\frac{11+9a}{20} | (11+9a)/20 | 1
\frac{11+9a}{20} | 0.55+0.45a | 1
2^{100} | 2^{101} | 0
100! | 101! | 0
\binom{50}{10} | \binom{50}{40} | 1
\binom{50}{10} | \binom{50}{11} | 0
5 \pmod{12} | x \equiv 5 \pmod{12} | 1
5 \pmod{12} | 5 (mod 12) | 1
5 \pmod{12} | 5 \pmod{13} | 0
x>5 | 2x > 10 | 0
x>5 | x-5>0 | 0
|x|<1 | (-1,1) | 1
|x-2| \le 3 | [-1,5] | 1
\text{even} | odd | 0
42 | **42** | 1
42 | \text{42} | 1
42 | 42 \quad | 1
42 | {42} | 1
42 | \{42\} | 1
42 | \mathbf{42.} | 1
42 | \text{Answer: } 42 | 1
42 | The final answer is 42. | 1
42 | \therefore 42 | 1
42 | \boxed{42} | 1
42 | \fbox{42} | 1
42 | 42 + 0 | 1
42 | 42 or 43 | 0
42 | 42, 43 | 0
42 | 42 43 | 0
42 | 4 2 | 0
42 | 42\ | 1
42 | \,42 | 1
42 | 42;  | 1
42 | 42^\circ | 1
42 | 42? | 0
42 | \text{Area} = 42 | 1
42 | AB = 42 | 1
42 | \overline{AB} = 42 | 1
42 | P(A) = 42 | 1
42 | a+b = 42 | 0
42 | 2a = 42 | 0
42 | a^2 = 42 | 0
42 | \sqrt{x}=42 | 0
42 | -x=42 | 0
42 | x=y=42 | 1
42 | 6\cdot 7 = 42 | 1
42 | 6 \times 7 | 1
42 | 42 = 6 \times 7 | 1
42 | 6 \times 8 = 42 | 0
42 | x = 6\cdot 7 = 42 | 1
42 | x = 6\cdot 8 = 42 | 0
42 | A = \frac{1}{2}bh = 42 | 1
42 | \lfloor 42.7 \rfloor | 1
2\pi | 2pi | 1
2\pi | 6.283185 | 0
2\pi | 2\pi \text{ cm} | 1
0 | 0.0 | 1
0 | -0 | 1
0 | \sin \pi | 1
\infty | +\infty | 1
\infty | -\infty | 0
1 | 1.0000001 | 0
1 | 0.9999999 | 0
\frac{1}{2} | .5 | 1
\frac{1}{2} | 50\% | 1
\frac{1}{2} | 0.5\% | 0
\frac{1}{2} | 1:2 | 1
1,2 | (1,2) | 1
1,2 | (2,1) | 0
(1,2) | [1,2] | 0
\{1,2\} | (1,2) | 0
\sqrt{2},\sqrt{3} | √3, √2 | 1
\log_2 3 | \frac{\ln 3}{\ln 2} | 1
\log 2 | \ln 2 | 0
\log 2 | \log_{10} 2 | 1
x^2 | y^2 | 0
f(x) = x^2+1 | x^2+1 | 1
f(x) = x^2+1 | f(x) = 1+x^2 | 1
f(x) = x^2+1 | f(x) = x^2 | 0
a_n = 2n+1 | a_n = 1+2n | 1
1331 \text{ and } 1728 | 1728, 1331 | 1
1331 \text{ and } 1728 | 1728 | 0
18 | 18^{\text{th}} | 1
18 | 18th | 1
3 \text{ hours} | 3 | 1
3 \text{ hours} | 3 h | 0
3 \text{ hours} | 3 \text{ hr} | 1
3 \text{ hours} | 180 \text{ minutes} | 0
2\sqrt{2}+3 | 3+2√2 | 1
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt3} | 1
x<3 | x \leq 3 | 0
x<3 | 3>x | 1
2x+y<3 | y < 3-2x | 1
2x+y<3 | y > 3-2x | 0
2x+y<3 | 4x+2y<6 | 1
\begin{cases} 1 \\ 2 \end{cases} | \begin{cases} 1 \\ 3 \end{cases} | 0
\int x dx | \int y dy | 0
5 | 5 \text{ hundredths} | 0
\frac{3}{5} | 3 \text{ fifths} | 1
3 | 3 \text{ fifths} | 0
5 | 5 \text{ squared} | 0
5 | 5 \text{ choose } 2 | 0
5 | 5\text{ feet } 6\text{ inches} | 0
5 | 5\text{ cm by }3\text{ cm} | 0
5 | 5\text{ out of }12 | 0
|x+5| | x+5 | 0
\sqrt{x-5} | (x-5)^{1/2} | 1
12\sqrt{3} | x = 12\sqrt{3} \approx 20.78 | 1
20.78 | 12\sqrt{3} \approx 20.78 | 1
12\sqrt{3} | 12\sqrt{3} \approx 21.78 | 0
43 | 42 \approx 43 | 0
(3.2,4.1) | x \approx 3.2, y \approx 4.1 | 1
3 | 3:00 \text{ PM} | 1
3 | 3:30 \text{ PM} | 0
3 \text{ p.m.} | 3:00 \text{ PM} | 1
3 \text{ p.m.} | 3:00 \text{ AM} | 0
12 | \text{twelve apples} | 1
12 | twelve or thirteen | 0
12 | \text{twelve and a half} | 0
12 | not twelve | 0
2 | two thirds | 0
-\frac{1}{2} | minus three | 0
3.5 | three and a half | 1
30^\circ | \frac{\pi}{6} | 1
\frac{\pi}{6} | 30^\circ | 1
30 | \frac{\pi}{6} | 0
30^\circ | 30\text{ radians} | 0
\frac{\pi}{2} | \pi \sin 30^\circ | 1
8 | P(3) = 8 | 1
P(x) = 2x+1 | 2x+1 | 1
P(x) = 2x+1 | Q(x) = 2x+1 | 0
8 | P(x+1) = 8 | 0
3 \pmod 7 | 3 | 1
3 | 3 \pmod 7 | 1
10 | 10 \pmod 7 | 0
3:4 | 6:8 | 1
3:45 | 1:15 | 0
(1,234) | 1234 | 0
13 | 13_{10} | 1
\text{(C)} | \textbf{(C) } 5 | 1
\text{(C)} | \text{(C) or (D)} | 0
\text{ellipse} | \text{not an ellipse} | 0
9^{9^{9}} | 9^{9^{9}} | 1
9^{9^{9}} | 9^{9^{8}} | 0
"""


@pytest.mark.parametrize("line", MATH.strip().splitlines())
def test_mathematics(line):
    pair, wanted = line.rsplit(" | ", 1)
    gold, answer = pair.split(" | ", 1)
    assert compare.equal(gold, answer) == bool(int(wanted))


GOLDS = [
    "5", "-12", "\\frac{7}{12}", "3\\sqrt{7}", "2\\pi", "12\\text{ cm}", "40^\\circ", "15\\%", "x^2-4x+1", "(2,-5)",
    "[0,4)", "1,-3", "\\{2,5\\}", "y = 3x - 1", "x = 4", "m \\ge 2", "(-\\infty,1)\\cup(6,\\infty)", "4 - 9i", "132_5",
    "7:15", "3:4:6", "2 \\pm \\sqrt{6}", "\\begin{pmatrix} 2 \\\\ -1 \\end{pmatrix}", "\\text{west}", "\\text{(D)}",
    "1,\\!500", ".0031", "2^{-70}", "8 \\pmod{9}", "\\$45", "6\\frac{1}{4}", "a_{12}",
]  # fmt: skip


def spellings(gold):
    """The gold in ten spellings, each by a rule."""
    return [
        gold, f" {gold} ", f"${gold}$", f"\\({gold}\\)", f"{gold}.", f"\\boxed{{{gold}}}",
        gold.replace("\\frac", "\\dfrac"), f"\\displaystyle {gold}", f"\\text{{The answer is }} {gold}",
        f"{{{gold}}}\\,",
    ]  # fmt: skip


@pytest.mark.parametrize("gold", GOLDS)
def test_ten_spellings_of_one_answer(gold):
    assert [text for text in spellings(gold) if not compare.equal(gold, text)] == []


def test_no_two_of_the_answers_are_equal():
    found = [(one, other) for one in GOLDS for other in GOLDS if one != other and compare.equal(one, other)]
    assert found == []


HARD = [
    "9^{9^{9^{9}}}", "(9!)!!", "((10^{10})!)!", "\\binom{10^9}{10^8}", "e^{e^{e^{e^{e}}}}", "\\sin(10^{10^{10}})",
    "2" * 1999, "(" * 900 + ")" * 900, "\\frac{1}" * 400, "x" * 1999, "-" * 1999, "1," * 999, "\\sqrt" * 399,
    "{" * 1999, "|" * 999, "\\pm" * 600, "\\cup" * 400, "<" * 999, "1<" * 999, "=" * 999, "\\begin{pmatrix}" * 100,
    "9" * 300 + "!", "f(" * 500, "\\log_{1}2", "0^{-1}", "\\tan 90^\\circ", "1/0", "\\infty-\\infty", "\\{\\}",
    "1e400", "x_{x_{x}}", "2^{2^{2^{2^{2^{2}}}}}",
    "+".join(f"e^{{{n}}}" for n in range(2000, 2180)), "+".join(f"x^{{{n}.5}}" for n in range(1000, 1180)),
]  # fmt: skip


@pytest.mark.parametrize("text", HARD)
def test_what_is_hard_to_read_or_to_compute_is_only_wrong(text):
    for gold in ("3", "x^2", "\\frac{1}{2}, 5", "(1, 2)", "y = 3x"):
        assert not compare.equal(gold, text)
    compare.equal(text, text)
