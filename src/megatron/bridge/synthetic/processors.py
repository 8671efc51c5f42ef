"""What stands beside the weights: tokenizer, processors, chat template, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.bridge.models.small_model import SmallModel


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as transformers formats it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_side_files(
    folder: Path, family: SmallModel, config: dict[str, Any], first_token_id: int
) -> None:
    """Write everything but the weights.

    Args:
        folder: the folder of the model.
        family: the declaration of its family.
        config: what becomes config.json, which the other files fit to.
        first_token_id: id of the first of the family's tokens.
    """
    write_json(folder / "config.json", config)
    ids = {token: number for number, token in enumerate(family.tokens, first_token_id)}
    length = family.language_of(config).get("max_position_embeddings")
    _write_tokenizer(folder, family, ids, length)
    for name, value in family.processors(config).items():
        write_json(folder / name, value)
    if family.chat_template:
        (folder / "chat_template.jinja").write_text(family.chat_template, encoding="utf-8")
    generation = dict(family.generation)
    if family.end_tokens:
        generation["eos_token_id"] = [ids[token] for token in family.end_tokens]
    if family.pad_token is not None:
        generation["bos_token_id"] = generation["pad_token_id"] = ids[family.pad_token]
    if "transformers_version" in config:
        generation["transformers_version"] = config["transformers_version"]
    write_json(folder / "generation_config.json", generation)


def _write_tokenizer(
    folder: Path, family: SmallModel, ids: dict[str, int], length: int | None
) -> None:
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
        eos_token=next(iter(family.end_tokens), None),
        pad_token=family.pad_token,
        additional_special_tokens=special,
        **({} if length is None else {"model_max_length": length}),
    )
    ordinary = family.tokens[family.special_tokens :]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    tokenizer.save_pretrained(folder)
