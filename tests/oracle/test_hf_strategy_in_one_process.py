"""HuggingFaceStrategy in one process: other models and options, and everything that is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron.bridge import AutoBridge, HuggingFaceStrategy
from megatron.bridge.cli import main
from megatron.bridge.errors import BridgeError, InexactCast
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.synthetic import make_model
from model_folders import change_tensors
from oracle import text_models
from oracle.gpt_models import stock_gpt_model
from oracle.norm_states import state_with_norms

State = dict[str, Any]
EMBEDDING = "language_model.embedding.word_embeddings.weight"
NORM = "language_model.decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategy") / "hf"
    return make_model("qwen3-vl", folder, {"num_shards": 2}, seed=3)


@pytest.fixture(scope="module")
def checkpoint(hf: Path) -> str:
    AutoBridge.import_ckpt(hf, hf.parent / "megatron")
    return str(hf.parent / "megatron" / "iter_0000000")


@pytest.fixture(scope="module")
def model(hf: Path, process_groups: None) -> Any:
    return AutoBridge.from_hf_pretrained(hf).to_megatron_model()[0]


def state_of(model: Any, **metadata: Any) -> State:
    with megatron_on_cpu():
        return dict(model.sharded_state_dict(metadata=metadata or None))


def load(state: State, strategy: HuggingFaceStrategy, **options: Any) -> Any:
    with megatron_on_cpu():
        return dist_checkpointing.load(
            state, strategy.checkpoint_dir, sharded_strategy=strategy, **options
        )


def save(state: State, folder: Path, strategy: HuggingFaceStrategy, **options: Any) -> None:
    with megatron_on_cpu():
        dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, **options)


def empty(model: Any) -> State:
    """Its state on memory of its own, full of what is nowhere in a file."""
    state = state_of(model)
    for name, entry in state.items():
        if not isinstance(entry, ShardedObject):
            state[name] = replace(entry, data=torch.full_like(entry.data, float("nan")))
    return state


def assert_loaded(found: State, model: Any) -> None:
    weights = dict(model.named_parameters())
    assert len(weights) > 30
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name


def test_it_is_what_stock_load_reads_of_an_imported_checkpoint(
    hf: Path, checkpoint: str, model: Any
) -> None:
    with megatron_on_cpu():
        expected = dist_checkpointing.load(state_with_norms(model), checkpoint)
    found = load(state_with_norms(model), HuggingFaceStrategy(str(hf)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
    assert found["checkpoint_version"] == 3.0


def test_memory_of_the_callers_is_filled_and_none_is_made(hf: Path, model: Any) -> None:
    state = {"model": empty(model), "iteration": 5}
    memory = {n: e.data.data_ptr() for n, e in state["model"].items() if type(e) is ShardedTensor}
    found = load(state, HuggingFaceStrategy(hf))
    assert_loaded(found["model"], model)
    assert {name: found["model"][name].data_ptr() for name in memory} == memory


def test_tensors_without_memory_get_some(hf: Path, model: Any) -> None:
    strategy = HuggingFaceStrategy(hf)
    with megatron_on_cpu():
        whole = dist_checkpointing.load_tensors_metadata(strategy.checkpoint_dir, strategy)
    found = load(whole, strategy, validate_access_integrity=False)
    assert torch.equal(found[EMBEDDING], model.get_parameter(EMBEDDING).cpu())
    assert len(found) > 30


def test_metadata_is_that_of_an_imported_checkpoint(hf: Path, checkpoint: str) -> None:
    strategy = HuggingFaceStrategy(hf)
    with megatron_on_cpu():
        for load_metadata in (
            dist_checkpointing.load_tensors_metadata,
            dist_checkpointing.serialization.load_sharded_metadata,
        ):
            stock = load_metadata(checkpoint)
            ours = load_metadata(strategy.checkpoint_dir, strategy)
            assert ours.keys() == stock.keys() - {"common_state/shard_0_1"}
            for key, entry in ours.items():
                assert entry.global_shape == stock[key].global_shape, key
                if isinstance(entry, ShardedTensor):
                    assert entry.dtype == stock[key].dtype, key


def test_nothing_is_missing_or_unexpected(hf: Path, model: Any) -> None:
    _, missing, unexpected = load(
        state_with_norms(model), HuggingFaceStrategy(hf), strict=StrictHandling.RETURN_ALL
    )
    assert (missing, unexpected) == (set(), set())


def test_unexpected_keys_are_left_out_where_the_caller_asks_for_it(hf: Path, model: Any) -> None:
    state = empty(model)
    state["more"] = replace(state[NORM], key="more.weight")
    state["rng"] = ShardedObject("rng_state", [1], (1,), (0,))
    found, unexpected = load(state, HuggingFaceStrategy(hf), strict="return_unexpected")[::2]
    assert {"more.weight", "rng_state"} <= unexpected
    assert_loaded(found, model)


def test_either_form_of_keys(hf: Path, model: Any) -> None:
    state = state_of(model, non_homogeneous_layers=True)
    assert any(".layers.3." in entry.key for entry in state.values())
    assert_loaded(load(state, HuggingFaceStrategy(hf)), model)
    state = state_of(model, non_homogeneous_layers=True)
    strategy = HuggingFaceStrategy(hf, layers_share_keys=False)
    assert_loaded(load(state, strategy, strict="raise_unexpected"), model)
    refuses(
        lambda: load(
            state_of(model, non_homogeneous_layers=True),
            HuggingFaceStrategy(hf),
            strict="ignore_all",
        ),
        "nothing that begins with language_model.decoder.layers. is left to load",
        "give layers_share_keys=False",
    )


@pytest.mark.parametrize("rows", [320, 307])
def test_a_vocabulary_padded_otherwise(rows: int, hf: Path, model: Any) -> None:
    state = empty(model)
    cut = [EMBEDDING, "language_model.output_layer.weight"]
    for name in cut:
        entry = state[name]
        data, shape = entry.data[:rows], (rows, entry.global_shape[1])
        state[name] = replace(entry, data=data, local_shape=shape, global_shape=shape)
    found = load(state, HuggingFaceStrategy(hf))
    for name in cut:
        assert torch.equal(found[name], model.get_parameter(name)[:rows])
    # And an output layer alone says the same of the vocabulary.
    found = load({cut[1]: state[cut[1]]}, HuggingFaceStrategy(hf))
    assert torch.equal(found[cut[1]], model.get_parameter(cut[1])[:rows])


def test_a_vocabulary_that_is_cut_is_refused(hf: Path, model: Any) -> None:
    state = empty(model)
    entry = state[EMBEDDING]
    shape = (300, entry.global_shape[1])
    entry = replace(entry, data=entry.data[:300], local_shape=shape, global_shape=shape)
    refuses(lambda: load({"weight": entry}, HuggingFaceStrategy(hf)), "307", "300")


def test_the_folder_of_a_strategy_is_gone_with_it(hf: Path) -> None:
    strategy = HuggingFaceStrategy(hf)
    folder = Path(strategy.checkpoint_dir)
    assert {path.name for path in folder.iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "metadata.json",
    }
    del strategy
    assert not folder.exists()


def test_the_language_model_alone_in_a_stock_model(hf: Path, model: Any, tmp_path: Path) -> None:
    stock = stock_gpt_model(hf)
    found = load(state_of(stock), HuggingFaceStrategy(hf, part="language"))
    names = {name for name, _ in stock.named_parameters()}
    for name, weight in model.language_model.named_parameters():
        assert torch.equal(found[name], weight), name
        names.discard(name)
    assert names == set()
    # Saved, it takes the tower from the files that it is laid out like.
    tmp_path.joinpath("out").mkdir()
    save(state_of(stock), tmp_path / "out", HuggingFaceStrategy(hf, part="language"))
    assert main(["verify", str(hf), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "name", ["Qwen3ForTokenClassification", "Qwen3_5TextForSequenceClassification"]
)
def test_classifiers(name: str, tmp_path: Path, process_groups: None) -> None:
    folder = text_models.save(text_models.build(name), tmp_path / "hf")
    [model] = AutoBridge.from_hf_pretrained(folder).to_megatron_model()
    assert_loaded(load(empty(model), HuggingFaceStrategy(folder)), model)
    tmp_path.joinpath("out").mkdir()
    save(state_of(model), tmp_path / "out", HuggingFaceStrategy(folder))
    assert main(["verify", str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("family", ["qwen3-vl-moe", "qwen3.5-moe"])
def test_an_fp8_release(family: str, tmp_path: Path, process_groups: None) -> None:
    folder = make_model(
        family,
        tmp_path / "hf",
        {"fp8": True, "text.moe_intermediate_size": 136} if "moe" in family else {"fp8": True},
        seed=4,
    )
    [model] = AutoBridge.from_hf_pretrained(folder).to_megatron_model()
    assert_loaded(load(empty(model), HuggingFaceStrategy(folder)), model)
    tmp_path.joinpath("out").mkdir()
    save(state_of(model), tmp_path / "out", HuggingFaceStrategy(folder))
    saved = AutoBridge.from_hf_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    for name, tensor in AutoBridge.from_hf_pretrained(folder).hf_pretrained.state.items():
        assert torch.equal(saved.hf_pretrained.state[name], tensor), name


def test_a_copy_of_a_tied_embedding_is_written_twice(tmp_path: Path, process_groups: None) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model("qwen3-vl", tmp_path / "hf", {"tie_word_embeddings": True}, seed=4)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    [model] = AutoBridge.from_hf_pretrained(folder).to_megatron_model()
    with torch.no_grad():
        model.get_parameter(EMBEDDING)[7] += 1
    tmp_path.joinpath("out").mkdir()
    save(state_of(model), tmp_path / "out", HuggingFaceStrategy(folder))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    head = saved["lm_head.weight"]
    assert torch.equal(head, model.get_parameter(EMBEDDING)[: len(head)].cpu())
    assert torch.equal(head, saved["model.language_model.embed_tokens.weight"])
    assert not torch.equal(head, tensors["lm_head.weight"])


def test_norms_that_do_not_fit_are_rounded_where_that_is_asked_for(
    tmp_path: Path, process_groups: None
) -> None:
    """w - 1 of files in float32, in a model in bfloat16."""
    folder = make_model("qwen3.5", tmp_path / "hf", {}, seed=4)
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False)
    provider.ssm_dtype = torch.bfloat16
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    change_tensors(folder, lambda name, tensor: tensor.float() * (1 + 2**-13))
    with pytest.raises(InexactCast, match="round=True rounds them"):
        load(empty(model), HuggingFaceStrategy(folder))
    found = load(empty(model), HuggingFaceStrategy(folder, round=True))
    AutoBridge.from_hf_pretrained(folder).load_hf_weights([model], round=True)
    assert_loaded(found, model)


def refuses(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(BridgeError) as raised:
        act()
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 6


def changed(name: str, **fields: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        vars(state[name]).update(fields)

    return change


def with_object(key: str, data: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        state["object"] = ShardedObject(key, data, (1,), (0,))

    return change


def sticking_out(state: State) -> None:
    state[NORM].global_offset = (1,)


def flattened(state: State) -> None:
    object.__setattr__(state[NORM], "flattened_range", slice(0, 3))


OF_STATES: dict[str, tuple[Callable[[State], None], list[str]]] = {
    "an unknown key": (
        changed(NORM, key="language_model.decoder.norm.weight"),
        ["language_model.decoder.norm.weight: no Hugging Face tensor fills it"],
    ),
    "another shape": (
        changed(NORM, data=torch.zeros(96), local_shape=(96,), global_shape=(96,)),
        [f"{NORM}: the files make BF16 of shape (160,)", "has F32 of shape (96,)"],
    ),
    "integers": (
        changed(NORM, data=torch.zeros(160, dtype=torch.int64)),
        [f"{NORM}: the files make BF16", "I64"],
    ),
    "no memory": (changed(NORM, data=torch.zeros(160, device="meta")), [f"{NORM}: ", "no memory"]),
    "a part of another size": (
        changed(NORM, data=torch.zeros(7)),
        [f"{NORM}: a tensor of shape (7,) is not the part"],
    ),
    "a part that sticks out": (sticking_out, [f"{NORM}: a tensor of shape (160,)", "(1, 161)"]),
    "a flattened part": (flattened, [f"{NORM}: it is flattened"]),
    "the state of an optimizer": (
        changed(NORM, key=f"optimizer.state.exp_avg.{NORM}"),
        [f"optimizer.state.exp_avg.{NORM}: it is the state of training"],
    ),
    "that of a second one": (
        with_object("chained_1.optimizer.distributed.param_state", {"step": 3}),
        ["chained_1.optimizer.distributed.param_state: it is the state of training"],
    ),
    "random numbers": (with_object("rng_state", [3]), ["rng_state: it is the state of training"]),
    "an object": (
        with_object("scheduler", {"lr": 0.5}),
        ["scheduler/shard_0_1: Hugging Face files have no place for an object of type dict"],
    ),
    "a state with content": (
        with_object("core_attention._extra_state", io.BytesIO(b"scales")),
        ["core_attention._extra_state/shard_0_1: Hugging Face files have no place"],
    ),
}


@pytest.mark.parametrize(("change", "words"), OF_STATES.values(), ids=OF_STATES)
def test_states_that_are_refused(
    change: Callable[[State], None], words: list[str], hf: Path, model: Any, tmp_path: Path
) -> None:
    for act in ("load", "save"):
        state = empty(model)
        change(state)
        if act == "load":
            options: dict[str, Any] = {"validate_access_integrity": False}
            refuses(lambda: load(state, HuggingFaceStrategy(hf), **options), *words)  # noqa: B023
            assert state[EMBEDDING].data.isnan().all()  # nothing was written
        else:
            refuses(
                lambda: save(
                    state,  # noqa: B023
                    tmp_path,
                    HuggingFaceStrategy(hf),
                    validate_access_integrity=False,
                ),
                *words,
            )
            assert [*tmp_path.iterdir()] == []


def test_states_without_content_are_no_matter(hf: Path, model: Any) -> None:
    state = empty(model)
    with_object("core_attention._extra_state", io.BytesIO())(state)
    found = load(state, HuggingFaceStrategy(hf))
    assert found["object"] is None
    assert_loaded(found, model)


def test_keys_of_another_model(hf: Path, model: Any, tmp_path: Path) -> None:
    stock = stock_gpt_model(hf)
    refuses(lambda: load(state_of(stock), HuggingFaceStrategy(hf)), 'give part="language"')
    strategy = HuggingFaceStrategy(hf, part="language")
    refuses(lambda: load(state_of(model), strategy), "leave out part=")
    wrapped = {name: replace(e, key=f"wrapped.{e.key}") for name, e in empty(model).items()}
    refuses(
        lambda: load(wrapped, HuggingFaceStrategy(hf)),
        "found such as wrapped.",
        "take wrapped. from the keys",
    )


def test_keys_of_single_shards(tmp_path: Path, process_groups: None) -> None:
    for family in ("qwen3", "qwen3-moe"):
        folder = make_model(family, tmp_path / family, {}, seed=2)
        [model] = AutoBridge.from_hf_pretrained(folder).to_megatron_model()
        state = state_of(model, singleton_local_shards=True)
        refuses(
            lambda: load(state, HuggingFaceStrategy(folder)),  # noqa: B023
            "linear_fc1.weight_w: halves of gated layers have keys of their own",
            "without singleton_local_shards",
        )


def test_files_that_are_refused(hf: Path, model: Any, tmp_path: Path) -> None:
    missing = HuggingFaceStrategy(tmp_path / "none")
    refuses(lambda: load(empty(model), missing), "none")
    config_alone = tmp_path / "config"
    config_alone.mkdir()
    (config_alone / "config.json").write_bytes((hf / "config.json").read_bytes())
    strategy = HuggingFaceStrategy(config_alone)
    refuses(lambda: load(empty(model), strategy), "there are no weights to load")
    cut = make_model("qwen3-vl", tmp_path / "cut", {}, seed=3)
    weights = TensorIndex.from_folder(cut)
    file = cut / "model.safetensors"
    strategy = HuggingFaceStrategy(cut)
    assert strategy._sides.files.weights.keys() == weights.keys()  # the header was read
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    refuses(lambda: load(empty(model), strategy), "model.safetensors", "it ends at byte")


def test_another_folder_of_a_checkpoint(hf: Path, checkpoint: str, model: Any) -> None:
    strategy = HuggingFaceStrategy(hf)
    with megatron_on_cpu():
        refuses(
            lambda: dist_checkpointing.load(state_of(model), checkpoint, sharded_strategy=strategy),
            f"checkpoint_dir is {checkpoint}",
            "give the strategy's own checkpoint_dir",
        )


def test_targets_that_are_refused(hf: Path, model: Any, tmp_path: Path) -> None:
    strategy = HuggingFaceStrategy(hf)
    state = {"model": state_of(model), "iteration": 5}
    refuses(lambda: save(state, tmp_path, strategy), "iteration: Hugging Face files have no place")
    assert [*tmp_path.iterdir()] == []
    refuses(
        lambda: save(state_of(model), tmp_path, strategy, content_metadata={"version": 2}),
        "content_metadata: ",
    )
    refuses(
        lambda: save(state_of(model), tmp_path, strategy, async_sharded_save=True),
        "leave out async_sharded_save",
    )
    (tmp_path / "notes.txt").touch()
    refuses(lambda: save(state_of(model), tmp_path, strategy), "is not empty: it holds notes.txt")
    lacking = state_of(model)
    del lacking[NORM]
    (tmp_path / "notes.txt").unlink()
    refuses(lambda: save(lacking, tmp_path, strategy), f"{NORM}: no rank holds it")
    assert [*tmp_path.iterdir()] == []


def test_what_a_killed_process_left_is_taken_away(hf: Path, model: Any, tmp_path: Path) -> None:
    (tmp_path / ".hugging-face.partial").mkdir()
    (tmp_path / ".hugging-face.partial" / "model.safetensors").write_bytes(b"half")
    save(state_of(model), tmp_path, HuggingFaceStrategy(hf))
    assert {path.name for path in tmp_path.iterdir()} == {
        "metadata.json",
        *(path.name for path in hf.iterdir()),
    }
    assert main(["verify", str(hf), str(tmp_path)]) == 0


def test_a_write_that_fails_leaves_nothing(
    hf: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    written = iter(range(20))
    pwrite = os.pwrite

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        if next(written, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    refuses(
        lambda: save(state_of(model), tmp_path, HuggingFaceStrategy(hf)),
        "cannot be written (No space left on device)",
    )
    assert [*tmp_path.iterdir()] == []
