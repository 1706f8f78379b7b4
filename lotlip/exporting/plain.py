"""What CLIP-like formats have in common: text towers without corner tokens."""

from __future__ import annotations

from torch import Tensor

from lotlip.models.lotlip import LotlipModel
from lotlip.models.text.appended import AppendedTower


def check_similarity(model: LotlipModel) -> None:
    """Raises ValueError if a model compares tokens: an export has one feature for each text and image."""
    if model.config.similarity != "cosine":
        raise ValueError(
            f"the similarity of this model is {model.config.similarity}, which compares tokens, but an exported model "
            "has one feature for each text and image; load the model itself with AutoModel after `import lotlip`"
        )


def plain_text_tower(model: LotlipModel, library: str) -> AppendedTower:
    """Returns a model's text tower if its summary feature does not depend on corner and register tokens.

    Raises:
        ValueError: it does, or the tower is neither CLIP's nor SigLIP's.
    """
    text, remedy = model.text, "use --to onnx, or load the model itself with AutoModel after `import lotlip`"
    if not isinstance(text, AppendedTower):
        raise ValueError(
            f"{library} has no class for this model: its text tower is of type {model.config.text_config.model_type}, "
            f"with corner tokens and a projection of its own; {remedy}"
        )
    if text.register_tokens:
        raise ValueError(
            f"the text's feature depends on the model's {text.register_tokens} register tokens, which {library} does "
            f"not have; {remedy}"
        )
    if text.corner_tokens and not text.corner_mask and not text.causal:
        raise ValueError(
            "the model was trained without the corner mask, so the text's feature depends on its "
            f"{text.corner_tokens} corner tokens, which {library} does not have; {remedy}"
        )
    return text


def encoder_weights(text: AppendedTower) -> dict[str, Tensor]:
    """Returns the encoder's weights by the names of transformers, without the embeddings of corner tokens."""
    weights = text.transformer.state_dict()
    name = "embeddings.token_embedding.weight"
    weights[name] = weights[name][: vocabulary_size(text)].clone()
    return weights


def vocabulary_size(text: AppendedTower) -> int:
    """Number of rows of the token embeddings without corner tokens, which are the last rows."""
    return text.transformer.config.vocab_size - text.corner_tokens


def logit_scale(model: LotlipModel) -> Tensor:
    """Logarithm of the scale that multiplies similarities, [1], within the limit that the model applies."""
    return model.log_scale.detach()
