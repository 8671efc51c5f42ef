"""The look of all tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite

from rich import box
from rich.table import Table
from rich.text import Text

from megatron.bridge.text.folding import fold


def facts(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """Two columns, name and value; rows whose value is None are left out."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return table


def listing(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """A table with a header; the columns named in `right` hold numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    numbers = set(right)
    for column in columns:
        if column in numbers:
            table.add_column(column, justify="right", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    return table


def carried_table(carried: Mapping[str, str]) -> Table:
    """Tensors that have no place in the Megatron model, and why; alike names are folded."""
    table = listing("Taken over from the reference as they are", "tensors", "because")
    for reason in dict.fromkeys(carried.values()):
        for name in fold([name for name, why in carried.items() if why == reason]):
            table.add_row(Text(name), reason)
    return table


def verdict(good: bool, yes: str, no: str) -> Text:
    """A line in green or red."""
    return Text(yes, style="green") if good else Text(no, style="red")


def number(value: float) -> str:
    """A number, as in ``1.23e-05``; ``0`` for zero; words for what is not finite."""
    if not isfinite(value):
        return "not finite"
    return f"{value:.2e}" if value else "0"
