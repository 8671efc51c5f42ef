"""The picture: results as an SVG of its own, for light and for dark pages, 700 pixels wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from benchmarks.cases import MEMORY, SPEED
from benchmarks.figures import CaseResult, Results
from benchmarks.rounds import COPY_HF, EXPORT, IMPORT, VERIFY

_WIDTH, _MARGIN = 700, 20
_LEFT, _RIGHT = 84, 560
"""Where bars begin, and where the longest of them ends; its value stands behind it."""

_ROW, _BAR, _LINE, _GAP = 24, 14, 18, 6
_STEPS = (IMPORT, EXPORT, VERIFY)
_MIB = 2**20

_STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.page { fill: #ffffff; } .heading { font-size: 15px; font-weight: 600; }
.model { font-weight: 600; } .quiet { fill: #59636e; }
.bar { fill: #2f81d6; } .own { fill: #b6c3d1; } .grid { stroke: #d1d9e0; }
.copy { stroke: #1f2328; stroke-width: 1.5; } .goal { stroke: #bc4c00; stroke-width: 3; }
.range { stroke: #0b3a6b; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .page { fill: #0d1117; } .quiet { fill: #9198a1; }
  .bar { fill: #4493f8; } .own { fill: #4a5563; } .grid { stroke: #30363d; }
  .copy { stroke: #e6edf3; } .goal { stroke: #f0883e; } .range { stroke: #cae3ff; }
}
""".strip()


@dataclass
class _Drawing:
    """Elements from top to bottom; `y` is where the next one goes."""

    elements: list[str] = field(default_factory=list)
    y: float = _MARGIN

    def text(self, x: float, text: str, style: str = "", anchor: str = "start") -> None:
        """Text on the row at `y`."""
        self.elements.append(
            f'<text class="{style}" x="{x:.1f}" y="{self.y + 12:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def bar(self, begin: float, end: float, style: str) -> None:
        """A bar on the row at `y`."""
        self.elements.append(
            f'<rect class="{style}" x="{begin:.1f}" y="{self.y:.1f}" '
            f'width="{max(0.0, end - begin):.1f}" height="{_BAR}" rx="2"/>'
        )

    def line(self, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line from (x1, y1) to (x2, y2)."""
        self.elements.append(
            f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def svg(self, title: str) -> str:
        """The whole file."""
        height = round(self.y + _MARGIN)
        name = escape(title)
        return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" \
viewBox="0 0 {_WIDTH} {height}" role="img">
<title>{name}</title>
<style>
{_STYLE}
</style>
<rect class="page" width="{_WIDTH}" height="{height}" rx="6"/>
{"\n".join(self.elements)}
</svg>
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to places, from 0 at `_LEFT` to `most` at `_RIGHT`."""

    most: float

    def __call__(self, value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * value / self.most

    def marks(self, distance: float) -> Iterator[float]:
        """Multiples of `distance`, 0 included."""
        return (number * distance for number in range(int(self.most / distance) + 1))


def plot(results: Results) -> str:
    """Time beside the copy, then memory; what was not measured is left out."""
    drawing = _Drawing()
    if fast := [case for case in results.cases if case.role == SPEED]:
        _draw_time(drawing, fast)
        drawing.y += _ROW
    if held := [case for case in results.cases if case.role in (SPEED, MEMORY)]:
        # Behind each model the larger one that it is compared with.
        held.sort(key=lambda case: (case.base or case.name, case.hf_bytes))
        _draw_memory(drawing, held)
    return drawing.svg("Time and memory of import, export and verify beside cp and sync")


def _draw_time(drawing: _Drawing, cases: Sequence[CaseResult]) -> None:
    figures = [case.figures(step) for case in cases for step in _STEPS]
    longest = max(f.ratio.max for f in figures if f.ratio is not None)
    scale = _Scale(1.05 * max(1.0, longest, *(case.goal or 0 for case in cases)))
    _heading(drawing, "Time of the whole process beside that of cp and sync: less is better")
    x = float(_MARGIN)
    for style, label, width in (
        ("copy", "the copy", 76),
        ("goal", "goal", 52),
        ("range", "least and greatest", 0),
    ):
        drawing.line(style, x, drawing.y + 8, x + 14, drawing.y + 8)
        drawing.text(x + 20, label, "quiet")
        x += 30 + width
    drawing.y += _ROW
    top = drawing.y
    below = len(drawing.elements)
    for case in cases:
        _model(drawing, case, f", copied at {case.figures(COPY_HF).gb_per_second:.2f} GB/s")
        for step in _STEPS:
            one = case.figures(step)
            if one.ratio is None:
                continue
            drawing.text(_LEFT - 10, step, anchor="end")
            drawing.bar(_LEFT, scale(one.ratio.median), "bar")
            between = (_ROW - _BAR) / 2
            copied = scale(1)
            drawing.line("copy", copied, drawing.y - between, copied, drawing.y + _BAR + between)
            middle = drawing.y + _BAR / 2
            drawing.line("range", scale(one.ratio.min), middle, scale(one.ratio.max), middle)
            if case.goal is not None and step != VERIFY:
                place = scale(case.goal)
                drawing.line("goal", place, drawing.y - 3, place, drawing.y + _BAR + 3)
            value = max(scale(one.ratio.max), scale(1), scale(case.goal or 0)) + 8
            drawing.text(value, f"{one.ratio.median:.2f}")
            drawing.text(value + 38, f"{one.gb_per_second:.2f} GB/s", "quiet")
            drawing.y += _ROW
    _axis(drawing, scale, top, below)


def _draw_memory(drawing: _Drawing, cases: Sequence[CaseResult]) -> None:
    most = max(case.figures(step).peak_bytes for case in cases for step in _STEPS) / _MIB
    scale = _Scale(1.02 * most)
    _heading(drawing, "Peak anonymous memory, MiB")
    x = float(_MARGIN)
    for style, label in (("own", "the interpreter and its imports"), ("bar", "the conversion")):
        drawing.bar(x, x + 14, style)
        drawing.text(x + 20, label, "quiet")
        x += 230
    drawing.y += _ROW
    top = drawing.y
    below = len(drawing.elements)
    for case in cases:
        _model(drawing, case)
        for step in _STEPS:
            one = case.figures(step)
            peak = one.peak_bytes / _MIB
            own = min(one.own_bytes / _MIB, peak)
            drawing.text(_LEFT - 10, step, anchor="end")
            drawing.bar(_LEFT, scale(own), "own")
            drawing.bar(scale(own), scale(peak), "bar")
            drawing.text(scale(peak) + 8, f"{peak:.0f}")
            drawing.y += _ROW
    _axis(drawing, scale, top, below)


def _heading(drawing: _Drawing, text: str) -> None:
    drawing.text(_MARGIN, text, "heading")
    drawing.y += _ROW


def _model(drawing: _Drawing, case: CaseResult, more: str = "") -> None:
    drawing.y += _GAP
    drawing.text(_MARGIN, f"{case.title}, {case.hf_bytes / 1e9:.2f} GB{more}", "model")
    drawing.y += _ROW


def _axis(drawing: _Drawing, scale: _Scale, top: float, below: int) -> None:
    """Lines behind the elements from number `below` on, and the values that they stand for."""
    distance = _distance(scale.most)
    bars = drawing.elements[below:]
    del drawing.elements[below:]
    for mark in scale.marks(distance):
        drawing.line("grid", scale(mark), top + _ROW + _GAP - 4, scale(mark), drawing.y)
    drawing.elements += bars
    for mark in scale.marks(distance):
        drawing.text(scale(mark), f"{mark:g}", "quiet", anchor="middle")
    drawing.y += _LINE


def _distance(most: float) -> float:
    """A round number that goes into `most` about five times."""
    return next(
        d
        for power in range(-2, 12)
        for d in (10.0**power, 2.5 * 10.0**power, 5 * 10.0**power)
        if most <= 6 * d
    )
