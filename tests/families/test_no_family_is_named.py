"""Families are data: no module outside of theirs knows one by name."""

import re
from pathlib import Path

import pytest

import megatron.bridge.errors

SOURCE = Path(megatron.bridge.errors.__file__).parent
FAMILIES = SOURCE / "models" / "qwen_vl"
NAMES = re.compile(
    r"qwen|deepstack|mrope|\bmtp\b|vision_model|language_model|visual|text_config|vision_config"
    r"|vision_start|image_grid",
    re.IGNORECASE,
)
ALLOWED = {
    # The one import, and transformers' names of the sections of a config.
    "models/catalog.py": r"megatron\.bridge\.models\.qwen_vl",
    "models/hf_pretrained/config.py": r'TEXT, VISION = "text_config", "vision_config"',
    # MTP is megatron-core's word, too, for a part that a model may be built without.
    "cli/commands/plan.py": r"such as mtp",
    "cli/commands/convert.py": r"MTP layer",
    "models/pipeline_stages.py": r"LayerType\.mtp",
    "models/nearest_layout.py": r"LayerType\.mtp",
}


@pytest.mark.parametrize(
    "module",
    [path for path in sorted(SOURCE.rglob("*.py")) if FAMILIES not in path.parents],
    ids=lambda path: path.relative_to(SOURCE).as_posix(),
)
def test_no_family_is_named(module: Path) -> None:
    allowed = ALLOWED.get(module.relative_to(SOURCE).as_posix())
    text = module.read_text("utf-8")
    if allowed is not None:
        assert re.search(allowed, text), "nothing has to be allowed any more"
        text = re.sub(allowed, "", text)
    assert NAMES.findall(text) == []


def test_the_names_are_those_of_families() -> None:
    found = {
        match.lower()
        for path in FAMILIES.rglob("*.py")
        for match in NAMES.findall(path.read_text("utf-8"))
    }
    assert {"qwen", "deepstack", "mrope", "mtp", "visual"} <= found
