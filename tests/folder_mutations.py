"""Seeded changes of a small model folder: as people bring them, and as they break.

folder = Folder.of(model)
change(folder, random)          # one of WHOLE or BROKEN
folder.write(path)
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LANGUAGE = "model.language_model."
VISION = "model.visual."
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
HEAD = "lm_head.weight"

type Tensors = dict[str, torch.Tensor]


@dataclass
class Folder:
    """A model folder in memory: changed, then written.

    shards: file -> names of its tensors. index: whether a weight index is written. beside: further
    safetensors files. edit: changes of the files once they are written.
    """

    config: dict[str, Any]
    tensors: Tensors
    side_files: dict[str, bytes]
    shards: dict[str, list[str]] = field(default_factory=dict)
    index: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Tensors] = field(default_factory=dict)
    edit: list[Callable[[Path], None]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Path) -> Folder:
        """A folder with one file of weights."""
        side = {
            path.name: path.read_bytes()
            for path in model.iterdir()
            if path.is_file() and path.name not in ("config.json", INDEX)
        }
        side = {name: data for name, data in side.items() if not name.endswith(".safetensors")}
        return cls(json.loads((model / "config.json").read_text()), read_tensors(model), side)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @property
    def text(self) -> dict[str, Any]:
        return self.config["text_config"]  # type: ignore[no-any-return]

    @property
    def vision(self) -> dict[str, Any]:
        return self.config["vision_config"]  # type: ignore[no-any-return]

    def any_of(self, random: Random, *parts: str) -> str:
        """The name of a tensor with one of these parts."""
        return random.choice([n for n in self.tensors if any(part in n for part in parts)])

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}

    def split(self, random: Random, *names: str) -> None:
        """Distribute the tensors over files of these names, with an index."""
        order = sorted(self.tensors)
        random.shuffle(order)
        self.shards = {name: order[number :: len(names)] for number, name in enumerate(names)}
        self.index = True

    def write(self, path: Path) -> Path:
        from safetensors.torch import save_file

        path.mkdir()
        for name, data in self.side_files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        (path / "config.json").write_text(json.dumps(self.config, indent=2))
        shards = self.shards or {SINGLE: list(self.tensors)}
        for file, names in shards.items():
            tensors = {name: self.tensors[name].contiguous().clone() for name in names}
            save_file(tensors, path / file, {"format": "pt"})
        for file, tensors in self.beside.items():
            save_file({n: t.clone() for n, t in tensors.items()}, path / file, {"format": "pt"})
        if self.index:
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            content = {
                "metadata": {"total_size": total} | self.metadata,
                "weight_map": {name: file for file, names in shards.items() for name in names},
            }
            (path / INDEX).write_text(json.dumps(content, indent=2))
        for change in self.edit:
            change(path)
        return path


def read_tensors(folder: Path) -> Tensors:
    """All tensors of the safetensors files in a folder that are the model's, by name."""
    from safetensors.torch import load

    single = folder / SINGLE
    files = [single]
    if not single.exists():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    return {name: t for path in files for name, t in load(path.read_bytes()).items()}


def _edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _noise(*shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).bfloat16()


# --- that transformers loads, every weight filled ---


def extra_tensors(folder: Folder, random: Random) -> None:
    for number in range(random.randint(1, 3)):
        name = random.choice(["extra.weight", f"{LANGUAGE}adapter.weight", f"{VISION}scale", "x"])
        shape = random.choice([(), (3,), (2, 5), (0, 4), (2, 3, 4)])
        dtype = random.choice([torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool])
        folder.tensors[f"{name}{number}"] = _noise(*shape).to(dtype)


def buffers(folder: Folder, random: Random) -> None:
    folder.tensors[f"{LANGUAGE}rotary_emb.inv_freq"] = _noise(16).float()
    folder.tensors[f"{VISION}rotary_pos_emb.inv_freq"] = _noise(9).float()


def value_head_inside(folder: Folder, random: Random) -> None:
    hidden = folder.text["hidden_size"]
    name = random.choice(["v_head.summary", "value_head", "score"])
    folder.tensors[f"{name}.weight"] = _noise(1, hidden)
    folder.tensors[f"{name}.bias"] = _noise(1)


def value_head_beside(folder: Folder, random: Random) -> None:
    folder.beside["value_head.safetensors"] = {"v_head.summary.weight": _noise(1, 160)}
    if random.random() < 0.5:
        folder.split(random, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def adapter_beside(folder: Folder, random: Random) -> None:
    name = f"base_model.model.{LANGUAGE}layers.0.self_attn.q_proj.lora_A.weight"
    folder.beside["adapter_model.safetensors"] = {name: _noise(4, 160)}


def consolidated_beside(folder: Folder, random: Random) -> None:
    folder.beside["consolidated.safetensors"] = {"tok_embeddings.weight": _noise(7, 5)}


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
    folder.tensors["score.weight"] = _noise(labels, folder.text["hidden_size"])
    if kind == "Token":
        folder.tensors["score.bias"] = _noise(labels)


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

    folder.edit.append(_edit_json(INDEX, change))


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

    folder.beside["model-00001-of-00002.safetensors"] = {"a.weight": _noise(5, 3)}
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
            folder.tensors[name.replace(".weight", ".bias")] = _noise(tensor.shape[0])


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


# --- that transformers does not load, or not all of it ---


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
            folder.tensors[f"{module}.lora_A.default.weight"] = _noise(4, tensor.shape[1])
            folder.tensors[f"{module}.lora_B.default.weight"] = _noise(tensor.shape[0], 4)


def names_of_another_program(folder: Folder, random: Random) -> None:
    word = random.choice(["blk.", "transformer.h.", "decoder.layers."])
    folder.tensors = {f"{word}{n}.w": t for n, t in enumerate(folder.tensors.values())}


def text_half(folder: Folder, random: Random) -> None:
    folder.tensors = {n: t for n, t in folder.tensors.items() if not n.startswith(VISION)}
    if random.random() < 0.5:
        text = folder.text | {"architectures": folder.config["architectures"]}
        folder.config = copy.deepcopy(text) | {"tie_word_embeddings": False}


QWEN3_5 = frozenset({"qwen3_5", "qwen3_5_moe"})
DENSE_3_5 = frozenset({"qwen3_5"})
ALL = QWEN3_5 | {"qwen3_vl", "qwen3_vl_moe"}

type Change = Callable[[Folder, Random], None]

WHOLE: Mapping[Change, frozenset[str]] = {
    extra_tensors: ALL,
    buffers: ALL,
    value_head_inside: ALL,
    value_head_beside: ALL,
    adapter_beside: ALL,
    consolidated_beside: ALL,
    side_files: ALL,
    tied_with_a_copy: ALL,
    tied_under_the_other_name: ALL,
    names_of_the_bare_model: ALL,
    bare_model: ALL,
    classifier: DENSE_3_5,
    other_shard_names: ALL,
    stale_metadata: ALL,
    index_with_one_file: ALL,
    index_of_other_names: ALL,
    stale_index: ALL,
    in_two_shards: ALL,
    layers_beyond: ALL,
    biases: ALL,
    another_copy: ALL,
    other_mtp: QWEN3_5,
}
"""Changes after which transformers fills every weight, and the families they can happen to."""

OF_OTHER_PARTS: Mapping[Change, frozenset[str]] = {dtype_of_one_tensor: ALL, left_out_keys: ALL}
"""More of them, which need more than names: dtypes of single tensors, defaults of the config."""

BROKEN: Mapping[Change, frozenset[str]] = {
    deleted_tensor: ALL,
    renamed_tensor: ALL,
    renamed_everywhere: ALL,
    reshaped_tensor: ALL,
    transposed_tensor: ALL,
    truncated_shard: ALL,
    missing_shard: ALL,
    empty_shard: ALL,
    page_in_place_of_a_shard: ALL,
    other_count: ALL,
    other_size: ALL,
    other_size_of_vision: ALL,
    without_a_part: ALL,
    without_layers: ALL,
    without_a_head: ALL,
    classifier_without_its_head: DENSE_3_5,
    wrapped_layers: ALL,
    adapters_not_merged: ALL,
    names_of_another_program: ALL,
    text_half: ALL,
}
"""Changes after which it does not."""


def draw(seed: int, changes: Mapping[Change, frozenset[str]], family: str) -> Change:
    """The change number `seed` for a family: each in its turn."""
    fitting = [change for change, families in changes.items() if family in families]
    return fitting[seed % len(fitting)]
