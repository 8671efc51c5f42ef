"""Reports as documents: every field under its own name, and nothing that JSON has not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf, nan
from pathlib import Path

import pytest

from megatron.bridge.text.document import UNSTATED, spread, stated, to_document


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Size:
    rows: int
    columns: int


@dataclass(frozen=True)
class Report:
    folder: Path
    sizes: tuple[Size, ...]
    by_color: Mapping[Color, Size]
    errors: list[float]
    nothing: str | None
    good: bool
    secret: object = field(default=None, metadata=UNSTATED)

    @stated
    def count(self) -> int:
        return len(self.sizes)

    @property
    def not_stated(self) -> int:
        return 1

    @spread
    def more(self) -> Mapping[str, object]:
        return {"a": Size(5, 6), "b": nan}


@dataclass(frozen=True)
class LongerReport(Report):
    seconds: float = 0.5

    @stated
    def count(self) -> int:
        return super().count + 1

    @stated
    def last(self) -> str:
        return "last"


REPORT = Report(
    Path("a/b"),
    (Size(1, 2), Size(3, 4)),
    {Color.RED: Size(7, 8)},
    [1.5, inf, -inf, nan],
    None,
    True,
)
DOCUMENT = {
    "folder": "a/b",
    "sizes": [{"rows": 1, "columns": 2}, {"rows": 3, "columns": 4}],
    "by_color": {"red": {"rows": 7, "columns": 8}},
    "errors": [1.5, None, None, None],
    "nothing": None,
    "good": True,
    "count": 2,
    "a": {"rows": 5, "columns": 6},
    "b": None,
}


def test_fields_and_stated_properties_are_the_keys() -> None:
    found = to_document(REPORT)
    assert found == DOCUMENT
    assert list(found) == list(DOCUMENT)
    assert found["good"] is True
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_report_that_is_another_and_more() -> None:
    found = to_document(LongerReport(**vars(REPORT)))
    assert found == DOCUMENT | {"seconds": 0.5, "count": 3, "last": "last"}


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, ValueError("no"), Size], ids=["object", "set", "error", "class"]
)
def test_what_has_no_form_is_a_fault(value: object) -> None:
    with pytest.raises(TypeError, match="has no form in a document"):
        to_document({"key": [value]})


def test_a_property_of_a_report_is_a_property() -> None:
    assert (REPORT.count, REPORT.more["a"]) == (2, Size(5, 6))
    assert isinstance(Report.count, property)
