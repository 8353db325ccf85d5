r"""Final answers in the forms that five benchmarks document, with the right verdict on each.

Written by hand; no problem of the benchmarks is in here. ``right`` are other ways to give the
reference answer, ``wrong`` are one character away from the reference or from one of those.
"""

from __future__ import annotations

from typing import NamedTuple


class Answer(NamedTuple):
    form: str
    reference: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


ANSWERS = [
    # MATH: LaTeX inside \boxed{}.
    Answer("MATH", r"\frac{3}{4}", (r"\dfrac{3}{4}", "0.75"), (r"\dfrac{3}{5}", "0.76")),
    Answer("MATH", r"\frac{14}{3}", (r"\frac{28}{6}", "14/3"), (r"\frac{28}{7}", "-14/3")),
    Answer("MATH", r"2\sqrt{3}", (r"\sqrt{12}", r"2 \sqrt3"), (r"\sqrt{13}", r"2\sqrt{5}")),
    Answer("MATH", r"\frac{\sqrt{2}}{2}", (r"\frac{1}{\sqrt{2}}",), (r"\frac{2}{\sqrt{2}}",)),
    Answer("MATH", r"-\frac{1}{2}", (r"\frac{-1}{2}", "-0.5"), (r"\frac{1}{2}", "-0.4")),
    Answer("MATH", r"\frac{1}{2^{99}}", ("2^{-99}",), (r"\frac{1}{2^{98}}", "2^{-98}")),
    Answer("MATH", "10^{50}+1", ("1+10^{50}",), ("10^{50}+2", "10^{50}-1", "2+10^{50}")),
    Answer("MATH", r"12\pi", (r"12 \pi", "12π"), (r"13\pi", r"12", r"1\pi")),
    Answer("MATH", r"90^\circ", ("90", "90^{\\circ}", "90 degrees"), ("91", r"9^\circ")),
    Answer("MATH", r"\$18.90", ("18.90", "$18.9$", r"\$18.9"), ("18.91", r"\$19.90")),
    Answer("MATH", r"\text{\$}5", ("5", r"\$5", "5 dollars"), ("6", r"\$51")),
    Answer("MATH", r"32{,}348", ("32348", "32,348", r"32\,348"), ("32,347", r"32\,34")),
    Answer("MATH", "5\\text{ cm}", ("5", "5 cm", r"5\mathrm{~cm}"), ("6 cm", r"5\mathrm{~mm}")),
    Answer("MATH", r"6\text{ cm}^2", ("6", "6 cm^2", "6 square cm"), ("6 cm^3", "7")),
    Answer("MATH", r"15\%", ("15%", "15", "0.15"), ("16%", "0.16")),
    Answer("MATH", "x^2+2x+1", ("(x+1)^2", "1+2x+x^2"), ("(x+1)^3", "1+2x-x^2")),
    Answer("MATH", r"\frac{n(n+1)}{2}", (r"\frac{n^2+n}{2}",), (r"\frac{n^2+n}{3}",)),
    Answer("MATH", "2t", ("2 t", "t+t"), ("2", "2s", "t-t")),
    Answer("MATH", "3x", ("3 x", r"3 \cdot x"), ("3", "3y")),
    Answer("MATH", "(2,1)", ("(2, 1)", r"\left(2,1\right)"), ("(3,1)", "(2,-1)")),
    Answer("MATH", "(1,2)", (r"\left( 1, 2 \right)",), ("[1,2)", "(1,3)", "(1,2]")),
    Answer("MATH", r"[0,\infty)", (r"[0, \infty)", r"x \in [0,\infty)"), (r"(0,\infty)",)),
    Answer("MATH", "1,-2", ("-2,1", "-2, 1", r"-2 \text{ and } 1"), ("1,2", "-2,-1")),
    Answer("MATH", "x=1,y=2", ("y = 2, x = 1", "x=1 and y=2"), ("x=1,y=3", "x=1,z=2")),
    Answer("MATH", "5", ("x=5", "5.0", "x = y = 5"), ("6=5", "x=4", "6", "x = y = 6")),
    Answer("MATH", "y=2x+3", ("y = 3 + 2x", "2x+3", "2x-y=-3"), ("y=2x+4", "2x-y=3", "z=2x+3")),
    Answer("MATH", r"\begin{pmatrix}1\\2\end{pmatrix}", (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",),
           (r"\begin{pmatrix}1\\3\end{pmatrix}",)),
    Answer("MATH", r"\text{east}", ("east", r"\textbf{East}", "EAST"), ("eat", r"\text{easy}")),
    Answer("MATH", r"\text{Evelyn}", ("Evelyn", r"\mathrm{Evelyn}"), ("Evelin", "Eveln")),
    Answer("MATH", "no solution", (r"\text{no solution}",), ("so solution", r"\text{no solutio}")),
    Answer("MATH", "2516_8", ("2516_{8}", "2516"), ("2516_9", "2517_{8}")),
    Answer("MATH", r"\frac{\pi}{6}", (r"\pi/6",), (r"\pi/5", r"\frac{\pi}{3}")),
    Answer("MATH", "3:2", ("3 : 2",), ("2:2", "3:1")),
    Answer("MATH", r"0.\overline{3}", (r"\frac{1}{3}", "0.333333"), ("0.333334", r"\frac{2}{3}")),
    Answer("MATH", "p - q", ("p-q", "-q+p"), ("p+q", "p-r")),
    # GSM8K: a number after "#### ", here already taken from behind it.
    Answer("GSM8K", "1234", ("1,234", "1234.00", r"\$1,234"), ("1,235", "124", "1234.01")),
    Answer("GSM8K", "72", ("72 clips", r"72\text{ clips}", "72."), ("73 clips", "7", "-72")),
    Answer("GSM8K", "5.5", ("5.50", r"5\frac{1}{2}", "11/2"), ("5.51", r"5\frac{1}{3}")),
    Answer("GSM8K", "10", ("$10", "10 dollars", "10.0"), ("$100", "1 dollars", "10.1")),
    Answer("GSM8K", "0.00001", ("1e-5", "10^{-5}"), ("0.00002", "0.0001", "1e-6")),
    Answer("GSM8K", "25%", ("25", r"25\%", "25 percent"), ("26", "2%", "255%")),
    Answer("GSM8K", "3 hours", ("3", "3 hrs", r"3\text{ hours}"), ("4 hrs", "3 hurs")),
    # AIME: an integer from 0 to 999, sometimes with leading zeros.
    Answer("AIME", "073", ("73", "073."), ("74", "07", "0733")),
    Answer("AIME", "468", (r"\textbf{468}", "468.0"), ("469", "-468", "46")),
    Answer("AIME", "25", ("025", "n = 25"), ("26", "n = 24", "2")),
    Answer("AIME", "902", ("902.", r"\mathbf{902}"), ("912", "90", "9020")),
    # GPQA: the letter of one of four choices.
    Answer("GPQA", "B", ("(B)", r"\text{B}", "B.", "B) 12 m/s"), ("C", "(D)", "A.", "C) 12 m/s")),
    Answer("GPQA", "(A)", ("A", r"\textbf{(A)}", "(A) 3.5 eV"), ("B", "(C)", "(D) 3.5 eV")),
    # MMLU-Pro: the letter of one of up to ten choices.
    Answer("MMLU", "J", ("(J)", r"\text{J}", "J: all of the above"), ("I", "(H)", r"\text{G}")),
    Answer("MMLU", "C", ("C", r"\mathrm{C}", "Option C"), ("D", "Option B", r"\mathrm{A}")),
]  # fmt: skip
