"""From files to files little but numpy is needed: in a process that cannot import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.models.catalog import small_models
from megatron.bridge.synthetic import make_model

VISION = ("qwen3-vl", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe")

# What takes long to import, draws or downloads: a document of a folder on disk needs none of it.
HEAVY = (
    "asyncio",
    "huggingface_hub",
    "megatron.core",
    "pydantic",
    "rich",
    "ssl",
    "torch",
    "tqdm",
    "transformers",
    "typer",
)

PROGRAM = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from megatron.bridge.cli import main
failed = []
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*command, "--json"])
    if status != 0:
        failed.append([" ".join(command), status, err.getvalue()])
imported = [name for name in sys.argv[1:] if sys.modules.get(name)]
print(json.dumps({"failed": failed, "imported": imported}))
"""


def folder_name(family: str, settings: dict[str, object]) -> str:
    return "-".join([family, *map(str, settings.values())])


MODELS: list[tuple[str, dict[str, object]]] = [
    *((family, {}) for family in small_models()),
    *((family, {"experts": "per-expert"}) for family in VISION if family.endswith("moe")),
    *((family, {"fp8": True}) for family in ("qwen3-vl-moe", "qwen3.5", "qwen3.5-moe-text")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, (family, settings) in enumerate(MODELS):
        made = settings | {"num_shards": 1 + number % 2}
        make_model(family, folder / folder_name(family, settings), made, seed=number)
    return folder


def test_all_families_are_here() -> None:
    assert {family for family, _ in MODELS} >= {*VISION, *small_models()}
    assert len(small_models()) >= 8


QUICK = [("qwen3-vl", {}), ("qwen3.5-moe", {}), ("qwen3-vl-moe", {"fp8": True})]


def commands(folder: Path, models: Sequence[tuple[str, dict[str, object]]]) -> Iterator[list[str]]:
    """Every kind of conversion, there and back, and what tells of its two sides."""
    for family, settings in models:
        name = folder_name(family, settings)
        model, megatron, back = (str(folder / f"{name}{end}") for end in ("", ".megatron", ".back"))
        fp8 = ["--fp8"] if "fp8" in settings else []
        yield ["inspect", model]
        yield ["plan", model]
        yield ["import", model, megatron, "--verify", "--memory", "16MiB"]
        yield ["inspect", megatron]
        yield ["plan", megatron]
        yield ["export", megatron, back, "--hf", model, "--keep-manifest", *fp8]
        yield ["verify", model, megatron]
        yield ["verify", model, back]
        yield ["verify", "--fast", model, megatron]
        yield ["verify", "--fast", back]
        if fp8:
            yield ["export", megatron, f"{back}.bf16", "--hf", model]
            yield ["verify", f"{back}.bf16", megatron]
        else:
            dtype = ["float16", "--round"] if family.endswith("-moe") else ["float32"]
            yield ["export", megatron, f"{back}.cast", "--dtype", *dtype]
        if family.endswith("-moe"):
            other = "fused" if "experts" in settings else "per-expert"
            yield ["export", megatron, f"{back}.{other}", "--hf", model, "--experts", other]
            yield ["verify", f"{back}.{other}", megatron]
        if family in VISION:
            part, text = ["--part", "language"], f"{back}.text"
            yield ["import", model, f"{megatron}.text", *part]
            yield ["export", megatron, text, "--hf", model, *part]
            yield ["verify", text, f"{megatron}.text"]
            yield ["export", f"{megatron}.text", f"{back}.home", "--hf", model, *part]
            yield ["verify", f"{back}.home", megatron]


def test_conversions_need_no_torch(folder: Path) -> None:
    assert all(one in MODELS for one in QUICK)
    assert outcome(commands(folder, QUICK)) == {"failed": [], "imported": []}


@pytest.mark.slow
def test_all_conversions_need_no_torch(folder: Path) -> None:
    others = [one for one in MODELS if one not in QUICK]
    assert outcome(commands(folder, others)) == {"failed": [], "imported": []}


def test_a_config_without_its_architecture(folder: Path) -> None:
    for family in small_models():
        path = folder / folder_name(family, {}) / "config.json"
        config = json.loads(path.read_text())
        del config["architectures"]
        bare = folder / "bare" / family / "config.json"
        bare.parent.mkdir(parents=True)
        bare.write_text(json.dumps(config))
    plans = [["plan", str(folder / "bare" / family)] for family in small_models()]
    assert outcome(plans) == {"failed": [], "imported": []}


def outcome(commands: Iterable[list[str]]) -> Any:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *HEAVY],
        input=json.dumps(list(commands)),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return json.loads(answer.stdout)
