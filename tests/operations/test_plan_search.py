"""`plan` of large clusters: what is searched ends, and one rank of each kind of stage is built."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest

from megatron.bridge.cli import main
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.inspection import cluster_layout, cluster_legality
from megatron.bridge.operations.inspection.cluster_layout import Blueprint, build_rank, lay_out
from megatron.bridge.operations.inspection.rank_share import RankShare
from megatron.bridge.runtime.parallel_sizes import ParallelSizes
from released_configs import QWEN3_5_397B_A17B, QWEN3_VL_8B


@pytest.mark.parametrize(
    ("config", "sizes", "said"),
    [
        # The nearest legal size is found by rules alone, and by building a layer for each tried.
        (QWEN3_VL_8B, ["--tp", "131072"], "vision.num_heads is 16, not a multiple of"),
        (QWEN3_5_397B_A17B, ["--ep", "131072"], "(the nearest legal: 512)"),
    ],
    ids=["tp", "ep"],
)
def test_a_refusal_does_not_take_long(
    config: object,
    sizes: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    begin = time.process_time()
    assert main(["plan", str(tmp_path), *sizes]) == 2
    assert said in capsys.readouterr().err
    assert time.process_time() - begin < 20


def test_a_search_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refusals(request: ParallelSizes) -> list[str]:
        tried.append(request.tp)
        time.sleep(0.001)
        sum(range(100_000))
        return ["never"]

    monkeypatch.setattr(cluster_legality, "_SEARCH_SECONDS", 0.05)
    assert cluster_legality._nearest(ParallelSizes(tp=900), "tp", refusals) == []
    assert 2 <= len(tried) < 500


@pytest.mark.parametrize("vpp", [None, 2])
def test_stages_that_are_alike_hold_what_megatron_core_says(
    vpp: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage of a small model with layers of several kinds, against one that is built."""
    from megatron.bridge.synthetic import make_model

    settings = {"text.num_hidden_layers": 16, "text.mtp_num_hidden_layers": 1}
    hf = PreTrainedVLM.from_pretrained(make_model("qwen3.5-moe", tmp_path / "model", settings))
    bridge = bridge_for(hf.hf_config.architecture)
    fields = bridge.provider_settings(hf.hf_config, hf.main_dtype, hf.tensors)
    make = partial(bridge.provider_of, {**fields, "mtp_num_layers": 1})
    planned = Blueprint(bridge, make)
    request = ParallelSizes(pp=8 if vpp else 16, vpp=vpp, ep=2, world_size=32)
    built: list[RankShare] = []

    def counted(*args: object) -> RankShare:
        built.append(build_rank(*args))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(cluster_layout, "build_rank", counted)
    layout = lay_out(planned, request)
    # The first, the last, and one of each kind between.
    assert len(built) <= 4
    for stage, share in enumerate(layout.stages):
        assert share == build_rank(planned, request, layout.ranks_of(stage)[0]), stage
