"""Every folder that transformers loads is converted and comes back; any other is refused once.

`folder_mutations` draws the folders. The long form (`-m slow`) draws every change of every family.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from folder_mutations import BROKEN, OF_OTHER_PARTS, WHOLE, Change, draw
from folders_in_memory import Folder, read_tensors
from megatron.bridge.cli import main
from megatron.bridge.synthetic import make_model
from oracle.loading import FAMILIES, missing_for_transformers
from refusals import paths_below

SETTINGS = {"text.num_hidden_layers": 4, "vision.depth": 3}
WITH_OTHER_PARTS = True
"""Whether dtypes of single tensors and keys with defaults are drawn, too."""

WHOLE_CHANGES = {**WHOLE, **(OF_OTHER_PARTS if WITH_OTHER_PARTS else {})}
FEW = 2
MANY = 120


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mutated")
    return {name: make_model(name, folder / name, SETTINGS) for name in FAMILIES}


def seeds(count: int) -> list[object]:
    """`count` draws, of which the first few are drawn in the short form of the suite."""
    slow = pytest.mark.slow
    return [
        pytest.param(seed, marks=[] if seed % (count // (4 * FEW)) == 0 else slow)
        for seed in range(count)
    ]


def mutated(
    seed: int, changes: dict[Change, frozenset[str]], models: dict[str, Path], target: Path
) -> Path:
    random = Random(seed)
    name = list(FAMILIES)[seed % len(FAMILIES)]
    change = draw(seed // len(FAMILIES), changes, FAMILIES[name])
    folder = Folder.of(models[name])
    change(folder, random)
    print(name, change.__name__)
    return folder.write(target)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("seed", seeds(MANY))
def test_what_transformers_loads_comes_back(
    seed: int, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mutated(seed, WHOLE_CHANGES, models, tmp_path / "model")
    assert missing_for_transformers(model) == []
    megatron, again = tmp_path / "megatron", tmp_path / "again"
    for command in (
        ["inspect", model],
        ["import", model, megatron],
        ["export", megatron, again, "--hf", model],
        ["verify", model, megatron],
        ["verify", model, again],
    ):
        assert main([str(word) for word in command]) == 0, capsys.readouterr()
    assert paths_below(again) == paths_below(model)
    before, after = read_tensors(model), read_tensors(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.shape == after[name].shape
        assert torch.equal(bits(tensor), bits(after[name])), name
    own = set(paths_below(model))
    for path in own:
        if not path.endswith(".safetensors") and (model / path).is_file():
            assert (model / path).read_bytes() == (again / path).read_bytes(), path


@pytest.mark.parametrize("seed", seeds(MANY))
def test_what_transformers_does_not_load_is_refused_with_its_cause(
    seed: int, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mutated(seed, dict(BROKEN), models, tmp_path / "model")
    assert missing_for_transformers(model)
    before = paths_below(tmp_path)
    capsys.readouterr()
    status = main(["import", str(model), str(tmp_path / "megatron")])
    said = capsys.readouterr().err
    print(said)
    assert status == 2
    assert len(said.splitlines()) <= 6
    assert paths_below(tmp_path) == before
    assert main(["inspect", str(model)]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == said.splitlines()[1:]
