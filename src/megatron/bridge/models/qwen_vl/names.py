"""How the Qwen vision-language families' tensors are named, as released and by other programs."""

from collections.abc import Collection
from dataclasses import replace

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.diagnosis import Terms
from megatron.bridge.models.conversion.spelling import Root, Spelling, find_root
from megatron.bridge.models.qwen_vl.rows import (
    DECODER_LAYERS,
    DEEPSTACK_MERGERS,
    HF_EMBEDDING,
    HF_HEAD,
    HF_LANGUAGE,
    HF_MTP,
    HF_VISION,
    VISION_LAYERS,
)

_LANGUAGE_ANCHORS = (r"embed_tokens\.weight", r"layers\.\d+\.input_layernorm\.weight")
_VISION_ANCHORS = (
    r"patch_embed\.proj\.weight",
    r"blocks\.\d+\.attn\.qkv\.weight",
    r"merger\.linear_fc1\.weight",
)
_HEAD_ANCHORS = (r"lm_head\.weight",)
_MTP_ANCHORS = (r"mtp\.(?:fc|norm|pre_fc_norm_\w+)\.weight", r"mtp\.layers\.\d+\..*")

_OTHER_ROOTS = {
    HF_LANGUAGE: (
        "language_model.",
        f"model.{HF_LANGUAGE}",
        f"{HF_LANGUAGE}model.",
        "language_model.model.model.",
    ),
    HF_VISION: ("visual.", f"model.{HF_VISION}"),
    HF_HEAD: (f"model.{HF_HEAD}",),
}
"""What transformers takes for the root of a part as it is released, name by name: with or without
``model.`` before it, and the roots of its own earlier versions."""

_TAKE_IT = "take it, and its part of config.json, from the base model"
_SIZES = {
    "V": "text_config.vocab_size",
    "H": "text_config.hidden_size",
    "I": "text_config.intermediate_size",
    "Q": "text_config.num_attention_heads x head_dim",
    "K": "text_config.num_key_value_heads x head_dim",
    "d": "text_config.head_dim",
    "E": "text_config.num_experts",
    "Ie": "text_config.moe_intermediate_size",
    "Is": "text_config.shared_expert_intermediate_size",
    "Z": "text_config.linear_num_value_heads x linear_value_head_dim",
    "nv": "text_config.linear_num_value_heads",
    "dv": "text_config.linear_value_head_dim",
    "w": "text_config.linear_conv_kernel_dim",
    "h": "vision_config.hidden_size",
    "i": "vision_config.intermediate_size",
    "O": "vision_config.out_hidden_size",
    "P": "vision_config.num_position_embeddings",
    "c": "vision_config.in_channels",
    "t": "vision_config.temporal_patch_size",
    "p": "vision_config.patch_size",
}


def find_spelling(names: Collection[str], *, tied: bool, bare: bool = False) -> Spelling:
    """The roots of the names in some files: of the language model, vision tower, head, MTP layer.

    tied: whether the output layer is the embedding, which may then stand under the name of either.
    bare: whether the model is one without an output layer, whose own names lack ``model.``. Raises
    InputError where the language model or the vision tower is found under two roots that
    transformers does not take for one.
    """
    others = {root: [o for o in known if not (bare and o.startswith("model.model."))]
              for root, known in _OTHER_ROOTS.items()}  # fmt: skip
    language = find_root(
        names,
        HF_LANGUAGE,
        _LANGUAGE_ANCHORS,
        what="language model",
        others=others[HF_LANGUAGE],
        never=HF_MTP,
    )
    vision = find_root(
        names, HF_VISION, _VISION_ANCHORS, what="vision tower", others=others[HF_VISION]
    )
    prefix = _prefix(language, HF_LANGUAGE)
    if prefix is None:
        prefix = _prefix(vision, HF_VISION) or ""
    roots = {
        HF_LANGUAGE: f"{prefix}{HF_LANGUAGE}" if language is None else language,
        HF_VISION: f"{prefix}{HF_VISION}" if vision is None else vision,
        HF_HEAD: f"{_optional_root(names, prefix, _HEAD_ANCHORS)}{HF_HEAD}",
        HF_MTP: f"{_optional_root(names, prefix, _MTP_ANCHORS)}{HF_MTP}",
    }
    found = [Root(part, root, tuple(others.get(part, ()))) for part, root in roots.items()]
    spelling = Spelling.of_names(names, found)
    if tied and spelling.of(f"{HF_EMBEDDING}weight") not in names:
        head = spelling.of(f"{HF_HEAD}weight")
        if head in names:
            embedding = Root(HF_EMBEDDING, head.removesuffix("weight"))
            return replace(spelling, roots=(embedding, *spelling.roots))
    return spelling


def _prefix(root: str | None, declared: str) -> str | None:
    """What stands before all names, by one root: that of files of the bare model counts, too."""
    if root in _OTHER_ROOTS[declared]:
        return ""
    for known in (declared, declared.removeprefix("model.")):
        if root is not None and root.endswith(known):
            return root.removesuffix(known)
    return None


def _optional_root(names: Collection[str], prefix: str, anchors: tuple[str, ...]) -> str:
    """The prefix of a part that the files may lack, or hold in more than one copy."""
    try:
        found = find_root(names, "", anchors, what="")
    except InputError:
        return prefix
    return prefix if found is None else found


def has_mtp_tensors(names: Collection[str]) -> bool:
    """Whether there are tensors of an MTP layer, under whatever prefix."""
    return any(name.startswith(HF_MTP) or f".{HF_MTP}" in name for name in names)


def terms_of(spelling: Spelling) -> Terms:
    """The words for messages about files that are spelled so."""
    parts = {
        spelling.of(HF_LANGUAGE): ("language model", _TAKE_IT),
        spelling.of(HF_VISION): ("vision tower", _TAKE_IT),
        spelling.of(HF_HEAD): (
            "output layer",
            (
                "set tie_word_embeddings to true if it is the embedding, or architectures to the "
                "class of a model without one"
            ),
        ),
    }
    return Terms(
        parts=dict(sorted(parts.items(), key=lambda part: -len(part[0]))),
        counts={
            DECODER_LAYERS: ("text_config.num_hidden_layers", "layers"),
            VISION_LAYERS: ("vision_config.depth", "vision blocks"),
            DEEPSTACK_MERGERS: (
                "the length of vision_config.deepstack_visual_indexes",
                "deepstack mergers",
            ),
        },
        sizes=_SIZES,
    )
