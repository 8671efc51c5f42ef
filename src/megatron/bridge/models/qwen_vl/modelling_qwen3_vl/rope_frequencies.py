"""The rotary frequencies of the language model, of any rope type that transformers has."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

# Fields of a provider, by the key that says the same in Hugging Face's `rope_parameters`.
FIELD_OF_KEY = {
    "rope_theta": "rotary_base",
    "partial_rotary_factor": "rotary_percent",
    "mrope_section": "mrope_section",
}
DEFAULT, LONGROPE = "default", "longrope"
_STATIC = ("linear", "llama3", "proportional", "yarn")
_IMPLEMENTED = (DEFAULT, *_STATIC, LONGROPE)
# What transformers would take from max_position_embeddings, which in Megatron is another number.
_STATED = dict.fromkeys(("yarn", LONGROPE), ("original_max_position_embeddings", "factor"))
# What transformers may raise for values of any kind.
_REFUSALS = (
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class RotaryFrequencies:
    """Rotary frequencies: theta ** (-2j / rotated channels), scaled as the rope type has it.

    All types but the default are computed by transformers' own functions, anew whenever they are
    asked for: there is no buffer that a meta device could leave empty or a cast could round.

    Attributes:
        head_dim: channels of a head.
        rotary_percent: part of the head that is rotated.
        rotary_base: theta.
        parameters: `rope_type` ("default" where it is absent) and what belongs to the type, with
            the keys of transformers' `rope_parameters`.
    """

    head_dim: int
    rotary_percent: float
    rotary_base: float
    parameters: Mapping[str, Any]

    @property
    def rope_type(self) -> str:
        """The name that transformers has for the type."""
        return str(self.parameters.get("rope_type", DEFAULT))

    def inv_freq(self, position_ids: Tensor) -> Tensor:
        """The frequencies for these positions, [n], on their device, fp32.

        Only those of "longrope" depend on the positions: a prompt that is longer than those that
        the model was trained on has frequencies of its own.
        """
        device = position_ids.device
        if self.rope_type != LONGROPE:
            return self._computed(device)[0]
        trained = self.parameters["original_max_position_embeddings"]
        short, long = (self._computed(device, length)[0] for length in (None, trained + 1))
        return torch.where(position_ids.max() + 1 > trained, long, short)

    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by; 1 for most types."""
        return float(self._computed(torch.device("cpu"))[1])

    def rotated(self) -> int:
        """Channels of a head that are rotated."""
        return 2 * self._computed(torch.device("cpu"))[0].numel()

    def problems(self) -> list[str]:
        """What cannot be computed, one sentence each naming the key."""
        problems = [
            f"rope_parameters has {key!r} = {self.parameters[key]!r}: set {field} instead"
            for key, field in FIELD_OF_KEY.items()
            if key in self.parameters
        ]
        if problems:
            return problems
        if self.rope_type not in _IMPLEMENTED:
            reason = "implemented are " + ", ".join(map(repr, _IMPLEMENTED))
            if self.rope_type == "dynamic":
                reason = "its frequencies depend on the longest prompt so far; " + reason
            return [f"rope_parameters: rope_type is {self.rope_type!r}: {reason}"]
        problems = [
            f"rope_parameters has no {key}, or not a positive number: rope_type {self.rope_type!r} "
            f"needs it"
            for key in _STATED.get(self.rope_type, ())
            if not isinstance(value := self.parameters.get(key), int | float) or value <= 0
        ]
        if problems:
            return problems
        try:
            ends = [self.inv_freq(torch.tensor([end], device="cpu")) for end in (0, 1 << 60)]
            fits = all(bool(end.isfinite().all()) for end in ends)
            fits = fits and isfinite(self.attention_scaling())
        except _REFUSALS as error:
            lines = str(error).splitlines()
            found = lines[-1].strip() if lines else type(error).__name__
            return [f"rope_parameters is {dict(self.parameters)}: transformers refuses: {found}"]
        if not fits:
            return [f"rope_parameters is {dict(self.parameters)}: the frequencies are not finite"]
        if not 0 < (rotated := self.rotated()) <= self.head_dim:
            problems.append(
                f"rotary_percent is {self.rotary_percent}, which rotates {rotated} channels of a "
                f"head: expected at least 2 and at most the {self.head_dim} of the head"
            )
        return problems

    def _computed(self, device: torch.device, length: int | None = None) -> tuple[Tensor, float]:
        if self.rope_type == DEFAULT:
            rotated = int(self.head_dim * self.rotary_percent)
            exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device)
            return 1.0 / self.rotary_base ** (exponents / rotated), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        with device:  # a part of them is made on the device of the context, which may be meta
            return ROPE_INIT_FUNCTIONS[self.rope_type](self._config, device, seq_len=length)

    @cached_property
    def _config(self) -> Any:
        """What transformers' functions read: any config with a head size will do."""
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

        stated = dict(self.parameters)
        # Of this length transformers only asks whether it agrees with the parameters.
        length = int(stated.get("original_max_position_embeddings", 1) * stated.get("factor", 1))
        stated |= {
            "rope_theta": self.rotary_base,
            "partial_rotary_factor": self.rotary_percent,
        }
        return Qwen3VLTextConfig(
            head_dim=self.head_dim, max_position_embeddings=length, rope_parameters=stated
        )


def rope_parameters_of_type(
    parameters: Mapping[str, Any], *, max_position_embeddings: int
) -> dict[str, Any]:
    """A config's `rope_parameters` without what has provider fields of its own.

    What transformers would take from `max_position_embeddings` is written down: in Megatron the
    length of the sequences is set for each run.

    Args:
        parameters: as transformers has them after its standardization.
        max_position_embeddings: that of the same config.
    """
    stated = {key: value for key, value in parameters.items() if key not in FIELD_OF_KEY}
    rope_type = stated.get("rope_type")
    # Absent it is a mistake in yarn, null it is not.
    optional = rope_type == LONGROPE or (rope_type == "yarn" and "factor" in stated)
    if optional and stated.get("factor") is None:
        trained = stated.get("original_max_position_embeddings")
        if isinstance(trained, int | float) and trained > 0:
            stated["factor"] = max_position_embeddings / trained
    return stated
