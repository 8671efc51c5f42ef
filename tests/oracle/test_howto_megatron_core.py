"""docs/howto/load-by-megatron-core.md runs as it stands, with a small model for the hub's."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.bridge import HuggingFaceStrategy
from megatron.bridge.cli import main
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.synthetic import make_model

PAGE = (Path(__file__).parents[2] / "docs/howto/load-by-megatron-core.md").read_text("utf-8")
HUB_ID = "Qwen/Qwen3-8B"


def test_the_blocks_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    process_groups: None,
) -> None:
    blocks = re.findall(r"<!-- executed by \S+ -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```") / 2 == 3
    monkeypatch.chdir(tmp_path)
    source = make_model("qwen3", tmp_path / HUB_ID, {"num_shards": 2}, seed=9)
    names: dict[str, Any] = {}
    with megatron_on_cpu():
        for block in blocks:
            exec(compile(block, "load-by-megatron-core.md", "exec"), names)  # the page is ours
    assert main(["verify", str(source), "trained"]) == 0
    beside = {path.name for path in Path("trained").iterdir()} - {
        path.name for path in source.iterdir()
    }
    assert beside == {"metadata.json"}
    # And it computes what transformers does.
    import transformers

    ours = names["model"].float().eval()
    device = next(ours.parameters()).device
    theirs = transformers.AutoModelForCausalLM.from_pretrained("trained", dtype=torch.float32)
    ids = torch.arange(39, device=device).mul(7).view(1, 39)
    mask = torch.ones(1, 1, 39, 39, device=device).triu(1).bool()
    with megatron_on_cpu(), torch.no_grad():
        found = ours(ids, torch.arange(39, device=device)[None], mask)[..., :307]
        expected = theirs.to(device)(ids).logits
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_all_options_are_in_the_table() -> None:
    import inspect

    options = set(inspect.signature(HuggingFaceStrategy).parameters) - {"path"}
    named = re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE)
    assert options == set(named)
