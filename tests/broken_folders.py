"""Changes of a model folder after which transformers does not load it, or not all of it."""

from __future__ import annotations

import copy
import os
from random import Random
from typing import Any

from folders_in_memory import HEAD, INDEX, LANGUAGE, VISION, Folder, edit_json, noise
from whole_folders import classifier


def deleted_tensor(folder: Folder, random: Random) -> None:
    del folder.tensors[folder.any_of(random, LANGUAGE, VISION)]


def renamed_tensor(folder: Folder, random: Random) -> None:
    name = folder.any_of(random, LANGUAGE, VISION)
    other = name + random.choice(["_", ".data", "2"])
    folder.tensors[other] = folder.tensors.pop(name)


def renamed_everywhere(folder: Folder, random: Random) -> None:
    old, new = random.choice(
        [("self_attn.", "attention."), ("mlp.", "ffn."), ("blocks.", "layer."), ("norm", "ln")]
    )
    folder.rename(lambda name: name.replace(old, new))


def reshaped_tensor(folder: Folder, random: Random) -> None:
    name = folder.any_of(random, LANGUAGE, VISION)
    folder.tensors[name] = folder.tensors[name][:-1]


def transposed_tensor(folder: Folder, random: Random) -> None:
    names = [n for n, t in folder.tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1]]
    name = random.choice([name for name in names if not name.startswith("mtp.")])
    folder.tensors[name] = folder.tensors[name].t()


def _in_two(folder: Folder, random: Random) -> str:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder.split(random, *names)
    return random.choice(names)


def truncated_shard(folder: Folder, random: Random) -> None:
    file = _in_two(folder, random)
    cut = random.choice([1, 100, 5000])
    folder.edit.append(lambda path: os.truncate(path / file, (path / file).stat().st_size - cut))


def missing_shard(folder: Folder, random: Random) -> None:
    file = _in_two(folder, random)
    folder.edit.append(lambda path: (path / file).unlink())


def empty_shard(folder: Folder, random: Random) -> None:
    file = _in_two(folder, random)
    folder.edit.append(lambda path: (path / file).write_bytes(b""))


def page_in_place_of_a_shard(folder: Folder, random: Random) -> None:
    file = _in_two(folder, random)
    folder.edit.append(lambda path: (path / file).write_text("<html>404</html>" * 99))


def other_count(folder: Folder, random: Random) -> None:
    section, key = random.choice([(folder.text, "num_hidden_layers"), (folder.vision, "depth")])
    section[key] += random.randint(1, 3)
    if key == "num_hidden_layers" and "layer_types" in section:
        section["layer_types"] += ["full_attention"] * (section[key] - len(section["layer_types"]))


def other_size(folder: Folder, random: Random) -> None:
    keys = ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    if "num_experts" in folder.text:
        keys += ["num_experts", "moe_intermediate_size"]
    else:
        keys += ["intermediate_size"]
    key = random.choice(keys)
    if key not in ("num_attention_heads", "num_key_value_heads"):
        folder.text[key] += 8
    elif key == "num_attention_heads":
        folder.text[key] *= 2
    else:
        folder.text[key] = folder.text["num_attention_heads"]


def other_size_of_vision(folder: Folder, random: Random) -> None:
    key, by = random.choice(
        [("intermediate_size", 8), ("out_hidden_size", 16), ("num_position_embeddings", 7),
         ("patch_size", 2), ("hidden_size", folder.vision["num_heads"] * 4)]
    )  # fmt: skip
    folder.vision[key] += by
    if key == "num_position_embeddings":
        folder.vision[key] = 100 if folder.vision[key] != 100 else 81


def without_a_part(folder: Folder, random: Random) -> None:
    part = random.choice([VISION, LANGUAGE, f"{VISION}merger.", f"{LANGUAGE}layers."])
    folder.tensors = {n: t for n, t in folder.tensors.items() if not n.startswith(part)}


def without_layers(folder: Folder, random: Random) -> None:
    root = random.choice([f"{LANGUAGE}layers.", f"{VISION}blocks."])
    gone = random.choice([0, 1])
    folder.tensors = {n: t for n, t in folder.tensors.items() if not n.startswith(f"{root}{gone}.")}


def without_a_head(folder: Folder, random: Random) -> None:
    del folder.tensors[HEAD]


def classifier_without_its_head(folder: Folder, random: Random) -> None:
    classifier(folder, random)
    del folder.tensors["score.weight"]


def wrapped_layers(folder: Folder, random: Random) -> None:
    word = random.choice(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
    folder.rename(
        lambda name: ".".join(
            part + (f".{word}" if part.isdecimal() else "") for part in name.split(".")
        )
    )


def adapters_not_merged(folder: Folder, random: Random) -> None:
    for name, tensor in list(folder.tensors.items()):
        if name.startswith(LANGUAGE) and name.endswith("_proj.weight") and tensor.ndim == 2:
            module = name.removesuffix(".weight")
            folder.tensors[f"{module}.base_layer.weight"] = folder.tensors.pop(name)
            folder.tensors[f"{module}.lora_A.default.weight"] = noise(4, tensor.shape[1])
            folder.tensors[f"{module}.lora_B.default.weight"] = noise(tensor.shape[0], 4)


def names_of_another_program(folder: Folder, random: Random) -> None:
    word = random.choice(["blk.", "transformer.h.", "decoder.layers."])
    folder.tensors = {f"{word}{n}.w": t for n, t in enumerate(folder.tensors.values())}


def text_half(folder: Folder, random: Random) -> None:
    folder.tensors = {n: t for n, t in folder.tensors.items() if not n.startswith(VISION)}
    if random.random() < 0.5:
        text = folder.text | {"architectures": folder.config["architectures"]}
        folder.config = copy.deepcopy(text) | {"tie_word_embeddings": False}


def another_root_of_a_layer(folder: Folder, random: Random) -> None:
    """Roots that transformers does not take for the model's, unlike others."""
    root = random.choice(["model.", "", "language_model.model.", f"{LANGUAGE}language_model."])
    layer = f"{LANGUAGE}layers.1."
    folder.rename(lambda n: n.replace(LANGUAGE, root, 1) if n.startswith(layer) else n)


def expert_of_another_layout(folder: Folder, random: Random) -> None:
    """transformers takes the fused tensor of the layer for one to be merged."""
    hidden, inner = folder.text["hidden_size"], folder.text["moe_intermediate_size"]
    part, shape = random.choice([("gate", (inner, hidden)), ("down", (hidden, inner))])
    name = f"{LANGUAGE}layers.1.mlp.experts.{random.choice([0, 2])}.{part}_proj.weight"
    folder.tensors[name] = noise(*shape)


def shard_without_an_entry(folder: Folder, random: Random) -> None:
    """The index names one of two files."""
    file = _in_two(folder, random)

    def forget(index: dict[str, Any]) -> None:
        names = index["weight_map"]
        index["weight_map"] = {name: of for name, of in names.items() if of != file}

    folder.edit.append(edit_json(INDEX, forget))
