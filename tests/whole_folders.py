"""Changes of a model folder after which transformers fills every weight."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from folders_in_memory import (
    EMBEDDING,
    HEAD,
    INDEX,
    LANGUAGE,
    SINGLE,
    VISION,
    Folder,
    edit_json,
    noise,
)


def extra_tensors(folder: Folder, random: Random) -> None:
    for number in range(random.randint(1, 3)):
        name = random.choice(["extra.weight", f"{LANGUAGE}adapter.weight", f"{VISION}scale", "x"])
        shape = random.choice([(), (3,), (2, 5), (0, 4), (2, 3, 4)])
        dtype = random.choice(
            [
                torch.bfloat16,
                torch.float32,
                torch.int64,
                torch.uint8,
                torch.bool,
                torch.float8_e4m3fn,
            ]
        )
        folder.tensors[f"{name}{number}"] = noise(*shape).to(dtype)


def buffers(folder: Folder, random: Random) -> None:
    folder.tensors[f"{LANGUAGE}rotary_emb.inv_freq"] = noise(16).float()
    folder.tensors[f"{VISION}rotary_pos_emb.inv_freq"] = noise(9).float()


def value_head_inside(folder: Folder, random: Random) -> None:
    hidden = folder.text["hidden_size"]
    name = random.choice(["v_head.summary", "value_head", "score"])
    folder.tensors[f"{name}.weight"] = noise(1, hidden)
    folder.tensors[f"{name}.bias"] = noise(1)


def value_head_beside(folder: Folder, random: Random) -> None:
    folder.beside["value_head.safetensors"] = {"v_head.summary.weight": noise(1, 160)}
    if random.random() < 0.5:
        folder.split(random, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def adapter_beside(folder: Folder, random: Random) -> None:
    name = f"base_model.model.{LANGUAGE}layers.0.self_attn.q_proj.lora_A.weight"
    folder.beside["adapter_model.safetensors"] = {name: noise(4, 160)}


def consolidated_beside(folder: Folder, random: Random) -> None:
    folder.beside["consolidated.safetensors"] = {"tok_embeddings.weight": noise(7, 5)}


def side_files(folder: Folder, random: Random) -> None:
    names = ["README.md", "trainer_state.json", "1_Pooling/config.json", "vocab.txt", "LICENSE"]
    for name in random.sample(names, 3):
        folder.side_files[name] = f"{name} {random.random()}".encode()


def tied_with_a_copy(folder: Folder, random: Random) -> None:
    folder.config["tie_word_embeddings"] = True
    folder.tensors[HEAD] = folder.tensors[EMBEDDING].clone()


def tied_under_the_other_name(folder: Folder, random: Random) -> None:
    folder.config["tie_word_embeddings"] = True
    folder.tensors[HEAD] = folder.tensors.pop(EMBEDDING)


def names_of_the_bare_model(folder: Folder, random: Random) -> None:
    folder.rename(lambda name: name.removeprefix("model."))


def bare_model(folder: Folder, random: Random) -> None:
    """Saved by Qwen3VLModel and the like: no output layer."""
    del folder.tensors[HEAD]
    name = folder.config["architectures"][0]
    folder.config["architectures"] = [name.replace("ForConditionalGeneration", "Model")]
    if random.random() < 0.7:
        names_of_the_bare_model(folder, random)


def classifier(folder: Folder, random: Random) -> None:
    del folder.tensors[HEAD]
    kind = random.choice(["Sequence", "Token"])
    folder.config["architectures"] = [f"Qwen3_5For{kind}Classification"]
    labels = random.choice([1, 3])
    folder.config["num_labels"] = labels
    folder.tensors["score.weight"] = noise(labels, folder.text["hidden_size"])
    if kind == "Token":
        folder.tensors["score.bias"] = noise(labels)


def other_shard_names(folder: Folder, random: Random) -> None:
    count = random.randint(2, 4)
    pattern = random.choice(
        ["part-{0}.safetensors", "model.safetensors-{0:05}-of-{1:05}.safetensors",
         "model-{0:05}-of-{1:05}.safetensors", "m{0} of {1}.safetensors"]
    )  # fmt: skip
    folder.split(random, *(pattern.format(number + 1, count) for number in range(count)))


def stale_metadata(folder: Folder, random: Random) -> None:
    folder.split(random, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    folder.metadata = random.choice([{"total_size": 1}, {"total_size": "12"}, {"total_size": None}])


def index_with_one_file(folder: Folder, random: Random) -> None:
    folder.split(random, SINGLE)


def index_of_other_names(folder: Folder, random: Random) -> None:
    """A tensor that no shard holds, and one of a shard that the index leaves out."""
    folder.split(random, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    gone = folder.any_of(random, "mlp")

    def change(index: dict[str, Any]) -> None:
        file = index["weight_map"].pop(gone)
        index["weight_map"]["model.gone.weight"] = file

    folder.edit.append(edit_json(INDEX, change))


def in_two_shards(folder: Folder, random: Random) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder.split(random, *names)
    folder.shards[names[1]].append(random.choice(folder.shards[names[0]]))


def stale_index(folder: Folder, random: Random) -> None:
    """One file was saved over a model in shards, some of which are gone."""

    def leave(path: Path) -> None:
        shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        files = dict(zip(["a.weight", "b"], shards, strict=True))
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    folder.beside["model-00001-of-00002.safetensors"] = {"a.weight": noise(5, 3)}
    folder.edit.append(leave)


def layers_beyond(folder: Folder, random: Random) -> None:
    root, section, key = random.choice(
        [(f"{LANGUAGE}layers.", folder.text, "num_hidden_layers"),
         (f"{VISION}blocks.", folder.vision, "depth")]
    )  # fmt: skip
    count = section[key]
    for name, tensor in list(folder.tensors.items()):
        if name.startswith(f"{root}0."):
            folder.tensors[name.replace(f"{root}0.", f"{root}{count}.")] = tensor.clone()


def biases(folder: Folder, random: Random) -> None:
    for name, tensor in list(folder.tensors.items()):
        if name.startswith(LANGUAGE) and name.endswith("_proj.weight"):
            folder.tensors[name.replace(".weight", ".bias")] = noise(tensor.shape[0])


def another_copy(folder: Folder, random: Random) -> None:
    """Averaged weights that a training program kept beside the model's."""
    root = random.choice([LANGUAGE, VISION])
    for name, tensor in list(folder.tensors.items()):
        if name.startswith(root):
            folder.tensors[f"ema.{name}"] = tensor * 2


def other_mtp(folder: Folder, random: Random) -> None:
    kind = random.choice(["none", "narrow", "incomplete", "two", "more"])
    mtp = [name for name in folder.tensors if name.startswith("mtp.")]
    if kind == "none":
        for name in mtp:
            del folder.tensors[name]
    elif kind == "narrow":
        folder.tensors["mtp.fc.weight"] = folder.tensors["mtp.fc.weight"][:-3]
    elif kind == "incomplete":
        del folder.tensors[random.choice(mtp)]
    elif kind == "two":
        folder.text["mtp_num_hidden_layers"] = 2
        for name in mtp:
            if name.startswith("mtp.layers.0."):
                other = name.replace(".layers.0.", ".layers.1.")
                folder.tensors[other] = folder.tensors[name] * 2
    else:
        folder.text["mtp_use_dedicated_embeddings"] = True
        folder.tensors["mtp.embed_tokens.weight"] = folder.tensors[EMBEDDING] * 2


def dtype_of_one_tensor(folder: Folder, random: Random) -> None:
    name = folder.any_of(random, "_proj", "norm", "fc", "qkv")
    folder.tensors[name] = folder.tensors[name].to(random.choice([torch.float32, torch.float16]))


def left_out_keys(folder: Folder, random: Random) -> None:
    """Keys with a default that is the value which they have."""
    import transformers

    default = getattr(
        transformers, f"{folder.config['architectures'][0].partition('For')[0]}Config"
    )
    for section, defaults in ((folder.text, default().text_config.to_dict()),
                              (folder.vision, default().vision_config.to_dict())):  # fmt: skip
        same = [key for key in section if key in defaults and defaults[key] == section[key]]
        for key in random.sample(same, min(2, len(same))):
            del section[key]


def half_prefixed(folder: Folder, random: Random) -> None:
    """A tensor, a layer, a part under another root that transformers takes for the same."""
    part = random.choice(
        [f"{LANGUAGE}layers.1.", f"{LANGUAGE}layers.0.mlp.", VISION, f"{VISION}blocks.1.attn.",
         EMBEDDING, f"{LANGUAGE}norm.", HEAD, folder.any_of(random, LANGUAGE, VISION)]
    )  # fmt: skip
    if random.random() < 0.3 and part != HEAD:
        names_of_the_bare_model(folder, random)
        bare = part.removeprefix("model.")
        folder.rename(lambda name: f"model.{name}" if name.startswith(bare) else name)
        return
    root = next(root for root in (LANGUAGE, VISION, HEAD) if part.startswith(root))
    others = {
        LANGUAGE: ["language_model.", f"model.{LANGUAGE}", f"{LANGUAGE}model."],
        VISION: ["visual.", f"model.{VISION}"],
        HEAD: [f"model.{HEAD}"],
    }
    other = random.choice(others[root])
    folder.rename(lambda name: name.replace(root, other, 1) if name.startswith(part) else name)


def a_copy_under_another_root(folder: Folder, random: Random) -> None:
    name = folder.any_of(random, LANGUAGE, VISION)
    other = random.choice([name.removeprefix("model."), f"model.{name}"])
    folder.tensors[other] = folder.tensors[name].clone()


def tracker_of_a_trainer(folder: Folder, random: Random) -> None:
    """Saved into the folder of a training run: `.metadata` is hidden, and stays behind."""
    folder.side_files["latest_checkpointed_iteration.txt"] = b"100"
    folder.side_files["iter_0000100/run_config.yaml"] = b"model: {}"


def shards_in_folders(folder: Folder, random: Random) -> None:
    names = ["./model-00001-of-00003.safetensors", "shards/model-00002-of-00003.safetensors",
             "shards/./last//model-00003-of-00003.safetensors"]  # fmt: skip
    folder.split(random, *random.sample(names, random.randint(1, 3)))


def experts_passed_over(folder: Folder, random: Random) -> None:
    """Tensors of experts one by one that transformers does not merge, or leaves out."""
    hidden, inner = folder.text["hidden_size"], folder.text["moe_intermediate_size"]
    layer = 1 if folder.family == "qwen3_vl_moe" else 77
    part, shape = random.choice([("gate", (inner, hidden)), ("down", (hidden, inner))])
    name = f"{LANGUAGE}layers.{layer}.mlp.experts.{random.choice([0, 2])}.{part}_proj"
    folder.tensors[f"{name}.weight"] = noise(*shape)
    folder.tensors[f"{LANGUAGE}layers.1.mlp.experts.1.{part}_proj.bias"] = noise(5)


def split_experts(folder: Folder) -> None:
    """Experts of [E, 2I, H] and [E, H, I] as tensors of their own."""
    size = folder.text["moe_intermediate_size"]
    for name in [name for name in folder.tensors if name.endswith(".experts.gate_up_proj")]:
        root = name.removesuffix("gate_up_proj")
        both, down = folder.tensors.pop(name), folder.tensors.pop(f"{root}down_proj")
        for number, (one, its_down) in enumerate(zip(both, down, strict=True)):
            parts = {"gate": one[:size], "up": one[size:], "down": its_down}
            for part, tensor in parts.items():
                folder.tensors[f"{root}{number}.{part}_proj.weight"] = tensor.contiguous()


def experts_one_by_one(folder: Folder, random: Random) -> None:
    """Those of a layer perhaps under another root, and a gate_up_proj beside them."""
    split_experts(folder)
    if random.random() < 0.5:
        folder.tensors[f"{LANGUAGE}layers.1.mlp.experts.gate_up_proj"] = noise(3, 5)
    elif random.random() < 0.5:
        experts = f"{LANGUAGE}layers.0.mlp.experts."
        folder.rename(lambda n: n.removeprefix("model.") if n.startswith(experts) else n)
