"""Names of CLIP's weights: those of OpenAI's release and open_clip, and those of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Names outside of the layers: open_clip → transformers.
TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # transformers spells it so
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"transformer\.resblocks\.(?P<number>\d+)\.(?P<part>.+)[._](?P<kind>weight|bias)")


def to_transformers(weights: Mapping[str, Tensor], outer: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames an encoder's weights from the layout of open_clip to that of transformers.

    Args:
        weights: by open_clip's names.
        outer: `TEXT` or `VISION`.

    Returns:
        The renamed weights, and the names that CLIP's encoder does not have.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, value in weights.items():
        if name in outer:
            renamed[outer[name]] = value
        elif (match := _LAYER.fullmatch(name)) and match["part"] in (*_BLOCK, "attn.in_proj"):
            layer = f"encoder.layers.{match['number']}"
            if match["part"] == "attn.in_proj":
                for projection, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{projection}_proj.{match['kind']}"] = part.contiguous()
            else:
                renamed[f"{layer}.{_BLOCK[match['part']]}.{match['kind']}"] = value
        else:
            unknown.append(name)
    return renamed, unknown


def to_open_clip(weights: Mapping[str, Tensor], outer: Mapping[str, str], layers: int) -> dict[str, Tensor]:
    """The inverse of `to_transformers`, for an encoder with `layers` layers."""
    renamed = {name: weights[theirs] for name, theirs in outer.items()}
    for number in range(layers):
        theirs, block = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.self_attn.{projection}_proj.{kind}"] for projection in "qkv"]
            renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            for name, part in _BLOCK.items():
                renamed[f"{block}.{name}.{kind}"] = weights[f"{theirs}.{part}.{kind}"]
    return renamed


def text_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a text tower by the names of `LotlipModel`.

    Args:
        weights: of the text tower only, by the names of open_clip's TextTransformer.

    Raises:
        ValueError: a weight belongs to another kind of text tower; the message lists all such weights.
    """
    encoder, others = to_transformers(weights, TEXT)
    renamed = {f"text.transformer.{name}": value for name, value in encoder.items()}
    unknown = []
    for name in others:
        if name == "text_projection":  # a matrix in CLIP, a linear layer in SigLIP
            renamed["text.proj.weight"] = weights[name].T.contiguous()
        elif name.startswith("text_projection."):
            renamed[f"text.proj.{name.removeprefix('text_projection.')}"] = weights[name]
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the text tower has weights that neither CLIP nor SigLIP has: {', '.join(sorted(unknown))}")
    return renamed
