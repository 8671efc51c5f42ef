"""Multi-token prediction of Qwen3.5 around Hugging Face's model, which does not have it.

logits of the token after the next = lm_head(norm(layer(fc(cat(norm(embedding of the next token),
norm(hidden state)))))), where the hidden state is the one that lm_head itself gets, and the
embedding of an image or video token is its feature. The layer is Hugging Face's decoder layer.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oracle import tiny


class Predictor(nn.Module):
    """Parameters as in the files, without their prefix "mtp."."""

    def __init__(self, hf: Any, seed: int = 1) -> None:
        super().__init__()
        text, config = hf.model.language_model, hf.config.text_config
        size, norm = config.hidden_size, type(text.norm)
        self.like = config.layer_types.index("full_attention")
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding = norm(size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([type(text.layers[0])(config, self.like)])
        self.norm = norm(size, eps=config.rms_norm_eps)
        tiny.randomize(self, seed)

    def forward(self, hf: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [b, s, v] of the next token, hidden states [b, s, h] that predict the one after.

        Those of the last token of a sequence mean nothing.
        """
        seen: dict[str, Any] = {}
        text = hf.model.language_model
        hooks = [
            text.register_forward_pre_hook(
                lambda _, args, given: seen.update(given), with_kwargs=True
            ),
            text.layers[self.like].register_forward_pre_hook(
                lambda _, args, given: seen.update(layer=given), with_kwargs=True
            ),
            text.norm.register_forward_hook(lambda _, args, output: seen.update(hidden=output)),
        ]
        logits = hf(**inputs, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        following = seen["inputs_embeds"].roll(-1, dims=1)
        both = (self.pre_fc_norm_embedding(following), self.pre_fc_norm_hidden(seen["hidden"]))
        [layer] = self.layers
        given = {name: seen["layer"][name] for name in ("position_embeddings", "attention_mask")}
        return logits, self.norm(layer(self.fc(torch.cat(both, dim=-1)), **given))

    def add_to(self, folder: Path) -> None:
        """Put the weights into the file of a saved model."""
        file = folder / "model.safetensors"
        own = {f"mtp.{name}": weight for name, weight in self.state_dict().items()}
        save_file(load_file(file) | own, file, metadata={"format": "pt"})
