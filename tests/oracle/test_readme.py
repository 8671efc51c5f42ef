"""The README's Python runs as it stands, one block after the other, in one small model's place."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

README = Path(__file__).parents[2] / "README.md"
HUB_ID = "Qwen/Qwen3-VL-8B-Instruct"


def blocks() -> list[str]:
    pattern = r"<!-- executed by \S+ -->\n```python\n(.*?)```"
    return re.findall(pattern, README.read_text(), re.DOTALL)


def test_every_python_block_is_executed() -> None:
    assert len(blocks()) == README.read_text().count("```python") == 3


def test_the_blocks_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    process_groups: None,
) -> None:
    from sklearn.datasets import load_sample_image

    from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
    from megatron.bridge.synthetic import make_model

    monkeypatch.chdir(tmp_path)
    # A folder by the name of the hub id stands in for the download.
    source = make_model("qwen3-vl", tmp_path / HUB_ID, {"tie_word_embeddings": False})
    Image.fromarray(load_sample_image("flower.jpg")).resize((160, 96)).save("photograph.jpg")
    names: dict[str, Any] = {}
    for block in blocks():
        exec(compile(block, str(README), "exec"), names)  # the README is ours
    expected = TensorIndex.from_folder(source)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(expected)
    assert names["logits"].shape[:2] == names["inputs"]["input_ids"].shape
    assert names["logits"].shape[2] == 384
    for folder in ("out", "hf_dir"):
        assert {p.name for p in Path(folder).iterdir()} == {p.name for p in source.iterdir()}
        for file in source.iterdir():
            assert (Path(folder) / file.name).read_bytes() == file.read_bytes(), file.name
