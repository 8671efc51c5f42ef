"""The calls that real clients make, in their order and with their arguments, in one process.

Each client's sequence is a test; beside them are tests of single arguments.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

import megatron.bridge
from client_models import DENSE, EXPERTS, make_models, put_value_head
from megatron.bridge import AutoBridge
from megatron.bridge.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    PlanError,
    TargetExists,
    UnsupportedModel,
)
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.training.config import DistributedDataParallelConfig
from megatron.bridge.training.utils.config_utils import create_ddp_config
from megatron.bridge.training.utils.train_utils import freeze_moe_router, make_value_model

pytestmark = pytest.mark.usefixtures("process_groups")

TOKENS = torch.arange(3, 16)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("clients"))


def exported(bridge: AutoBridge, model: list[Any], **arguments: Any) -> dict[str, torch.Tensor]:
    return {one.name: one.tensor for one in bridge.export_hf_weights(model, **arguments)}


def assert_files_hold(folder: Path, tensors: Any) -> None:
    written = TensorIndex.from_folder(folder)
    assert set(written) == set(tensors)
    assert all(torch.equal(written.read(name), tensors[name]) for name in written)


def test_verl(folders: dict[str, Path], tmp_path: Path) -> None:
    """An actor and a critic, refit by the stream, saved."""
    assert megatron.bridge.__version__.startswith("0.")
    AutoMapping.register_module_type("LinearForLastLayer", "replicated")
    bridge = AutoBridge.from_hf_pretrained(str(folders[EXPERTS]), trust_remote_code=False)
    provider: Any = bridge.to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(
        dtype=torch.bfloat16,
        overrides={
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",
        },
    )
    ddp_config = create_ddp_config(
        wrap_with_ddp=True,
        use_distributed_optimizer=False,
        use_megatron_fsdp=False,
        overrides={"grad_reduce_in_fp32": True},
    )
    provider.register_pre_wrap_hook(freeze_moe_router)
    model = provider.provide_distributed_model(
        wrap_with_ddp=True,
        ddp_config=ddp_config,
        fp16=provider.fp16,
        bf16=provider.bf16,
        use_megatron_fsdp=False,
        overlap_param_gather_with_optimizer_step=False,
        data_parallel_random_init=True,
        post_wrap_hook=None,
    )
    bridge.load_hf_weights(model, str(folders[EXPERTS]), allowed_mismatched_params=[])
    frozen = {name for name, one in model[0].named_parameters() if not one.requires_grad}
    assert frozen
    assert all(".mlp.router." in name for name in frozen)
    stored = bridge.hf_pretrained.state
    for name, tensor in bridge.export_hf_weights(model):
        assert torch.equal(tensor, stored[name]), name
    bridge.save_hf_weights(model, tmp_path / "weights", distributed_save=True, strict=False)
    assert_files_hold(tmp_path / "weights", stored)
    assert not (tmp_path / "weights" / "config.json").exists()


@pytest.mark.parametrize("whose", ["the client's", "ours"])
def test_verl_critic(whose: str, folders: dict[str, Path]) -> None:
    """A head of values in the place of the logits, everything else from the files."""
    AutoMapping.register_module_type("LinearForLastLayer", "replicated")
    bridge = AutoBridge.from_hf_pretrained(folders[DENSE], dtype=torch.float32)
    provider: Any = bridge.to_megatron_provider(load_weights=False)
    provider.mtp_num_layers = None
    ours = make_value_model(provider.hidden_size, sequence_parallel=False)
    provider.register_pre_wrap_hook(put_value_head if whose == "the client's" else ours)
    [critic] = provider.provide_distributed_model(wrap_with_ddp=False)
    with pytest.raises(PlanError, match=r"output_layer\.weight"):
        bridge.load_hf_weights([critic])
    with pytest.raises(PlanError, match=r"output_layer\.weight"):
        bridge.load_hf_weights([critic], allowed_mismatched_params=["put_layer.weight"])
    head = critic.language_model.output_layer.weight
    before = head.detach().clone()
    bridge.load_hf_weights([critic], allowed_mismatched_params=["output_layer.weight"])
    assert torch.equal(head, before)
    actor: Any = bridge.to_megatron_model()[0]
    for name, parameter in actor.named_parameters():
        if name in (own := dict(critic.named_parameters())) and "output_layer" not in name:
            assert torch.equal(own[name], parameter), name
    values = critic(input_ids=TOKENS)
    assert values.shape == (*TOKENS.shape, 1)
    assert values.dtype == torch.float32
    # One that is as the files say is loaded, listed or not.
    with torch.no_grad():
        actor.language_model.output_layer.weight.zero_()
    bridge.load_hf_weights([actor], allowed_mismatched_params=["*output_layer*"])
    assert actor.language_model.output_layer.weight.abs().sum() > 0


def test_slime_and_miles(folders: dict[str, Path]) -> None:
    """Weights that lie elsewhere are exported in the place of the model's, task by task."""
    bridge = AutoBridge.from_hf_pretrained(folders[EXPERTS], trust_remote_code=True)
    provider: Any = bridge.to_megatron_provider()
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=True)
    tasks = bridge.get_conversion_tasks(model)
    backup = {
        f"vp_stages.{task.vp_stage}.{task.param_name}": task.param_weight.detach() * 2
        for task in tasks
        if task.param_weight is not None
    }
    with torch.no_grad():  # the model has moved on
        for parameter in model[0].parameters():
            parameter.zero_()

    class Renamed:
        """Maps when it is looked at, as theirs does."""

        def __iter__(self) -> Any:
            for task in tasks:
                weight = backup[f"vp_stages.{task.vp_stage}.{task.param_name}"]
                yield dataclasses.replace(task, param_weight=weight)

        def __len__(self) -> int:
            return len(tasks)

    stored = bridge.hf_pretrained.state
    found = exported(bridge, model, cpu=False, conversion_tasks=Renamed())
    assert list(found) == list(stored)
    assert all(torch.equal(tensor, stored[name] * 2) for name, tensor in found.items())
    assert all(not parameter.any() for parameter in model[0].parameters())
    chunk: Any = model[0].module
    assert (chunk.image_token_id, chunk.video_token_id) == provider.placeholders
    assert chunk.vision_start_token_id == provider.vision_start_token_id
    assert chunk.config.spatial_merge_size == 2


def test_nemo_rl(folders: dict[str, Path], tmp_path: Path) -> None:
    """An imported checkpoint, a policy with hooks and groups, refit in parts by size."""
    AutoBridge.import_ckpt(folders[DENSE], tmp_path / "meg", torch_dtype="bfloat16")
    bridge = AutoBridge.from_hf_pretrained(str(folders[DENSE]), trust_remote_code=True)
    [loaded] = bridge.load_megatron_model(
        tmp_path / "meg", mp_overrides={"pipeline_dtype": torch.bfloat16}, wrap_with_ddp=False
    )
    provider: Any = bridge.to_megatron_provider(load_weights=False)
    provider.finalize()
    provider.initialize_model_parallel(seed=42, seed_kwargs={"te_rng_tracker": False})
    called: list[str] = []
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_torch_fsdp2=False,
        overlap_param_gather_with_optimizer_step=False,
        data_parallel_random_init=False,
        pre_wrap_hook=[lambda chunks: called.append("frozen")],
        mixed_precision_wrapper=Float16Module,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    assert called == ["frozen"]
    assert type(model[0].module) is Float16Module
    bridge.load_hf_weights(model)
    for (name, own), (other, theirs) in zip(
        model[0].module.module.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(own, theirs), name

    sizes = []
    for task in bridge.get_conversion_tasks(model):
        experts = task.mapping.ep_size if task.mapping.is_expert else 1
        sizes.append(task.param_weight.nbytes * task.mapping.tp_size * experts)
        assert isinstance(task.mapping.hf_param, (str, dict))
    assert sum(sizes) == sum(one.nbytes for one in model[0].parameters())
    streamed: dict[str, torch.Tensor] = {}
    tasks = bridge.get_conversion_tasks(model)
    for start in range(0, len(tasks), 10):
        part = tasks[start : start + 10]
        streamed |= exported(bridge, model, show_progress=False, conversion_tasks=part)
    stored = bridge.hf_pretrained.state
    assert streamed.keys() == exported(bridge, model).keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in streamed.items())


def test_skyrl(folders: dict[str, Path], tmp_path: Path) -> None:
    """The switch to the text half is refused; buckets keep the experts of a tensor together."""
    bridge = AutoBridge.from_hf_pretrained(folders[EXPERTS], trust_remote_code=True)
    model = bridge.to_megatron_model(wrap_with_ddp=True, bf16=True)
    buckets: dict[str, list[Any]] = {}
    for task in bridge.get_conversion_tasks(model):
        buckets.setdefault(task.mapping.group_key or "others", []).append(task)
    assert len(buckets) > 2
    found: dict[str, torch.Tensor] = {}
    for tasks in buckets.values():
        found |= exported(bridge, model, conversion_tasks=tasks, merge_adapter_weights=False)
    assert_files_hold(folders[EXPERTS], found)
    [group] = (key for key in buckets if ".layers.1." in key and key.endswith("down_proj"))
    with pytest.raises(InputError, match=rf"{group}: .* give all tasks of one mapping.group_key"):
        exported(bridge, model, conversion_tasks=buckets[group][:2])
    bridge.save_hf_pretrained(model, tmp_path / "out", show_progress=False)
    assert_files_hold(tmp_path / "out", found)
    bridge.hf_pretrained.config.architectures = ["Qwen3VLMoeTextModel"]
    with pytest.raises(UnsupportedModel, match="text half"):
        bridge.to_megatron_provider()


def test_areal(folders: dict[str, Path], tmp_path: Path) -> None:
    """A dtype and a device for the bridge; a folder that is made before it is saved to."""
    bridge = AutoBridge.from_hf_pretrained(
        str(folders[DENSE]), trust_remote_code=True, dtype="bfloat16", device_map="cpu"
    )
    provider: Any = bridge.to_megatron_provider(load_weights=False)
    provider.finalize()
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(),
        wrap_with_ddp=True,
        use_megatron_fsdp=False,
        use_torch_fsdp2=False,
        data_parallel_random_init=True,
    )
    bridge.load_hf_weights(model, folders[DENSE])
    target = tmp_path / "step1" / "weights"
    target.mkdir(parents=True)
    bridge.save_hf_pretrained(
        model, target, source_path=str(folders[DENSE]), distributed_save=False, strict=True
    )
    assert_files_hold(target, bridge.hf_pretrained.state)
    for file in bridge.hf_pretrained.side_files:
        assert (target / file).read_bytes() == (folders[DENSE] / file).read_bytes()
    with pytest.raises(TargetExists):
        bridge.save_hf_pretrained(model, target)
    bridge.save_hf_pretrained(model, target, force=True, weight_dtype=torch.float32)
    assert json.loads((target / "config.json").read_text())["text_config"]["dtype"] == "float32"


def test_rlinf(folders: dict[str, Path], tmp_path: Path) -> None:
    config = DistributedDataParallelConfig(
        check_for_nan_in_grad=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    config.average_in_collective = False
    config.finalize()
    bridge = AutoBridge.from_hf_pretrained(folders[EXPERTS])
    provider: Any = bridge.to_megatron_provider(load_weights=True)
    provider.finalize()
    model = provider.provide_distributed_model(ddp_config=config)
    assert model[0].ddp_config is config
    bridge.save_hf_pretrained(model, tmp_path / "out", save_every_n_ranks=8)
    assert_files_hold(tmp_path / "out", bridge.hf_pretrained.state)
    config.num_buckets = config.bucket_size = 3
    with pytest.raises(ConfigError, match="megatron-core refuses: Cannot specify both"):
        config.finalize()


def test_ms_swift(folders: dict[str, Path]) -> None:
    bridge = AutoBridge.from_hf_pretrained(folders[EXPERTS])
    provider: Any = bridge.to_megatron_provider()
    same = provider.apply_overrides_and_finalize(
        dtype=torch.bfloat16, overrides={"recompute_granularity": "selective"}
    )
    assert same is provider
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    found = {item.param_name: item.weight for item in bridge.export_hf_weights(model)}
    assert_files_hold(folders[EXPERTS], found)


def test_model_optimizer(folders: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint with its tokenizer; artifacts first, then weights beside them."""
    bridge = AutoBridge.from_hf_pretrained(folders[DENSE])
    provider: Any = bridge.to_megatron_provider()
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.save_megatron_model(
        model,
        tmp_path / "meg",
        hf_tokenizer_path=bridge.hf_pretrained.model_name_or_path,
        hf_tokenizer_kwargs={"use_fast": True},
        low_memory_save=True,
    )
    record = yaml.safe_load((tmp_path / "meg/iter_0000000/run_config.yaml").read_text())
    assert record["tokenizer"] == {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(folders[DENSE]),
        "hf_tokenizer_kwargs": {"use_fast": True},
    }
    for arguments, message in (
        ({"hf_tokenizer_kwargs": {"use_fast": True}}, "without hf_tokenizer_path"),
        (
            {"hf_tokenizer_path": "x", "hf_tokenizer_kwargs": {"a": torch.float32}},
            "hf_tokenizer_kwargs: .*plain values only",
        ),
    ):
        with pytest.raises(InputError, match=message):
            bridge.save_megatron_model(model, tmp_path / "other", **arguments)
    out = tmp_path / "hf"
    bridge.hf_pretrained.save_artifacts(out)
    (out / "modelopt.json").write_text("{}")
    bridge.save_hf_weights(model, out)
    assert_files_hold(out, bridge.hf_pretrained.state)
    assert (out / "modelopt.json").exists()
    bridge.hf_pretrained.save_artifacts(tmp_path / "again")
    with pytest.raises(TargetExists, match=r"chat_template.jinja exists already"):
        bridge.save_hf_pretrained(model, tmp_path / "again")
    assert bridge.hf_pretrained.image_processor.merge_size == 2


def test_export_deploy(folders: dict[str, Path], tmp_path: Path) -> None:
    """The model of a checkpoint, by the checkpoint."""
    (tmp_path / "meg").mkdir()
    AutoBridge.import_ckpt(hf_model_id=folders[DENSE], megatron_path=tmp_path / "meg")
    assert AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "meg") is None
    changed = tmp_path / "hf"
    made = PreTrainedVLM.from_pretrained(folders[DENSE])
    made.save_artifacts(changed)
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 7.0
    (changed / "config.json").write_text(json.dumps(config))
    for named in (changed, None):
        bridge = AutoBridge.from_auto_config(tmp_path / "meg", named)
        assert bridge.hf_pretrained.hf_config.data == made.hf_config.data
        assert bridge.hf_pretrained.config.text_config.rms_norm_eps == 1e-6
        bridge.hf_pretrained.save_artifacts(tmp_path / f"artifacts of {named is None}")
        model = bridge.load_megatron_model(
            tmp_path / "meg", mp_overrides={}, skip_temp_dist_context=True
        )
        bridge.export_ckpt(tmp_path / "meg", tmp_path / f"back {named is None}", strict=False)
        assert_files_hold(tmp_path / f"back {named is None}", made.state)
        assert all(
            torch.equal(tensor, made.state[name])
            for name, tensor in exported(bridge, model).items()
        )
    written = (tmp_path / "artifacts of False" / "config.json").read_text()
    assert json.loads(written) == made.hf_config.data
    assert (tmp_path / "artifacts of False" / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="no_checkpoint"):
        AutoBridge.from_auto_config(tmp_path / "no_checkpoint", folders[DENSE])


def test_megatron_bridges_own_scripts(folders: dict[str, Path]) -> None:
    """A dtype of transformers' older name; the mapping of parameters that have no memory."""
    bridge = AutoBridge.from_hf_pretrained(folders[EXPERTS], torch_dtype=torch.float32)
    provider: Any = bridge.to_megatron_provider()
    assert (provider.params_dtype, provider.bf16) == (torch.float32, False)
    model = bridge.to_megatron_model(
        load_weights=False,
        wrap_with_ddp=False,
        init_model_with_meta_device=True,
        mixed_precision_wrapper=None,
    )
    names = [task.global_param_name for task in bridge.get_conversion_tasks(model)]
    assert sorted(names) == sorted(name for name, _ in model[0].named_parameters())
    assert names.index("language_model.decoder.layers.2.mlp.router.weight") < names.index(
        "language_model.decoder.layers.3.input_layernorm.weight"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hidden_layers": 2}, r"num_hidden_layers .*; give text_config={'num_hidden_layers"),
        ({"text_config": {"num_layer": 2}}, r"text_config.num_layer is no value of a Qwen3_5Text"),
        ({"archtectures": []}, "was architectures meant"),
        ({"attn_implementation": "sdpa"}, "attn_implementation is no value"),
        ({"device_map": "cuda:0"}, "device_map='cuda:0': from_hf_pretrained loads no model"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "are two names for one thing"),
    ],
)
def test_what_from_hf_pretrained_cannot_honour(
    arguments: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=message):
        AutoBridge.from_hf_pretrained(folders[DENSE], **arguments)


def test_config_values(folders: dict[str, Path]) -> None:
    bridge = AutoBridge.from_hf_pretrained(
        folders[DENSE],
        torch_dtype="auto",
        vision_start_token_id=7,
        text_config={"rms_norm_eps": 0.5},
    )
    provider: Any = bridge.to_megatron_provider()
    assert (provider.vision_start_token_id, provider.layernorm_epsilon) == (7, 0.5)
    assert provider.params_dtype == torch.bfloat16


def test_what_saving_cannot_honour(folders: dict[str, Path], tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(folders[DENSE])
    saves: list[Callable[..., None]] = [bridge.save_hf_weights, bridge.save_hf_pretrained]
    for save in saves:
        with pytest.raises(InputError, match=f"{save.__name__} takes no option 'overwrite'; its"):
            save([], tmp_path / "out", overwrite=True)
        with pytest.raises(InputError, match="save_every_n_ranks is 0; expected"):
            save([], tmp_path / "out", save_every_n_ranks=0)
        with pytest.raises(InputError, match="two names for one thing"):
            save([], tmp_path / "out", dtype="float32", weight_dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bridge = AutoBridge.from_hf_pretrained(folders[DENSE])
    model = bridge.to_megatron_model()
    exported(bridge, model, show_progress=False)
    bridge.save_hf_weights(model, tmp_path / "quiet", show_progress=False)
    assert capsys.readouterr().err == ""
    exported(bridge, model, show_progress=True)
    bridge.save_hf_weights(model, tmp_path / "out", show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:12] for line in lines] == ["export: 100%", "save: 100% o"]


def test_tasks_that_are_no_tasks_of_the_model(folders: dict[str, Path]) -> None:
    bridge = AutoBridge.from_hf_pretrained(folders[DENSE])
    model = bridge.to_megatron_model()
    [task] = (
        one for one in bridge.get_conversion_tasks(model) if "final_layernorm" in one.param_name
    )
    wrong = dataclasses.replace(task, param_weight=torch.ones(3))
    with pytest.raises(InputError, match=r"final_layernorm.weight: param_weight has shape \(3,\)"):
        exported(bridge, model, conversion_tasks=[wrong])
    assert exported(bridge, model, conversion_tasks=[]) == {}
    elsewhere = dataclasses.replace(task, param_weight=None, megatron_module=None)
    assert exported(bridge, model, conversion_tasks=[elsewhere]) == {}
    assert parallel_state.get_tensor_model_parallel_world_size() == task.mapping.tp_size


def test_module_types() -> None:
    with pytest.raises(InputError, match=r"'split' is no way .* of Own; expected one of column"):
        AutoMapping.register_module_type("Own", "split")


def test_ddp_config_from_settings() -> None:
    assert create_ddp_config(wrap_with_ddp=False) is None
    config = create_ddp_config(overrides={"use_distributed_optimizer": False})
    assert config is not None
    assert not config.use_distributed_optimizer
    with pytest.raises(ConfigError, match=r"has no grad_reduce; was \w+ meant\?"):
        create_ddp_config(overrides={"grad_reduce": False})
    with pytest.raises(ConfigError, match=r"^use_megatron_fsdp=True"):
        create_ddp_config(use_megatron_fsdp=True)
