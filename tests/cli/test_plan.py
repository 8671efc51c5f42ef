"""`plan`: what it says of both sides, of the cost, of each rank, and of what cannot be."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_documentation import documented_keys
from megatron.bridge.cli import main
from megatron.bridge.cli.output import WIDTH
from megatron.bridge.dtypes import itemsize
from megatron.bridge.operations.inspection.forecast import forecast_of
from megatron.bridge.operations.inspection.hf_report import inspect_hf
from megatron.bridge.synthetic import make_model
from megatron.bridge.tensors.boxes import box_shape, intersect, relative, tiling_faults, volume
from megatron.bridge.text.document import to_document

SIZES = ("weight_bytes", "gradient_bytes", "optimizer_bytes")


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    status = main(["plan", *map(str, args)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert max(map(len, printed.out.splitlines()), default=0) <= WIDTH
    return status, printed.out, printed.err


def document(
    capsys: pytest.CaptureFixture[str], *args: str | Path, status: int = 0
) -> dict[str, Any]:
    assert main(["plan", *map(str, args), "--json"]) == status
    printed = capsys.readouterr()
    assert bool(printed.err) == bool(status)
    return json.loads(printed.out)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        "qwen3.5-moe", tmp_path_factory.mktemp("models") / "moe", {"text.num_hidden_layers": 8}
    )


# --- the conversion ---


def test_a_folder(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, small_model)
    assert main(["inspect", str(small_model), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in inspected} == inspected
    size = found["megatron"]["bytes"]
    assert found["megatron"]["dtypes"] == {"BF16": {"keys": 44, "bytes": size}}
    assert found["conversion"] == {
        "command": "import",
        "read_bytes": found["hf"]["bytes"],
        "written_bytes": size,
        "download_bytes": 0,
        "disk_bytes": size,
        "memory_bytes": 2**30,
        "seconds": size / 1e9,
        "assumed_bytes_per_second": 1_000_000_000,
    }
    assert (found["parallel"], found["ranks"], found["dropped"]) == (None, [], [])
    status, out, err = run(capsys, small_model)
    assert (status, err) == (0, "")
    assert f"Megatron 44 {size:,} BF16" in words(out)
    assert f"reads {found['hf']['bytes']:,} bytes" in words(out)
    assert "28...}" not in out
    assert "layers.{0...4}.self_attn.{q,k,v}_proj.weight" in out
    assert "7 side files, which export takes from its --hf REF" in out
    assert "Parallel" not in out


@pytest.mark.parametrize("family", ["qwen3-vl", "qwen3.5-moe"])
def test_a_config_alone(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(family, tmp_path / "model")
    (tmp_path / "config").mkdir()
    shutil.copy(model / "config.json", tmp_path / "config")
    whole, folder, file = (
        document(capsys, path)
        for path in (model, tmp_path / "config", tmp_path / "config" / "config.json")
    )
    for same in ("hf", "megatron", "rows", "experts", "carried", "architecture"):
        assert folder[same] == file[same] == whole[same]
    assert folder["conversion"] == file["conversion"] == whole["conversion"]
    assert folder["origin"] == file["origin"] == "config"
    assert (folder["side_files"], file["side_files"]) == (["config.json"], [])
    # A weights folder's own config.json stands for the config alone, too.
    assert document(capsys, model / "config.json")["origin"] == "config"


def test_experts_are_one_row(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["megatron"]: row for row in document(capsys, moe)["rows"]}
    path = "language_model.decoder.layers.{0...7}.mlp.experts.linear_fc1.weight{0...5}"
    assert rows[path]["count"] == 8 * 6
    assert rows[path]["hf"] == ["model.language_model.layers.{0...7}.mlp.experts.gate_up_proj"]
    status, out, _ = run(capsys, moe)
    assert status == 0
    assert out.count(".mlp.experts.linear_fc1.weight") == 2  # the decoder's and the MTP layer's


def test_another_layout_of_experts(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = moe / "config.json"
    released, single = document(capsys, config), document(capsys, config, "--experts", "per-expert")
    assert single["experts"] == {"decoder": "per-expert", "mtp": "per-expert"}
    assert single["hf"]["keys"] > released["hf"]["keys"]
    assert single["megatron"] == released["megatron"]
    status, _, err = run(capsys, moe, "--experts", "fused-transposed")
    assert status == 2
    assert "fused" in err


def test_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, make_model("qwen3-vl", tmp_path / "model", {"fp8": True}))
    assert found["quantization"] == {"method": "fp8", "rows": 128, "columns": 128}
    cost = found["conversion"]
    assert cost["read_bytes"] == found["hf"]["bytes"] < found["megatron"]["bytes"]
    assert cost["disk_bytes"] == cost["written_bytes"] == found["megatron"]["bytes"]
    assert cost["seconds"] == cost["written_bytes"] / 1e9


def test_what_is_not_in_the_cache_is_downloaded(small_model: Path) -> None:
    model = replace(inspect_hf(small_model), origin="hub headers")
    found = to_document(forecast_of(model))
    cost = found["conversion"]
    assert cost["download_bytes"] == found["hf"]["bytes"]
    assert cost["disk_bytes"] == found["hf"]["bytes"] + found["megatron"]["bytes"]


def test_a_checkpoint(
    small_model: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other way round, as far as its own record tells."""
    there, back = document(capsys, small_model), document(capsys, small_checkpoint)
    assert (there["format"], back["format"]) == ("huggingface", "megatron")
    for same in ("hf", "megatron", "rows", "architecture"):
        assert back[same] == there[same]
    cost = back["conversion"]
    assert cost["command"] == "export"
    assert (cost["read_bytes"], cost["written_bytes"]) == (
        there["conversion"]["written_bytes"],
        there["conversion"]["read_bytes"],
    )
    status, out, _ = run(capsys, small_checkpoint / "iter_0000000")
    assert status == 0
    assert "Conversion (export)" in out
    assert "left behind nothing" in words(out)


def test_a_checkpoint_of_another_dtype_than_its_reference(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is shown as it lies there, the files as the reference has them."""
    wide = make_model("qwen3-vl", tmp_path / "wide", {"dtype": "float32"})
    assert main(["import", str(wide), str(tmp_path / "megatron"), "--json"]) == 0
    capsys.readouterr()
    found = document(capsys, tmp_path / "megatron", "--hf", small_model)
    assert (set(found["hf"]["dtypes"]), set(found["megatron"]["dtypes"])) == ({"BF16"}, {"F32"})
    assert found["conversion"]["read_bytes"] == found["megatron"]["bytes"]
    assert found["conversion"]["written_bytes"] == found["hf"]["bytes"]
    args = [tmp_path / "megatron", tmp_path / "out", "--hf", small_model, "--round", "--json"]
    assert main(["export", *map(str, args)]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert [exported[side] for side in ("hf", "megatron")] == [found["hf"], found["megatron"]]


def test_a_checkpoint_that_does_not_describe_itself(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint, folder)
    (folder / "iter_0000000" / "run_config.yaml").unlink()
    status, out, err = run(capsys, folder)
    assert (status, out) == (2, "")
    assert "no run_config.yaml, so the model is unknown" in err


@pytest.mark.parametrize("sizes", [[], ["--tp", "3"]], ids=str)
def test_a_model_that_does_not_convert(
    sizes: list[str], small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown as far as it is known, and not laid out."""
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] -= 2
    (folder / "config.json").write_text(json.dumps(config))
    found = document(capsys, folder, *sizes, status=2)
    assert found["hf"]["keys"] == 115
    assert (found["megatron"], found["conversion"], found["ranks"]) == (None, None, [])
    assert len(found["problems"]) == 15
    status, out, err = run(capsys, folder, *sizes)
    assert status == 2
    assert "not proven" in out
    assert "the conversion is not proven: 15 problems" in err


# --- the parallel layout ---


def test_each_rank(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [moe, "--tp", "2", "--pp", "2", "--ep", "3", "--etp", "1", "--world-size", "24"]
    found = document(capsys, *args)
    assert found["parallel"] == {
        "tp": 2, "pp": 2, "vpp": None, "cp": 1, "ep": 3, "etp": 1, "world_size": 24, "legal": True,
    }  # fmt: skip
    ranks = found["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(24))
    assert [(rank["pp"], rank["layers"]) for rank in (ranks[11], ranks[12])] == [
        (0, [[0, 1, 2, 3]]),
        (1, [[4, 5, 6, 7]]),
    ]
    assert ranks[0]["parts"] == ["vision", "embedding"]
    assert ranks[23]["parts"] == ["embedding", "output", "MTP"]
    for rank in ranks:
        assert rank["weight_bytes"] > 2 * rank["parameters"] * 0.999
        assert rank["gradient_bytes"] >= 4 * rank["parameters"]
        assert rank["optimizer_bytes"] * 6 >= 12 * rank["parameters"]  # of at most 6 shards
        assert rank["largest"]["bytes"] == 2 * _product(rank["largest"]["shape"])
    status, out, err = run(capsys, *args)
    assert status == 0
    assert err == "plan: asking megatron-core what each rank holds\n"
    assert "Parallel layout: 24 ranks" in out
    assert "0 0...11 layers 0...3" in words(out)
    assert all(f" {ranks[rank]['parameters']:,} " in out for rank in (0, 23))
    assert "data parallel 6, experts 4" in words(out)


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def test_chunks_of_a_stage(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = document(capsys, moe / "config.json", "--pp", "2", "--vpp", "2")["ranks"]
    assert [rank["layers"] for rank in ranks] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_more_ranks_share_the_optimizer(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, four = (
        document(capsys, small_checkpoint, "--world-size", size)["ranks"][0] for size in "14"
    )
    assert one["parameters"] == four["parameters"]
    assert [one[size] for size in SIZES[:2]] == [four[size] for size in SIZES[:2]]
    assert one["optimizer_bytes"] == 4 * four["optimizer_bytes"]


def test_context_parallel_ranks_share_the_optimizer(
    moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Multi-token prediction is refused beside it, with the way out."""
    found = document(capsys, moe, "--tp", "2", "--cp", "2", "--without", "mtp")
    assert found["parallel"]["cp"] == 2
    ranks = found["ranks"]
    assert [(rank["tp"], rank["cp"]) for rank in ranks] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    [alone, _] = document(capsys, moe, "--tp", "2", "--without", "mtp")["ranks"]
    assert {rank["parameters"] for rank in ranks} == {alone["parameters"]}
    assert ranks[0]["optimizer_bytes"] * 1.9 < alone["optimizer_bytes"]
    status, _, err = run(capsys, moe, "--cp", "2")
    assert status == 2
    assert "context_parallel_size is 2 with mtp_num_layers = 1" in words(err)
    assert "legal without" in words(err)


def test_without_the_mtp_layer(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [with_it], [without] = (
        document(capsys, moe, "--tp", "1", *more)["ranks"] for more in ([], ["--without", "mtp"])
    )
    assert "MTP" in with_it["parts"]
    assert "MTP" not in without["parts"]
    assert with_it["parameters"] > without["parameters"]


def test_a_part_that_no_model_is_built_without(
    moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, moe, "--without", "vision")
    assert (status, out) == (2, "")
    assert "--without 'vision' is not a part that a Qwen3_5MoeForConditionalGeneration" in err
    assert err.endswith("may be built without: mtp\n")


def test_an_illegal_layout(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [moe, "--tp", "3", "--pp", "5", "--ep", "4"]
    found = document(capsys, *args, status=2)
    assert (found["ranks"], found["parallel"]["legal"], found["proven"]) == ([], False, True)
    assert [problem.partition(":")[0] for problem in found["problems"]] == [
        "--tp 3",
        "--pp 5",
        "--ep 4",
    ]
    status, out, err = run(capsys, *args)
    assert status == 2
    assert "Conversion (import)" in out
    assert "the model cannot be laid out by --tp 3 --pp 5 --ep 4: 3 problems" in err
    assert "num_layers=8 should be divisible" in err
    assert "(the nearest legal: 4 or 8)" in err


@pytest.mark.parametrize("option", ["--tp", "--pp", "--vpp", "--cp", "--ep", "--etp"])
def test_a_size_of_zero_is_wrong_usage(
    option: str, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, small_model, option, "0")
    assert (status, out) == (2, "")
    assert option in err


# --- a refit ---

REFIT = ("--tp", "2", "--ep", "3", "--etp", "1", "--world-size", "12")


def boxes_of(line: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in line["box"])


@pytest.mark.parametrize(
    ("asked", "ranks", "engine"),
    [
        ("tp=2,replicas=3", 12, range(6)),
        ("tp=2,ep=2,pp=2,disjoint", 16, range(12, 16)),
        ("ep=3,replicas=2,disjoint", 18, range(12, 18)),
    ],
)
def test_a_route_tiles_what_an_engine_wants(
    asked: str,
    ranks: int,
    engine: range,
    moe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    route = tmp_path / "route.jsonl"
    found = document(capsys, moe, *REFIT, "--refit", asked, "--route", route)["refit"]
    first, *lines = map(json.loads, route.read_text().splitlines())
    assert (first["kind"], first["trainer"]["tp"], found["ranks"]) == ("route", 2, ranks)
    assert first["engine"] == found["engine"]
    specs = inspect_hf(moe).plan.hf
    wanted, arriving, held = (defaultdict(list) for _ in range(3))
    for line in lines:
        box = boxes_of(line)
        if line["kind"] == "wanted":
            for rank in line["ranks"]:
                wanted[rank, line["name"]].append(box)
        elif line["kind"] == "move":
            for receiver in line["receivers"]:
                arriving[receiver, line["name"]].append((box, line["sender"]))
        else:
            assert line["kind"] == "held"
            assert _product(b - a for a, b in box) == _product(b - a for a, b in line["key_box"])
            key_box = tuple(map(tuple, line["key_box"]))
            assert intersect(key_box, line["rank_box"]) == key_box
            for rank in line["ranks"]:
                held[rank, line["name"]].append(box)
    assert {rank for rank, _ in wanted} == set(engine)
    assert wanted.keys() == arriving.keys()
    moved = own = 0
    for (rank, name), boxes in wanted.items():
        shares = arriving[rank, name]
        for box in boxes:  # each element arrives once
            shared = [one for part, _ in shares if (one := intersect(part, box)) is not None]
            assert not [*tiling_faults(box_shape(box), [relative(one, box) for one in shared])]
        for part, sender in shares:
            parts = [one for has in held[sender, name] if (one := intersect(has, part))]
            assert sum(map(volume, parts)) == volume(part)
            size = volume(part) * itemsize(specs[name].dtype)
            moved, own = moved + size * (sender != rank), own + size * (sender == rank)
    assert own == found["own_bytes"]
    assert moved <= found["moved_bytes"] < moved * 1.01  # places in buffers are multiples of 16


def test_what_a_refit_moves(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [moe, *REFIT, "--refit", "tp=2,replicas=6", "--ranks-per-node", "4", "--bandwidth", "2"]
    found = document(capsys, *args)
    refit = found["refit"]
    assert set(refit) == documented_keys("`refit`:")
    assert set(refit["engine"]) == documented_keys("`engine`:")
    assert set(refit["sent"]) == documented_keys("`sent`, `received` and `buffers`:")
    assert refit["limit_seconds"] == refit["limit_bytes"] / 2e9 <= refit["seconds"]
    assert refit["received"]["ranks"] == 12
    assert 0 < refit["within_node_bytes"] <= refit["moved_bytes"]
    # A node of four ranks has all experts of three, whichever its first is.
    assert refit["within_node_bytes"] == refit["moved_bytes"]
    apart = document(capsys, *args[:-4], "--ranks-per-node", "1")["refit"]
    assert (apart["within_node_bytes"], apart["moved_bytes"]) == (0, refit["moved_bytes"])
    status, out, err = run(capsys, *args)
    assert status == 0
    assert err.endswith("plan: asking megatron-core which boxes each rank holds\n")
    assert len(out.splitlines()) < 50
    assert "Refit: 6 engines of 2 ranks" in out
    assert f"moved {refit['moved_bytes']:,} bytes" in words(out)
    assert "0...11, of the trainer" in out
    assert "at 2.00 GB/s each way" in out


def test_a_refit_of_one_process(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a trainer on the same rank has does not travel; beside it, all of it does."""
    same = document(capsys, moe, "--refit", "tp=1")["refit"]
    beside = document(capsys, moe, "--refit", "tp=1,disjoint")["refit"]
    size = inspect_hf(moe).plan.hf_bytes
    assert (same["ranks"], same["moved_bytes"], same["own_bytes"]) == (1, 0, size)
    assert (beside["ranks"], beside["own_bytes"]) == (2, 0)
    assert size <= beside["moved_bytes"] < size * 1.001


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--refit", "tp=3,disjoint"], "tp=3: vision.num_heads is 4, not a multiple"),
        (["--tp", "2", "--refit", "tp=2,replicas=2"], "its 4 ranks are not among the 2 of"),
        (["--tp", "2", "--refit", "tp=2,replicas=2"], "replicas=1 do, and disjoint gives it"),
        (["--refit", "tp=two"], "tp: 'two' is not a whole number"),
        (["--refit", "cp=2"], "'cp=2' is none of tp=N, pp=N, ep=N, etp=N, replicas=N, disjoint"),
        (["--refit", "tp=2,tp=4"], "tp is given twice"),
        (["--refit", "tp=1", "--bandwidth", "0"], "0 GB/s would move nothing"),
        (["--bandwidth", "25"], "--bandwidth is of --refit, which is not given"),
        (["--route", "new"], "--route is of --refit, which is not given"),
        (["--refit", "tp=1", "--route", __file__], "give --route the name of a new file"),
        (["--refit", "tp=1", "--route", "/none/of/it"], "cannot be written: No such file"),
    ],
)
def test_a_refit_that_cannot_be(
    args: list[str], said: str, moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, moe, *args)
    assert status == 2
    assert said in words(err)


# --- what it takes, and how it is described ---


def test_the_document_is_described(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, small_model, "--tp", "2")
    inspected = documented_keys("JSON of a Hugging Face model:")
    assert set(found) == inspected | documented_keys(
        "JSON of `plan`, beside the keys of `inspect`:"
    )
    assert set(found["conversion"]) == documented_keys("`conversion`:")
    assert set(found["parallel"]) == documented_keys("`parallel`:")
    ranks = documented_keys("An entry of `ranks`:")
    assert [set(rank) for rank in found["ranks"]] == [ranks, ranks]
