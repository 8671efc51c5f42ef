"""What is not finite is neither agreement nor a mere difference: `compare` says where it is."""

from __future__ import annotations

import json
import shutil
from math import inf, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.errors import BridgeError, InputError, MismatchError
from megatron.bridge.operations.verification import logits as verification
from megatron.bridge.operations.verification.distance import Distance, distance, logits_distance
from megatron.bridge.operations.verification.logits import compare, require_finite

FINE = torch.arange(-9.0, 12.0).reshape(7, 3)


def spoilt(value: float) -> torch.Tensor:
    tensor = FINE.clone()
    tensor[5, 1] = value
    return tensor


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_each_side_is_told(value: float) -> None:
    for expected, found in ((FINE, FINE), (spoilt(value), FINE), (FINE, spoilt(value))):
        for apart in (distance(expected, found), logits_distance(expected, found)):
            assert apart.expected_finite == (expected is FINE)
            assert apart.found_finite == (found is FINE)


@pytest.mark.parametrize(
    ("hf", "megatron", "error", "said"),
    [
        (FINE, spoilt(nan), MismatchError, "not finite in Megatron-Core, in transformers they are"),
        (spoilt(inf), FINE, InputError, "not finite in transformers, so that there is nothing"),
        (spoilt(nan), spoilt(nan), InputError, "not finite in transformers and in Megatron-Core"),
    ],
)
def test_the_first_place_is_named(
    hf: torch.Tensor, megatron: torch.Tensor, error: type[BridgeError], said: str
) -> None:
    fine, wrong = distance(FINE, FINE), distance(hf, megatron)
    logits = logits_distance(FINE, FINE)
    require_finite("m", [fine, fine], logits)
    with pytest.raises(error, match=f"^m: the hidden states after layer 1 are {said}"):
        require_finite("m", [fine, wrong, wrong], logits)
    with pytest.raises(error, match=f"^m: the logits are {said}"):
        require_finite("m", [fine, fine], logits_distance(hf, megatron))


@pytest.fixture(scope="module")
def broken_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an infinite weight in layer 2."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(small_model, folder)
    key = "model.language_model.layers.2.mlp.down_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][key]
    tensors = load_file(file)
    tensors[key][3, 5] = inf
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_both_models(broken_model: Path) -> None:
    with pytest.raises(InputError, match=r"after layer 2 .* in transformers and in Megatron-Core"):
        compare(broken_model, prompt="Why?")


def test_megatron_alone(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_megatron = verification.run_megatron

    def run_badly(*args: object) -> tuple[torch.Tensor, list[Distance]]:
        found, layers = run_megatron(*args)  # type: ignore[arg-type]
        found[0, -1, 0] = nan
        return found, layers

    monkeypatch.setattr(verification, "run_megatron", run_badly)
    with pytest.raises(MismatchError, match="the logits are not finite in Megatron-Core, in trans"):
        compare(small_model, prompt="Why?")
