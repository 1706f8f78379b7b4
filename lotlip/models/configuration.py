"""A saved model's configuration: all that is needed to build it, prepare its inputs and trace its origin."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class LotlipConfig(PretrainedConfig):
    """Configuration of `LotlipModel`.

    Args:
        text_config: the BERT-family encoder's; `vocab_size` includes the corner and register tokens.
        image_config: the image tower's `ImageTowerSpec`, as JSON.
        embed_dim: D, the width of the shared space, which is the image tower's width.
        context_length: maximum number of tokens in a text.
        corner_tokens: m (paper, section 3.2).
        corner_mask: whether [CLS] and the corner tokens are masked from one another (section 3.2).
        register_tokens: learned tokens that have neither a mask nor a loss of their own (Table 7).
        similarity: "cosine" of one feature per input, or FILIP's "late-interaction" (arXiv 2111.07783).
        logit_bias: whether the logits have a learned bias, as SigLIP's do (arXiv 2303.15343).
        min_temperature: smallest temperature of a model without logit bias; None: none. Models saved before this field
            existed have CLIP's 0.01.
        sentence_ends: how training split texts into sub-captions, as in `lotlip.data.text.split_sub_captions`. Models
            saved before this field existed use "released".
        provenance: origin of the weights (training configuration, data, scores), for the model card.
    """

    model_type = "lotlip"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers looks for a plain dict)

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        image_config: dict[str, Any] | None = None,
        embed_dim: int = 768,
        context_length: int = 128,
        corner_tokens: int = 2,
        corner_mask: bool = True,
        register_tokens: int = 0,
        similarity: str = "cosine",
        logit_bias: bool = False,
        min_temperature: float | None = 0.01,
        sentence_ends: str = "released",
        provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = {"vocab_size": 30522 + corner_tokens + register_tokens}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**{"model_type": "bert", **text_config})
        self.text_config: PretrainedConfig = text_config
        self.image_config = image_config or {"model": "vit_base_patch16_224", "image_size": 224}
        self.embed_dim = embed_dim
        self.context_length = context_length
        self.corner_tokens = corner_tokens
        self.corner_mask = corner_mask
        self.register_tokens = register_tokens
        self.similarity = similarity
        self.logit_bias = logit_bias
        self.min_temperature = min_temperature
        self.sentence_ends = sentence_ends
        self.provenance = provenance
        super().__init__(**kwargs)


AutoConfig.register(LotlipConfig.model_type, LotlipConfig, exist_ok=True)
