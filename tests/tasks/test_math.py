"""What mathematical answers say: every kind of spelling with the verdict worked out by hand."""

# ruff: noqa: RUF001, RUF005 - the signs that answers are written with

from __future__ import annotations

import pytest

from ogls.records import Problem, Verdict
from ogls.tasks.answers import after_thinking, last_boxes
from ogls.tasks.by_kind import ByKind
from ogls.tasks.math import MathVerifier
from ogls.tasks.multiple_choice import ChoiceVerifier
from ogls.tasks.reading import read_gold
from ogls.tasks.reasoning_gym import ReasoningGym, ReasoningGymVerifier
from ogls.tasks.tool_use import ToolUseVerifier

UNPARSABLE = Verdict(correct=False, status="unparsable")


def verdict(gold: str, text: str, **options: bool) -> Verdict:
    return MathVerifier(**options).grade(Problem(id="p", text="?", answer=gold), text)


def table(rows: str) -> list[tuple[str, str, bool]]:
    """Lines "gold | answer in the box | yes or no"."""
    found = []
    for row in rows.strip().splitlines():
        gold, answer, right = (cell.strip() for cell in row.split(" | "))
        found.append((gold, answer, {"yes": True, "no": False}[right]))
    return found


def check(gold: str, answer: str, right: bool) -> None:
    assert verdict(gold, f"So it is $\\boxed{{{answer}}}$.").correct == right, (gold, answer)


WORDS = r"""
31 | 31 marbles | yes
31 | 31 red marbles. | yes
31 | 31 marbles per jar | yes
31 | \text{31 marbles} | yes
31 | 31\ \text{marbles} | yes
31 | 31~\mathrm{days} | yes
31 | 31 (marbles) | yes
31 | 31 (in metres) | yes
31 | The answer is 31 marbles. | yes
31 | 31 years old | yes
31 | 31st | yes
31 | \text{Total} = 31 | yes
31 | \$31 | yes
31 | 31 euros | yes
31 | USD 31 | yes
31 (pens) | 31 | yes
31 (pens) | 31 pens | yes
31 (pens) | 32 | no
31 pens | 31 | yes
31 \text{ pens} | 31 | yes
31 | not 31 | no
31 | 31 degrees below zero | no
31 | 31 hundredths | no
31 | 31 is wrong | no
31 | 31 squared | no
31 | 31 repeating | no
31 | less than 31 | no
31 | 31 million | no
31000000 | 31 million | yes
31 | 31x | no
31 | 31ab | no
31ab | 31 | no
31ab | 31ba | yes
31x | 31 | no
31 | 32 marbles | no
31 \text{ hours} | 31 minutes | no
31 \text{ hours} | 31 h | yes
31 \text{ km/h} | 31 kilometers per hour | yes
31 \text{ km/h} | 31 mph | no
31\mbox{ cm}^2 | 31 square centimetres | yes
31\mbox{ cm}^2 | 31 cm | no
31 \mathrm{~m\,s^{-1}} | 31 | yes
9.8 | 9.8\ \mathrm{m/s^2} | yes
2\sqrt{7} | 2\sqrt{7} meters | yes
2\sqrt{7} | 3\sqrt{7} meters | no
31 | 31\% | yes
31\% | 0.31 | yes
31 | 0.31 | no
70^\circ | 70 degrees | yes
70 | 70\text{°C} | yes
\text{Tuesday} | Tuesday. | yes
\text{Tuesday} | \textbf{tuesday} | yes
\text{Tuesday} | Monday | no
\text{(D)} | D | yes
no real roots | \text{No real roots} | yes
"""


@pytest.mark.parametrize(("gold", "answer", "right"), table(WORDS))
def test_words_and_units_after_a_value(gold: str, answer: str, right: bool) -> None:
    check(gold, answer, right)


WRITING = r"""
6 | **6** | yes
6 | *6* | yes
6 | `6` | yes
6 | **6** pens | yes
6 | = 6 | yes
6 | 6 = | yes
6 | \therefore x = 6 | yes
3\sqrt{5} | 3\sqrt{5}. | yes
a-2 | a-2. | yes
(3,4) | (3,4). | yes
\{3,4\} | \{3,4\}. | yes
7-2i | 7-2\mathrm{i} | yes
7-2\mathrm{i} | 7-2i | yes
7-i | 7-\mathrm i | yes
1+i | \frac{2+2i}{2} | yes
12\mathrm{i} | 12 | no
2-\frac{3}{\mathrm{e}} | 2-3e^{-1} | yes
\frac{3}{4} | ¾ | yes
\frac{11}{4} | 2¾ | yes
\frac{11}{4} | 2\frac34 | yes
30 | 30° | yes
\sqrt{7} | √7 | yes
\frac{\pi}{4} | π/4 | yes
x^2 | x² | yes
-4 | −4 | yes
4 | ４ | yes
2500000 | 2.5 × 10⁶ | yes
3.5\times 10^{-7} | 3.5e-7 | yes
3.5\times 10^{-7} | 3.5E-07 | yes
3.5\times 10^{-7} | 3.5*10^-7 | yes
3.5\times 10^{-7} | 35e-8 m | yes
3.5\times 10^{-7} | 3.5e-8 | no
2\sqrt{5} | 2*sqrt(5) | yes
\frac{1}{3} | 0.\overline{3} | yes
45000 | 45 000 | yes
45 | 4 5 | no
9 | 4 5 | no
R+r | 2r | no
"""


@pytest.mark.parametrize(("gold", "answer", "right"), table(WRITING))
def test_ways_of_writing(gold: str, answer: str, right: bool) -> None:
    check(gold, answer, right)


EXACT = r"""
0 | 0.0000004 | no
0 | 10^{-30} | no
\frac{1}{3^{70}} | 3^{-70} | yes
\frac{1}{3^{70}} | \frac{1}{3^{71}} | no
x+\frac{1}{3^{70}} | x+\frac{1}{3^{71}} | no
0.00000007 | \frac{7}{10^{8}} | yes
0.00000007 | \frac{8}{10^{8}} | no
0.00000007x | 0.00000008x | no
[0,3^{-70}] | [0,3^{-71}] | no
\frac{2}{3} | 0.6666667 | no
0.6666667 | \frac{2}{3} | no
\sqrt{3} | 1.7320508 | no
\pi | 3.1415927 | no
3^{900} | 3^{900}+1 | no
3^{900}+\sqrt{2} | 3^{900}+\sqrt{3} | no
0.3 | 0.1+0.2 | yes
\frac{1}{2} | \cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7} | yes
\sqrt{3}+\sqrt{5} | \sqrt{8+2\sqrt{15}} | yes
-\frac{1}{2} | \cos\frac{2\pi}{5}+\cos\frac{4\pi}{5} | yes
\sec^2(y) | 1+\tan^2(y) | yes
(a+b)^2 | a^2+2ab+b^2 | yes
(a+b)^2 | a^2+b^2 | no
\sqrt{x^2} | x | no
"""


@pytest.mark.parametrize(("gold", "answer", "right"), table(EXACT))
def test_numbers_are_compared_exactly(gold: str, answer: str, right: bool) -> None:
    check(gold, answer, right)


BASES = r"""
32_4 | 32_4 | yes
32_4 | 32_{\text{four}} | yes
32_4 | 32 \text{ (base 4)} | yes
32_4 | (32)_4 | yes
32_4 | 32_5 | no
32_4 | 32 | no
32_4 | 14 | no
14 | 32_4 | no
14 | 32_4 = 14 | yes
7 | 13_4 | no
2F_{16} | 2\text{F}_{16} | yes
2F_{16} | 2E_{16} | no
32_{10} | 32 | yes
34_4 | 34_4 | no
x_4 | x_5 | no
x_4 | x_4 | yes
"""


@pytest.mark.parametrize(("gold", "answer", "right"), table(BASES))
def test_the_base_of_a_numeral_counts(gold: str, answer: str, right: bool) -> None:
    check(gold, answer, right)


CONTRADICTIONS = r"""
6 | 6 or 8 | no
6 | 6, 8 | no
6 | 6; 8 | no
6 | 6 \text{ and } 8 | no
6 | x=6, x=8 | no
6 | x = 6 \text{ or } x = 8 | no
6 | \pm 6 | no
6 | 6 = 7 | no
6 | 7 = 6 | no
6 | x = 2 \cdot 4 = 6 | no
6 | x = 2 \cdot 3 = 6 | yes
6 | 6 (or 8) | no
6 | 6 (not 8) | no
6 | 6 \approx 8 | no
6 | 6, 6 | yes
\frac{2}{3} | \frac{2}{3} \approx 0.67 | yes
\frac{2}{3} | \frac{2}{3} \approx 0.68 | no
0.67 | \frac{2}{3} \approx 0.67 | yes
6,8 | x=8 \text{ or } x=6 | yes
6,8 | 6 | no
6,8 | 6,8,9 | no
6,-6 | \pm 6 | yes
2 \pm \sqrt{3} | 2+\sqrt{3}, 2-\sqrt{3} | yes
2 \pm \sqrt{3} | 2+\sqrt{3} | no
x=1,y=2 | y=2, x=1 | yes
x=1,y=2 | x=2, y=1 | no
x=1,y=2 | 2, 1 | no
(1,2),(5,6) | (5,6),(1,2) | yes
(1,2),(5,6) | (2,1),(5,6) | no
\{4,9\} | 9, 4 | yes
(4,9) | 9, 4 | no
1,1,2 | 1,2,2 | no
4,900 | 4900 | yes
4,900 | 4, 900 | yes
3x+y=5 | 5 | no
y=3x-1 | 3x-1 | yes
f^{-1}(x)=\frac{x}{2} | \frac{x}{2} | yes
[2,5) | [2,5] | no
2\le x<5 | [2,5) | yes
"""


@pytest.mark.parametrize(("gold", "answer", "right"), table(CONTRADICTIONS))
def test_one_value_is_no_list_and_no_contradiction(gold: str, answer: str, right: bool) -> None:
    check(gold, answer, right)


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("4,6,9", r"They are \boxed{4}, \boxed{6} and \boxed{9}.", True),
        ("4,6,9", r"They are \boxed{4}, \boxed{6} and \boxed{8}.", False),
        ("4,6,9", "- \\boxed{9}\n- \\boxed{6}\n- \\boxed{4}", True),
        ("4,6,9", "(a) $\\boxed{4}$\n(b) $\\boxed{6}$\n(c) $\\boxed{9}$", True),
        ("-2,5", r"$x=\boxed{-2}$ or $x = \boxed{5}$", True),
        ("-2,5", r"\boxed{-2} \quad\text{and}\quad \boxed{5}", True),
        ("(2,3),(3,2)", r"$\boxed{(2,3)} \text{ and } \boxed{(3,2)}$", True),
        ("9", r"\boxed{7}, \boxed{8}, \boxed{9}", False),
        ("9", r"Either \boxed{9} or \boxed{8}.", False),
        ("9", r"\boxed{9}\boxed{8}", False),
        ("9", "Option 1: \\boxed{8}\nOption 2: \\boxed{9}", False),
        ("9", r"\boxed{9}, that is \boxed{9}", True),
        ("9", r"\boxed{9}, \boxed{9.0}", True),
        ("9", r"First \boxed{8}. No: I forgot one. So \boxed{9}.", True),
        ("9", r"First \boxed{9}. No: I forgot one. So \boxed{10}.", False),
        ("9", r"\boxed{\boxed{9}}", True),
    ],
)
def test_successive_boxes_are_one_answer(gold: str, text: str, right: bool) -> None:
    assert verdict(gold, text).correct == right


def test_boxes_that_are_one_answer() -> None:
    assert last_boxes(r"\boxed{1}. Hence \boxed{2}, \boxed{3}, \boxed{3} and \fbox{\boxed{4}}") == ["2", "3", "4"]
    assert last_boxes("none") == []


THOUGHTS = [
    ("{} </think> I cannot tell.", False),
    ("<think> {} </think> I cannot tell.", False),
    ("<think> {}", False),
    ("<think> first </think> a <think> {} </think> b", False),
    ("<think> hm </think> {}", True),
    ("<think> hm </think> {} <think> and on", True),
    ("hm </think> {}", True),
    ("{}", True),
]


@pytest.mark.parametrize(("text", "right"), THOUGHTS)
def test_thoughts_are_no_answer(text: str, right: bool) -> None:
    sums = ReasoningGym("chain_sum", size=1)[0]
    calls = Problem(id="p", text="?", answer='[{"Action": "go", "Action_Input": "{}"}]', kind="tooluse")
    for problem, answer, careless in [
        (Problem(id="p", text="?", answer="17"), r"\boxed{17}", MathVerifier(after_thinking=False)),
        (Problem(id="p", text="?", answer="17"), "it is 17.", MathVerifier(after_thinking=False, last_number=True)),
        (Problem(id="p", text="?", answer="B", kind="mcq"), "<answer>B</answer>", ChoiceVerifier(after_thinking=False)),
        (sums, f"<answer>{sums.answer}</answer>", ReasoningGymVerifier(after_thinking=False)),
        (calls, "\nAction: go\nAction Input: {}\n", ToolUseVerifier(after_thinking=False)),
    ]:
        written = text.replace("{}", answer)
        strict = MathVerifier(last_number=True) if "it is" in answer else ByKind()
        assert strict.grade(problem, written).correct == right, written
        assert careless.grade(problem, written).correct


def test_what_follows_the_thoughts() -> None:
    assert after_thinking("a</think>b</think>c<think>d") == "c"
    assert after_thinking("a") == "a"


@pytest.mark.parametrize(
    "gold",
    [
        "3*4=<<3*4=12>>12 pens\n#### 12",
        "The bisectors meet in one point.",
        "See the figure.",
        "x is even",
        "7:15a..",
        "nan",
        "NaN",
        "null",
        "9^{9^{9^9}}",
        "5" * 500,
        "\\frac{1}{",
        "1 = 2",
        "34_4",
        "???",
    ],
)
def test_a_gold_answer_that_cannot_be_read_has_no_right_answer(gold: str) -> None:
    """Equal spelling would hide it."""
    assert read_gold(gold) == () or len(gold) > 400 or "^{9^" in gold
    assert verdict(gold, f"\\boxed{{{gold}}}") == UNPARSABLE


@pytest.mark.parametrize(
    "gold",
    [
        "12",
        "3/4",
        "x+1",
        "no solution",
        "Friday",
        r"\text{east}",
        "7:15 p.m.",
        r"k\pi, k \in \mathbb{Z}",
        "2:3",
        "May 5",
    ]
    + [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"(-\infty, 3] \cup [4, 5)", "$6", r"\boxed{6}", r"y'=2x", r"f(2)<f(1)"]
    + [r"\frac{a}{b}", "5 cm", "15%", r"\emptyset", r"\sum_{k=1}^{n} k^2", r"\overline{AB}", "A, C"],
)
def test_gold_answers_that_can_be_read(gold: str) -> None:
    assert verdict(gold, f"\\boxed{{{gold}}}").correct
    for wrong in ("", "xyzzy", "0", "nan", "13"):
        assert not verdict(gold, f"\\boxed{{{wrong}}}").correct


def test_votes_of_one_number_are_one_vote() -> None:
    answers = ("1.5", r"\frac{3}{2}", "1.5 cups", "**1.5**", r"x = 1\frac12", "3/2")
    assert {verdict("7", f"\\boxed{{{answer}}}").answer for answer in answers} == {"3/2"}
