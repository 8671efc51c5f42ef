"""docs/reference/python.md is true to the code: what it names exists, and nothing is left out."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.live.save_options import SaveKeywords, SaveOptions
from megatron.bridge.models.wrapping import BuildKeywords

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "python.md").read_text("utf-8")

# What clients of the families have beyond the base class.
QWEN = "megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider"
OF_THE_FAMILY = {"transformer_layer_spec": QWEN, "spatial_merge_size": QWEN}


def resolved(path: str) -> Any:
    """An object by its dotted path."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)


def rows() -> Iterator[tuple[str, str]]:
    """(heading, code in the first cell) of every row of every table."""
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading = re.match(r"`([\w.]+)`", section)
        if heading is None:
            continue
        for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
            for code in re.findall(r"`([^`]+)`", cell):
                yield heading[1], code


ROWS = list(rows())
HEADINGS = {heading for heading, _ in ROWS}


def own_arguments(function: Any) -> set[str]:
    return {*inspect.signature(function).parameters} - {"self"}


@pytest.mark.parametrize(("heading", "code"), ROWS)
def test_what_the_page_names_exists(heading: str, code: str) -> None:
    name, _, arguments = code.partition("(")
    owner = OF_THE_FAMILY.get(name, heading)
    if "(" in code:
        said = {one.strip() for one in arguments.rstrip(")").split(",") if one.strip()}
        assert said == own_arguments(resolved(f"{owner}.{name}"))
    elif name not in names_of(resolved(owner)):
        assert resolved(f"{owner}.{name}") is not None


def names_of(owner: Any) -> set[str]:
    """Attributes of instances, and for a provider the arguments that have a table of their own."""
    if not inspect.isclass(owner):
        return set()
    names = {name for one in inspect.getmro(owner) for name in inspect.get_annotations(one)}
    names |= set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(owner)))
    build = getattr(owner, "provide_distributed_model", None)
    return names | (own_arguments(build) if build else set())


def public(kind: type) -> set[str]:
    """Methods and properties that a class itself defines."""
    return {
        name
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
    }


@pytest.mark.parametrize(
    "heading",
    [
        "megatron.bridge.AutoBridge",
        "megatron.bridge.models.model_provider.ModelProvider",
        "megatron.bridge.models.conversion.param_mapping.AutoMapping",
    ],
)
def test_every_public_name_is_on_the_page(heading: str) -> None:
    said = {code.partition("(")[0] for place, code in ROWS if place == heading}
    assert public(resolved(heading)) <= said


def test_every_argument_of_a_build_has_its_row() -> None:
    heading = "megatron.bridge.models.model_provider.ModelProvider"
    build = resolved(heading).provide_distributed_model
    said = {code for place, code in ROWS if place == heading}
    assert own_arguments(build) <= said
    assert own_arguments(build) == set(BuildKeywords.__annotations__)


def test_every_option_and_field_has_its_row() -> None:
    for heading in (
        "megatron.bridge.live.save_options.SaveOptions",
        "megatron.bridge.live.conversion_tasks.ConversionTask",
    ):
        said = {code for place, code in ROWS if place == heading}
        assert said == set(resolved(heading).__dataclass_fields__)
    assert set(SaveKeywords.__annotations__) == set(SaveOptions.__dataclass_fields__)


def test_links_lead_to_headings() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert len(links) > 4
    assert set(links) <= anchors
