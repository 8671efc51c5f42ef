"""What stands beside the weights: tokenizer, processors, chat template, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.bridge.synthetic.family import Family

# A conversation in the ChatML format, each image or video as its placeholder between marks; the
# processor replaces the placeholder by one token per merged patch.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('cannot render content of type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as transformers formats it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_side_files(
    folder: Path, family: Family, config: dict[str, Any], first_token_id: int
) -> None:
    """Write everything but the weights: `config` as config.json, and what fits to it.

    `first_token_id` is the id of the family's first token.
    """
    write_json(folder / "config.json", config)
    ids = {token: number for number, token in enumerate(family.tokens, first_token_id)}
    _write_tokenizer(folder, family, ids, config["text_config"]["max_position_embeddings"])
    _write_processors(folder, family, config["vision_config"])
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": config["transformers_version"],
        },
    )


def _write_tokenizer(folder: Path, family: Family, ids: dict[str, int], max_length: int) -> None:
    """A tokenizer that knows every byte, merges nothing, and has all tokens of the family."""
    import transformers
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel

    special = list(family.tokens[: family.special_tokens])
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = getattr(transformers, family.tokenizer_class)(
        vocab=vocabulary | ids,
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=max_length,
    )
    ordinary = family.tokens[family.special_tokens :]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    tokenizer.save_pretrained(folder)


def _write_processors(folder: Path, family: Family, vision: dict[str, Any]) -> None:
    common = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": vision["spatial_merge_size"],
        "patch_size": vision["patch_size"],
        "processor_class": family.processor_class,
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    # The released bounds: pixels of an image, pixels of all frames of a video.
    write_json(
        folder / "preprocessor_config.json",
        common
        | {
            "image_processor_type": family.image_processor_type,
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        },
    )
    write_json(
        folder / "video_preprocessor_config.json",
        common
        | {
            "do_sample_frames": True,
            "fps": 2,
            "max_frames": 768,
            "min_frames": 4,
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": family.video_processor_type,
        },
    )
