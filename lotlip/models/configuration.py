"""What a saved model says of itself: enough to build it, to prepare its input and to tell where it comes from."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class LotlipConfig(PretrainedConfig):
    """Configuration of `LotlipModel`.

    Args:
        text_config: of the BERT-family encoder; its `vocab_size` counts the corner and register tokens.
        image_config: the image tower's `ImageTowerSpec`, as JSON.
        embed_dim: D, the width of the shared space: the image tower's.
        context_length: most tokens in a text.
        corner_tokens: m (paper, section 3.2).
        corner_mask: whether [CLS] and the corner tokens are kept apart (section 3.2).
        register_tokens: learned tokens without a mask and a loss of their own (Table 7).
        similarity: "cosine" of one feature each, or FILIP's "late-interaction" (arXiv 2111.07783).
        logit_bias: whether the logits have a learned bias, as SigLIP's do (arXiv 2303.15343).
        sentence_ends: where training split texts into sub-captions, as in `lotlip.data.text.split_sub_captions`; models
            from before this field split as released.
        provenance: how the weights came to be (training configuration, data, scores), for the model card.
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
        sentence_ends: str = "released",
        provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = {"vocab_size": 30522 + corner_tokens + register_tokens}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**{"model_type": "bert", **text_config})
        self.text_config: PretrainedConfig = text_config
        self.image_config = image_config or {"timm_model": "vit_base_patch16_224", "image_size": 224}
        self.embed_dim = embed_dim
        self.context_length = context_length
        self.corner_tokens = corner_tokens
        self.corner_mask = corner_mask
        self.register_tokens = register_tokens
        self.similarity = similarity
        self.logit_bias = logit_bias
        self.sentence_ends = sentence_ends
        self.provenance = provenance
        super().__init__(**kwargs)


AutoConfig.register(LotlipConfig.model_type, LotlipConfig, exist_ok=True)
