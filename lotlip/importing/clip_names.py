"""Weights of CLIP text towers in the layout of OpenAI's release and open_clip, renamed to that of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"transformer\.resblocks\.(?P<number>\d+)\.(?P<part>.+)[._](?P<kind>weight|bias)")


def text_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a text tower by the names of `LotlipModel`.

    Args:
        weights: of the text tower only, by the names of open_clip's TextTransformer.

    Raises:
        ValueError: a weight belongs to another kind of text tower; the message lists all such weights.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, value in weights.items():
        if name in _OUTER:
            renamed[f"text.transformer.{_OUTER[name]}"] = value
        elif name == "text_projection":
            renamed["text.proj.weight"] = value.T.contiguous()
        elif name.startswith("text_projection."):
            renamed[f"text.proj.{name.removeprefix('text_projection.')}"] = value
        elif (match := _LAYER.fullmatch(name)) and match["part"] in (*_BLOCK, "attn.in_proj"):
            layer = f"text.transformer.encoder.layers.{match['number']}"
            if match["part"] == "attn.in_proj":
                for projection, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{projection}_proj.{match['kind']}"] = part.contiguous()
            else:
                renamed[f"{layer}.{_BLOCK[match['part']]}.{match['kind']}"] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the text tower has weights that neither CLIP nor SigLIP has: {', '.join(sorted(unknown))}")
    return renamed
