"""The one cause of many wrong tensors: said alone, in words that a person can act on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron.bridge.cli import main
from megatron.bridge.errors import BridgeError, PlanError
from plans_of import (
    DENSE_35,
    EMBEDDING,
    FAMILIES,
    HEAD,
    LANGUAGE,
    MOE_35,
    TIED,
    VISION,
    VL,
    VL_MOE,
    Specs,
    plan,
    tensors_of,
    with_names,
)


def refusal(config: dict[str, Any], tensors: Specs) -> list[str]:
    """The lines of the message: heading, causes or problems, next step."""
    with pytest.raises(BridgeError) as error:
        plan(config, tensors)
    lines = str(error.value).splitlines()
    assert len(lines) <= 6
    assert "download again" not in str(error.value)
    return lines


def other(config: dict[str, Any], section: str, **changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config[section] |= changes
    return config


# --- sizes ---

SIZES = {
    "vocab_size": ({"vocab_size": 307}, "text_config.vocab_size is 307, the files have 300: set"),
    "intermediate_size": (
        {"intermediate_size": 59},
        "text_config.intermediate_size is 59, the files have 56: set",
    ),
    "hidden_size": ({"hidden_size": 44}, "text_config.hidden_size is 44, the files have 40: set"),
    "num_attention_heads": (
        {"num_attention_heads": 8},
        "text_config.num_attention_heads x head_dim is 96, the files have 72: set",
    ),
    "num_key_value_heads": (
        {"num_key_value_heads": 3},
        "text_config.num_key_value_heads x head_dim is 36, the files have 24: set",
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_size_for_which_all_tensors_agree_on_another_one(size: str) -> None:
    change, said = SIZES[size]
    heading, cause = refusal(other(VL, "text_config", **change), tensors_of(VL))
    assert heading.startswith("the conversion is not proven: ")
    assert cause.startswith(f"  - {said} it (")


@pytest.mark.parametrize("config", [VL_MOE, MOE_35])
def test_sizes_of_experts(config: dict[str, Any]) -> None:
    changed = other(config, "text_config", moe_intermediate_size=36)
    lines = refusal(changed, tensors_of(config))
    assert lines[1].startswith("  - text_config.moe_intermediate_size is 36, the files have 28")
    wider = other(config, "text_config", hidden_size=52)
    assert (
        "text_config.hidden_size is 52, the files have 40" in refusal(wider, tensors_of(config))[1]
    )


def test_a_resized_vocabulary_of_a_tied_model() -> None:
    tensors = tensors_of(TIED)
    tensors[EMBEDDING] = replace(tensors[EMBEDDING], shape=(320, 40))
    lines = refusal(TIED, tensors)
    assert lines[1].startswith("  - text_config.vocab_size is 300, the files have 320: set it")
    tensors |= {HEAD: replace(tensors[EMBEDDING], name=HEAD)}
    assert refusal(TIED, tensors)[1] == lines[1]


def test_one_of_two_tensors_of_another_size_is_that_tensor() -> None:
    tensors = tensors_of(VL)
    tensors[HEAD] = replace(tensors[HEAD], shape=(320, 40))
    _, problem, advice = refusal(VL, tensors)
    assert problem == f"  - {HEAD}: the config asks for shape (300, 40) [V H], found (320, 40)"
    assert advice.startswith("Check that config.json and the weights belong to one")


def test_a_config_of_another_model() -> None:
    changed = other(VL, "text_config", hidden_size=48, intermediate_size=64, vocab_size=512)
    _, cause = refusal(changed, tensors_of(VL))
    assert cause.startswith("  - config.json belongs to another model than the weights: ")
    assert "text_config.hidden_size is 48, the files have 40" in cause


def test_sizes_of_the_vision_tower() -> None:
    changed = other(VL, "vision_config", num_position_embeddings=49)
    _, cause = refusal(changed, tensors_of(VL))
    assert "vision_config.num_position_embeddings is 49, the files have 2304: set it" in cause


# --- counts and parts ---


@pytest.mark.parametrize("family", FAMILIES)
def test_more_layers_in_the_config_than_in_the_files(family: str) -> None:
    config = FAMILIES[family]
    text = {"num_hidden_layers": 6}
    if "layer_types" in config["text_config"]:
        text["layer_types"] = [*config["text_config"]["layer_types"], *["full_attention"] * 2]  # type: ignore[assignment]
    _, cause = refusal(other(config, "text_config", **text), tensors_of(config))
    said = "text_config.num_hidden_layers is 6, the files hold 4 layers (0...3): set it to 4"
    assert said in cause


def test_more_vision_blocks_in_the_config_than_in_the_files() -> None:
    changed = other(VL, "vision_config", depth=5)
    _, cause = refusal(changed, tensors_of(VL))
    assert "vision_config.depth is 5, the files hold 3 vision blocks (0...2): set it to 3" in cause


def without(tensors: Specs, *roots: str) -> Specs:
    return {name: spec for name, spec in tensors.items() if not name.startswith(roots)}


ABSENT = {
    "the vision tower is absent: ": (VISION,),
    "the language model is absent: ": (LANGUAGE,),
    "the output layer is absent: 1 tensor (lm_head.weight); set tie_word": (HEAD,),
    "of 4 layers, number 1 is absent: 11 tensors (": (f"{LANGUAGE}layers.1.",),
    "of 4 layers, numbers 0,2 are absent: 22 tensors": (
        f"{LANGUAGE}layers.0.",
        f"{LANGUAGE}layers.2.",
    ),
    "all 4 layers are absent: 44 tensors": (f"{LANGUAGE}layers.",),
    "of 3 vision blocks, number 0 is absent: 12 tensors": (f"{VISION}blocks.0.",),
}


@pytest.mark.parametrize("said", ABSENT)
def test_an_absent_part_is_one_line(said: str) -> None:
    _, cause = refusal(VL, without(tensors_of(VL), *ABSENT[said]))
    assert cause.startswith(f"  - {said}")


def test_two_absent_parts_are_two_lines() -> None:
    _, *causes = refusal(VL, without(tensors_of(VL), VISION, HEAD))
    assert [cause.split(":")[0] for cause in causes] == [
        "  - the vision tower is absent",
        "  - the output layer is absent",
    ]


# --- names ---

WRAPPED: dict[str, Callable[[str], str]] = {
    "_orig_mod": lambda n: n.replace("layers.", "layers._orig_mod."),
    "_checkpoint_wrapped_module": lambda n: n.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "_fsdp_wrapped_module": lambda n: ".".join(
        part + "._fsdp_wrapped_module" * part.isdecimal() for part in n.split(".")
    ),
}


@pytest.mark.parametrize("word", WRAPPED)
@pytest.mark.parametrize("config", [VL, MOE_35])
def test_a_wrapper_in_the_middle_of_names(config: dict[str, Any], word: str) -> None:
    _, cause = refusal(config, with_names(tensors_of(config), WRAPPED[word]))
    assert f"names have {word}. in their middle, such as " in cause
    assert "save the model that is wrapped" in cause


def test_adapters_that_are_not_merged() -> None:
    tensors = tensors_of(VL)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        base = f"{module}.base_layer.weight"
        tensors[base] = replace(tensors.pop(name), name=base)
        tensors[f"{module}.lora_A.weight"] = replace(tensors[base], shape=(4, 40))
    _, cause = refusal(VL, tensors)
    assert cause.startswith("  - these are adapter weights that are not merged: 28 names have base")
    assert "merge_and_unload" in cause


def test_adapters_and_nothing_else() -> None:
    tensors = {
        f"base_model.model.{name}".replace(".weight", ".lora_A.weight"): spec
        for name, spec in tensors_of(VL).items()
        if name.endswith("q_proj.weight")
    }
    _, cause = refusal(VL, tensors)
    assert cause.startswith("  - all 4 tensors are of an adapter, such as base_model.model.")


def test_one_word_in_place_of_another() -> None:
    tensors = with_names(tensors_of(DENSE_35), lambda name: name.replace(".mlp.", ".ffn."))
    _, cause = refusal(DENSE_35, tensors)
    assert "names have ffn where this model has mlp, such as " in cause


def test_names_of_another_program() -> None:
    tensors = {f"blk.{n}.w": spec for n, spec in enumerate(tensors_of(VL).values())}
    _, cause = refusal(VL, tensors)
    assert "is one of this model's: the files begin with blk.0.w, the model with" in cause


def test_a_renamed_tensor_is_recognized() -> None:
    tensors = tensors_of(VL)
    name = f"{VISION}merger.norm.weight"
    tensors[f"{name}_"] = replace(tensors.pop(name), name=f"{name}_")
    _, problem, *_ = refusal(VL, tensors)
    assert problem.startswith(f"  - {name}: missing, needed for ")
    assert problem.endswith(f"; was it renamed to {name}_?")


# --- the message ---


def test_the_message_is_short_and_the_document_has_all(
    small_model: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from folders_in_memory import Folder

    folder = Folder.of(small_model)
    of_layers = (name for name in sorted(folder.tensors) if ".layers." in name)
    gone = [name for name in of_layers if name.endswith(".weight")][::5]
    for name in gone:
        del folder.tensors[name]
    model = folder.write(tmp_path / "model")
    assert main(["import", str(model), str(tmp_path / "out"), "--json"]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 6
    assert lines[-2].endswith("more (--json lists all)")
    said = json.loads(printed.out)["error"]
    assert len(said["problems"]) == len(gone)
    assert all(any(name in problem for problem in said["problems"]) for name in gone)


def test_every_problem_is_kept_where_the_message_is_a_cause() -> None:
    with pytest.raises(PlanError) as error:
        plan(other(VL, "text_config", num_hidden_layers=6), tensors_of(VL))
    assert len(error.value.problems) == 22
    assert all(": missing, needed for " in problem for problem in error.value.problems)
