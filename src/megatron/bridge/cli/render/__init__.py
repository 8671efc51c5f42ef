"""Results as rich tables that fit 100 columns. Importing this imports neither rich nor a table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLES = {
    "CompareReport": ("comparison_tables", "render_compare"),
    "Converted": ("conversion_tables", "render_conversion"),
    "FastReport": ("verification_tables", "render_verify_fast"),
    "Forecast": ("forecast_tables", "render_forecast"),
    "HFReport": ("inspection_tables", "render_hf"),
    "MadeModel": ("conversion_tables", "render_made_model"),
    "MegatronReport": ("inspection_tables", "render_megatron"),
    "VerifyReport": ("verification_tables", "render_verify"),
}
"""The module here and its function that make the tables, by the class of the report."""


def render(report: object) -> RenderableType:
    """The tables of a report."""
    module, function = TABLES[type(report).__name__]
    tables: RenderableType = getattr(import_module(f"{__name__}.{module}"), function)(report)
    return tables
