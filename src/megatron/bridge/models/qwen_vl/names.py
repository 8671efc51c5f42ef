"""How the Qwen families' tensors are named, as released and by other programs."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.diagnosis import Terms
from megatron.bridge.models.conversion.spelling import Root, Spelling, find_root
from megatron.bridge.models.qwen_vl.parts import (
    ALONE,
    BESIDE_VISION,
    DEEPSTACK_MERGERS,
    HF_HEAD,
    HF_MTP,
    HF_SCORE,
    HF_VISION,
    VISION_LAYERS,
    Prefixes,
)

_LANGUAGE_ANCHORS = (r"embed_tokens\.weight", r"layers\.\d+\.input_layernorm\.weight")
_VISION_ANCHORS = (
    r"patch_embed\.proj\.weight",
    r"blocks\.\d+\.attn\.qkv\.weight",
    r"merger\.linear_fc1\.weight",
)
_OPTIONAL_ANCHORS = {
    HF_HEAD: (r"lm_head\.weight",),
    HF_SCORE: (r"score\.weight",),
    HF_MTP: (r"mtp\.(?:fc|norm|pre_fc_norm_\w+)\.weight", r"mtp\.layers\.\d+\..*"),
}
"""Parts that files may lack."""

_LANGUAGE_PARTS = ("embed_tokens.", "layers.", "norm.")
"""What a language model consists of, which is told from other parts even where it has no root."""

type Roots = Mapping[str, tuple[str, ...]]
"""The root of a part as rows have it -> further roots that transformers takes for the same."""

_HEADS: Roots = {HF_HEAD: (f"model.{HF_HEAD}",), HF_SCORE: (f"model.{HF_SCORE}",)}

VISION_LANGUAGE_ROOTS: Roots = {
    BESIDE_VISION.hf: (
        "language_model.",
        f"model.{BESIDE_VISION.hf}",
        f"{BESIDE_VISION.hf}model.",
        "language_model.model.model.",
    ),
    HF_VISION: ("visual.", f"model.{HF_VISION}"),
    **_HEADS,
}
"""The roots of a vision-language model.

They are the released ones with and without ``model.``, and those of transformers' earlier versions.
"""

TEXT_ROOTS: Roots = {ALONE.hf: ("", f"model.{ALONE.hf}"), **_HEADS}
"""The roots of a model of text alone."""

HYBRID_TEXT_ROOTS: Roots = {
    **TEXT_ROOTS,
    ALONE.hf: (*TEXT_ROOTS[ALONE.hf], BESIDE_VISION.hf, f"{BESIDE_VISION.hf}model."),
}
"""The roots of a hybrid model of text alone.

transformers also takes the names of a vision-language model for it, and writes what it read.
"""

_TAKE_IT = "take it, and its part of config.json, from the base model"
_NO_CLASSIFIER = "set architectures to the class of a model that is no classifier if there is none"
_SIZES = {
    "V": "vocab_size",
    "H": "hidden_size",
    "I": "intermediate_size",
    "Q": "num_attention_heads x head_dim",
    "K": "num_key_value_heads x head_dim",
    "d": "head_dim",
    "E": "num_experts",
    "Ie": "moe_intermediate_size",
    "Is": "shared_expert_intermediate_size",
    "Z": "linear_num_value_heads x linear_value_head_dim",
    "nv": "linear_num_value_heads",
    "dv": "linear_value_head_dim",
    "w": "linear_conv_kernel_dim",
}
_OTHER_SIZES = {
    "L": "num_labels",
    "h": "vision_config.hidden_size",
    "i": "vision_config.intermediate_size",
    "O": "vision_config.out_hidden_size",
    "P": "vision_config.num_position_embeddings",
    "c": "vision_config.in_channels",
    "t": "vision_config.temporal_patch_size",
    "p": "vision_config.patch_size",
}


def find_spelling(
    names: Collection[str], prefixes: Prefixes, roots: Roots, *, tied: bool, bare: bool = False
) -> Spelling:
    """The roots of the names in some files: of the language model, vision tower, head, MTP layer.

    Args:
        names: those in the files.
        prefixes: what rows have before the names of the language model.
        roots: roots of the model's parts, with the vision tower's where there is one.
        tied: whether the output layer is the embedding, which may then stand under the name of
            either.
        bare: whether the model is one without an output layer, whose own names lack ``model.``.

    Raises:
        InputError: the language model or the vision tower is found under two roots that
            transformers does not take for one.
    """
    others = {root: [o for o in known if not (bare and o.startswith("model.model."))]
              for root, known in roots.items()}  # fmt: skip
    found = {
        part: find_root(names, part, anchors, what=what, others=others[part], never=HF_MTP)
        for part, what, anchors in (
            (prefixes.hf, "language model", _LANGUAGE_ANCHORS),
            (HF_VISION, "vision tower", _VISION_ANCHORS),
        )
        if part in roots
    }
    prefix = next(
        (
            prefix
            for part, root in found.items()
            if root is not None and (prefix := _prefix(root, part, others[part])) is not None
        ),
        "",
    )
    # The head and the MTP layer may be absent.
    optional = {
        part: f"{_optional_root(names, prefix, anchors)}{part}"
        for part, anchors in _OPTIONAL_ANCHORS.items()
    }
    spelled = [
        Root(part + end, root + end, tuple(other + end for other in others.get(part, ())))
        for part, one in (found | optional).items()
        for root in [f"{prefix}{part}" if one is None else one]
        for end in (_LANGUAGE_PARTS if part == prefixes.hf else ("",))
    ]
    spelling = Spelling.of_names(names, spelled)
    if tied and spelling.of(f"{prefixes.hf_embedding}weight") not in names:
        head = spelling.of(f"{HF_HEAD}weight")
        if head in names:
            embedding = Root(prefixes.hf_embedding, head.removesuffix("weight"))
            return replace(spelling, roots=(embedding, *spelling.roots))
    return spelling


def language_root(spelling: Spelling, prefixes: Prefixes) -> str:
    """What stands before the names of the language model in files."""
    return spelling.of(prefixes.hf_layers).removesuffix("layers.")


def _prefix(root: str, declared: str, others: Collection[str]) -> str | None:
    """What stands before all names, by one root: that of files of the bare model counts, too."""
    if root in others:
        return ""
    known = {declared, declared.removeprefix("model."), *others} - {""}
    for one in sorted(known, key=len, reverse=True):
        if root.endswith(one):
            return root.removesuffix(one)
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


def terms_of(spelling: Spelling, prefixes: Prefixes, section: str, *, vision: bool) -> Terms:
    """The words for messages about files that are spelled so.

    Args:
        spelling: how the names in the files are spelled.
        prefixes: what the names of the language model begin with.
        section: the section of config.json that describes the language model, with a dot behind it;
            empty where that is the whole.
        vision: whether the model has a vision tower.
    """
    parts = {
        language_root(spelling, prefixes): ("language model", _TAKE_IT),
        spelling.of(HF_HEAD): (
            "output layer",
            (
                "set tie_word_embeddings to true if it is the embedding, or architectures to the "
                "class of a model without one"
            ),
        ),
        spelling.of(HF_SCORE): ("head of the classifier", _NO_CLASSIFIER),
    }
    counts = {prefixes.layers: (f"{section}num_hidden_layers", "layers")}
    if vision:
        parts[spelling.of(HF_VISION)] = ("vision tower", _TAKE_IT)
        counts |= {
            VISION_LAYERS: ("vision_config.depth", "vision blocks"),
            DEEPSTACK_MERGERS: (
                "the length of vision_config.deepstack_visual_indexes",
                "deepstack mergers",
            ),
        }
    return Terms(
        parts=dict(sorted(parts.items(), key=lambda part: -len(part[0]))),
        counts=counts,
        sizes={symbol: f"{section}{key}" for symbol, key in _SIZES.items()} | _OTHER_SIZES,
    )
