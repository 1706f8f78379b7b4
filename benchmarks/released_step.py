"""The training step of the method's release, rewritten from its description, for `benchmarks.train_step`."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel

from lotlip.models.lotlip import LotlipModel

CONTEXT_LENGTH = 128


class ReleasedStep(nn.Module):
    """Runs the image tower at every step, pads texts to the context length, and has one logit matrix per kind of text.

    Args:
        model: model whose text tower and temperature are copied.
        vision: timm's name of the frozen image tower, which gets random weights.
    """

    def __init__(self, model: LotlipModel, vision: str) -> None:
        super().__init__()
        self.corner_tokens = model.config.corner_tokens
        self.visual = timm.create_model(vision, num_classes=0, global_pool="token").eval().requires_grad_(False)
        self.encoder = AutoModel.from_config(
            model.config.text_config, attn_implementation="eager", trust_remote_code=False
        )
        self.encoder.load_state_dict(model.text.transformer.state_dict())
        self.proj = nn.Linear(model.text.proj.in_features, model.config.embed_dim, bias=False)
        self.proj.load_state_dict(model.text.proj.state_dict())
        self.logit_scale = nn.Parameter(model.logit_scale.detach().clone())

    def train(self, mode: bool = True) -> ReleasedStep:
        """Sets the training mode of all modules except the frozen tower."""
        super().train(mode)
        self.visual.eval()
        return self

    def optimizer(self, **settings: Any) -> torch.optim.Optimizer:
        """Returns AdamW in the variant that updates parameters one after another."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, foreach=False, fused=False, **settings)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Returns the frozen tower's features [B, D] of pixels [B, 3, S, S]."""
        with torch.no_grad():
            return self.visual(pixels)

    def forward(self, pixels: Tensor, raw: list[list[int]], long: list[list[int]]) -> Tensor:
        """Returns the training loss, a scalar, for pixels [B, 3, S, S] and the token ids of their texts."""
        images = normalize(self.image_features(pixels), dim=-1)
        texts = [self._text_features(raw)[:, 0], *self._text_features(long).unbind(dim=1)]
        target = torch.arange(len(images))
        terms = []
        for features in texts:
            logits = self.logit_scale.exp() * images @ features.T
            terms.append((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
        return torch.stack(terms).mean()

    def _text_features(self, texts: list[list[int]]) -> Tensor:
        """Returns the normalised features of [CLS] and each corner token, [B, 1 + m, D]."""
        padding = self.encoder.config.pad_token_id
        ids = torch.tensor([text + [padding] * (CONTEXT_LENGTH - len(text)) for text in texts])
        hidden = self.encoder(input_ids=ids, attention_mask=self._mask(texts)).last_hidden_state
        pooled = torch.tanh(self.encoder.pooler.dense(hidden[:, : 1 + self.corner_tokens]))
        return normalize(self.proj(pooled), dim=-1)

    def _mask(self, texts: list[list[int]]) -> Tensor:
        """Returns the additive attention mask [B, 1, L, L], built one text at a time."""
        masks = []
        for text in texts:
            visible = torch.zeros(CONTEXT_LENGTH, CONTEXT_LENGTH, dtype=torch.bool)
            visible[:, : len(text)] = True
            for corner in range(1, 1 + self.corner_tokens):
                visible[:, corner] = False
                visible[corner, 0] = False
                visible[corner, corner] = True
            masks.append(torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min))
        return torch.stack(masks)[:, None]
