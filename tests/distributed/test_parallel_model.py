"""Two gloo processes against one: tensor and sequence parallelism; test_pipelines has pipelines.

Logits and loss are Hugging Face's, gradients those of our model in one process, which the oracle
tests compare with Hugging Face. megatron-core's own DistributedDataParallel and
finalize_model_grads reduce the gradients, as in training. The processes are started once and run
every case; the tests look at what they found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forked import run_ranks
from oracle import tiny
from oracle.predictor import Predictor

WORLD = 2
TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}
# case: (config of the model, fields of the provider)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("untied", TENSOR),
    "tensor_tied_biased": ("tied_biased", TENSOR),
    "fewer_kv_heads_than_ranks": ("one_kv_head", TENSOR),
    "sequence": ("untied", SEQUENCE),
    "data": ("untied", {}),
    # In training, megatron-core has experts and tensor parallelism with sequence parallelism only.
    "experts_sequence": ("experts", SEQUENCE),
    "experts_counted_together": ("counted_together", SEQUENCE),
    "experts_counted_together_recompute": ("counted_together", SEQUENCE | RECOMPUTE),
    "hybrid_tensor": ("hybrid", TENSOR),
    "hybrid_experts_sequence": ("hybrid_experts", SEQUENCE),
    "hybrid_experts_sequence_recompute": (
        "hybrid_experts",
        SEQUENCE | RECOMPUTE | {"recompute_num_layers": 1},
    ),
}
EVEN_VISION_HEADS = {"vision_config": {"num_heads": 6}}
# Large, so that the loss that balances the experts counts beside the sum of that of the tokens.
BALANCE = {"moe_aux_loss_coeff": 10.0}
PREDICTOR = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 40.0}
MTP_CONFIG = {"text_config": {"mtp_num_hidden_layers": 1}}
HYBRID_EXPERTS = "qwen3_5_moe-2x_value_heads"
# config: (case of tiny.CASES, entries of its config, fields of the provider in every run)
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "untied": ("qwen3_vl", {}, {}),
    "tied_biased": (
        "qwen3_vl",
        {"tie_word_embeddings": True, "text_config": {"attention_bias": True}},
        {},
    ),
    "one_kv_head": ("qwen3_vl", {"text_config": {"num_key_value_heads": 1}}, {}),
    "experts": ("qwen3_vl_moe", {}, BALANCE),
    "counted_together": (
        "qwen3_vl_moe",
        {"text_config": {"output_router_logits": True, "router_aux_loss_coef": 10.0}},
        {},
    ),
    "hybrid": ("qwen3_5-3x_value_heads-one_kv_head", {}, {}),
    "hybrid_experts": (HYBRID_EXPERTS, MTP_CONFIG, BALANCE | PREDICTOR),
}


@contextmanager
def distributed_model(folder: str, fields: dict[str, Any]) -> Iterator[Any]:
    """The model in megatron-core's DistributedDataParallel."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype, provider.bf16 = torch.float32, False
    provider.make_vocab_size_divisible_by = 64
    provider.parallel_output = False
    for name, value in fields.items():
        setattr(provider, name, value)
    [model] = provider.provide_distributed_model(wrap_with_ddp=True)
    bridge.load_hf_weights([model.module])
    yield model
    destroy_moe_metrics_tracker()  # which is as long as the first model is deep
    parallel_state.destroy_model_parallel()


def train_step(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Loss [b, s]; the gradients are in `main_grad`."""
    from megatron.core.distributed import finalize_model_grads

    model.train()
    model.zero_grad_buffer()
    loss: Tensor = model(**inputs)
    loss.sum().backward()
    finalize_model_grads([model])
    return loss


def gradient_errors(model: Any, rank: int, expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each gradient against this rank's part of the full one."""
    errors = {}
    for name, parameter in model.module.named_parameters():
        full, found = expected[name], parameter.main_grad
        if parameter.shape != full.shape:
            full = local_part(full, parameter, rank, sections_of(model.module, name))
        errors[name] = float((found - full).norm() / full.norm().clamp(min=1e-6))
    return errors


def sections_of(model: Any, name: str) -> tuple[int, ...] | None:
    """Rows per rank of the sections of a weight that are split one by one, if they differ."""
    module_name, _, part = name.removesuffix(".weight").rpartition(".")
    if part not in ("in_proj", "conv1d"):
        return None
    sections = model.get_submodule(module_name).in_proj_split_sections
    return sections if part == "in_proj" else sections[:3]


def local_part(full: Tensor, parameter: Any, rank: int, sections: tuple[int, ...] | None) -> Tensor:
    dim = parameter.partition_dim
    if missing := parameter.shape[dim] * WORLD - full.shape[dim]:
        full = F.pad(full, (0, 0, 0, missing))  # the vocabulary is padded for two ranks
    if sections is None:
        # megatron-core sets no stride where a weight is split without one.
        parts = full.chunk(getattr(parameter, "partition_stride", 1), dim)
    else:
        parts = full.split([WORLD * size for size in sections], dim)
    return torch.cat([part.chunk(WORLD, dim)[rank] for part in parts], dim)


def run_case(
    case: str, folder: str, rank: int, inputs: dict[str, Tensor], labels: Tensor
) -> dict[str, Any]:
    config, fields = CASES[case]
    reference = torch.load(f"{folder}/{config}.pt")
    found: dict[str, Any] = {}
    with distributed_model(f"{folder}/{config}", CONFIGS[config][2] | fields) as model:
        with torch.no_grad():
            model.eval()
            logits = model(**inputs)
        loss = train_step(model, inputs | {"labels": labels})
        found["gradients"] = gradient_errors(model, rank, reference["gradients"])
    real = inputs["attention_mask"].bool()
    difference = logits[..., : tiny.VOCAB_SIZE] - reference["logits"]
    found["vocabulary"] = logits.shape[-1]
    found["logits"] = float(difference[real].abs().max())
    found["loss"] = float((loss.detach() - reference["loss"]).abs().max())
    return found


def worker(rank: int, folder: str) -> None:
    inputs, labels = torch.load(f"{folder}/inputs.pt")
    results = {case: run_case(case, folder, rank, inputs, labels) for case in CASES}
    torch.save(results, f"{folder}/results{rank}.pt")


def save_reference(folder: Path, processor: Any, inputs: dict[str, Tensor], labels: Tensor) -> None:
    for name, (case, config, fields) in CONFIGS.items():
        hf = tiny.build_hf_model(tiny.build_case(processor, case, **EVEN_VISION_HEADS, **config))
        hf.save_pretrained(folder / name)
        if "mtp_num_layers" in fields:
            Predictor(hf).add_to(folder / name)
        processor.save_pretrained(folder / name)
        with torch.no_grad():
            logits = hf(**inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        with distributed_model(str(folder / name), fields) as model:
            train_step(model, inputs | {"labels": labels})
            gradients = {key: one.main_grad for key, one in model.module.named_parameters()}
        torch.save(
            {"logits": logits, "loss": loss.view_as(labels), "gradients": gradients},
            folder / f"{name}.pt",
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, case by case."""
    from megatron.bridge.runtime.parallel import destroy_process_groups

    folder = tmp_path_factory.mktemp("parallel")
    processor = tiny.build_processor()
    inputs = tiny.prompt(
        processor,
        [f"First {tiny.IMAGE} then {tiny.VIDEO} and {tiny.IMAGE}: which?", "Only words."],
        images=tiny.photographs(),
        videos=[tiny.video()],
        padding=True,
        pad_to_multiple_of=WORLD,
        padding_side="right",
    )
    labels = inputs["input_ids"].roll(-1, dims=1)
    labels[(inputs["mm_token_type_ids"] != 0) | (inputs["attention_mask"] == 0)] = -100
    torch.save((inputs, labels), folder / "inputs.pt")
    save_reference(folder, processor, inputs, labels)
    destroy_process_groups()
    run_ranks(worker, str(folder), world=WORLD)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss(results: list[dict[str, Any]], case: str) -> None:
    for one in (ranks[case] for ranks in results):
        assert one["logits"] <= 1e-4
        assert one["loss"] <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_every_gradient(results: list[dict[str, Any]], case: str) -> None:
    names: set[str] = set()
    for ranks in results:
        errors = ranks[case]["gradients"]
        names |= errors.keys()
        assert max(errors.values()) <= 1e-3, max(errors.items(), key=lambda item: item[1])
    assert len(names) > 100


def test_padded_vocabulary_has_no_part_in_the_loss(results: list[dict[str, Any]]) -> None:
    """The padding differs between the runs, the loss (see above) does not."""
    assert results[0]["tensor"]["vocabulary"] == 384
    assert results[1]["data"]["vocabulary"] == 320
