"""Every key of transformers' configs of the families is in the table, and is what that says."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import torch

import transformers_keys
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.transformers_defaults import (
    declared_aliases,
    declared_defaults,
)
from megatron.bridge.models.qwen_vl.config_keys import (
    CONFIG_KEYS,
    MROPE_SECTION,
    Derived,
    Field,
    Ignored,
    Only,
)
from oracle import text_models, tiny
from small_configs import (
    ALONE,
    FAMILIES,
    OTHERS,
    WITH_VISION,
    changed,
    changed_alone,
    outcome,
    small,
)


def source() -> transformers_keys.TransformersSource:
    """The installed package, or the one that TRANSFORMERS_SOURCE names (`make test-keys`)."""
    installed = util.find_spec("transformers")
    assert installed is not None
    assert installed.submodule_search_locations
    folder = os.environ.get("TRANSFORMERS_SOURCE", installed.submodule_search_locations[0])
    return transformers_keys.TransformersSource(Path(folder))


def known(model_type: str) -> set[transformers_keys.SectionKey]:
    return {(section, key) for section, uses in CONFIG_KEYS[model_type].items() for key in uses}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_config_classes_take(model_type: str) -> None:
    declared = source().declared_keys(model_type)
    assert len(declared) > (60 if model_type in WITH_VISION else 40)
    for section in CONFIG_KEYS[model_type]:
        assert {(section, "rope_scaling"), (section, "per_layer_config")} <= declared
    assert sorted(declared - known(model_type)) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_modeling_code_reads(model_type: str) -> None:
    read = source().read_keys(model_type)
    assert "rope_parameters" in {key for section, key in read if section != "vision_config"}
    assert (("vision_config", "head_dim") in read) == (model_type in WITH_VISION)
    anywhere = {key for _, key in known(model_type)}
    if transformers_keys.is_text_of_another(model_type):
        # Code of the whole model reads keys that this part of its config does not have.
        anywhere |= {key for _, key in known(model_type.removesuffix("_text"))}
    absent = {
        (section, key)
        for section, key in read - known(model_type)
        if section != transformers_keys.ANY_SECTION or key not in anywhere
    }
    assert sorted(absent) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_section_of_mrope(model_type: str) -> None:
    """It is the one default that no config class gives; without it a token has one position."""
    expected = source().mrope_section(model_type)
    assert MROPE_SECTION.get(model_type) == (None if expected is None else tuple(expected))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_read_from_the_source_are_those_of_the_class(model_type: str) -> None:
    from transformers import AutoConfig

    declared = declared_defaults(model_type)
    # What is switched off is taken away, and here not read.
    switch = {"use_sliding_window"} & declared.keys()
    made = AutoConfig.for_model(model_type, **dict.fromkeys(switch, True)).to_dict()
    assert len(declared) > 20
    for path, value in declared.items():
        *sections, key = path.split(".")
        found = made
        for section in sections:
            found = found[section]
        names = [key, *(n.rpartition(".")[2] for n in declared_aliases(model_type).get(path, ()))]
        [stored] = [found[name] for name in names if name in found] or [None]
        if value is not None and path not in switch:  # what is None there is made by code
            assert stored == value, path


@cache
def unchanged(model_type: str) -> tuple[dict[str, Any], Any]:
    """The outcome of the small config itself."""
    return outcome(small(model_type))


def entries(*kinds: type) -> Iterator[Any]:
    for model_type, sections in CONFIG_KEYS.items():
        for section, uses in sections.items():
            for key, use in uses.items():
                if isinstance(use, kinds):
                    yield pytest.param(
                        model_type, section, key, use, id=f"{model_type}-{section}.{key}"
                    )


@pytest.mark.parametrize(("model_type", "section", "key", "use"), entries(Field))
def test_a_mapped_key_sets_the_fields_that_the_table_names(
    model_type: str, section: str, key: str, use: Field
) -> None:
    before, _ = unchanged(model_type)
    after, _ = outcome(changed(model_type, section, key))
    if section == "vision_config":
        before, after = before["vision"], after["vision"]
    else:
        bridge = bridge_for(HFConfig.from_dict(small(model_type)).architecture)
        module, _, name = bridge.provider.rpartition(".")
        provider = getattr(import_module(module), name)
        assert set(use.names) <= {field.name for field in fields(provider)} | {"hidden_act"}
        provider.from_settings(after)
    for name in use.names:
        assert after[name] == OTHERS[key]
        assert before[name] != after[name]


@pytest.mark.parametrize(("model_type", "section", "key", "use"), entries(Derived))
def test_a_key_that_is_read_with_others_changes_the_outcome(
    model_type: str, section: str, key: str, use: Derived
) -> None:
    if OTHERS[key] is None or key in ("mamba_ssm_dtype", "mtp_use_dedicated_embeddings"):
        return  # the kind of model, or files: tests of their own
    if key in ("dtype", "torch_dtype") and section == "vision_config":
        return  # the tower has the dtype of the rest
    assert outcome(changed_alone(model_type, section, key)) != unchanged(model_type)


@pytest.mark.parametrize(("model_type", "section", "key", "use"), entries(Only))
def test_a_key_with_one_value_is_refused_by_name_with_another(
    model_type: str, section: str, key: str, use: Only
) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.?{key} is .*only .* can be converted"):
        outcome(changed(model_type, section, key))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ignored_keys_change_nothing_in_transformers_and_nothing_here(model_type: str) -> None:
    ignored = [
        (section, key)
        for section, uses in CONFIG_KEYS[model_type].items()
        for key, use in uses.items()
        if isinstance(use, Ignored) and key != "return_dict"
        # Without a dict transformers' own forward ends with an error.
    ]
    assert len(ignored) > 15
    # All at once: there is one key to look for if there is a difference at all.
    others = small(model_type)
    for section, key in ignored:
        target = others[section] if section else others
        target[key] = copy.deepcopy(OTHERS[key])
    assert outcome(others) == unchanged(model_type)
    assert torch.equal(logits_of(others), logits_of(small(model_type)))


def logits_of(config: dict[str, Any]) -> torch.Tensor:
    """Of transformers' model, with the same weights each time, for words and a picture."""
    from transformers import AutoConfig

    data = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    if config["model_type"] in ALONE:
        model = text_models.of_config(ALONE[config["model_type"]], data)
        with torch.no_grad():
            found = model(torch.tensor([[9, 302, 300, 303, 17, 23, 42]]), use_cache=False)
        return found[0] if isinstance(found, tuple) else found.logits
    model = tiny.build_hf_model(AutoConfig.for_model(config["model_type"], **data))
    pixels = torch.linspace(-1, 1, 8 * 6 * 3 * 2 * 16 * 16).view(48, -1)
    ids = torch.tensor([[9, 302, *[300] * 12, 303, 17, 23, 42]])
    with torch.no_grad():
        found = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 300).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 8, 6]]),
            use_cache=False,
        )
    return found[0] if isinstance(found, tuple) else found.logits
