"""FLAIR's text-conditioned image features (arXiv 2412.03561): a text's feature is the query that pools the patches.

The pooled feature of an image and each of its own texts is contrasted with that of the image and one random text of
each other image. FLAIR's loss is the mean of this term and of the multi-positive sigmoid loss of the image's own
feature (`lotlip.objectives.sigmoid`). The texts are those of the global batch, whatever the number of processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import embedding, layer_norm, linear, scaled_dot_product_attention, softplus
from torch.utils.checkpoint import checkpoint

from lotlip.objectives.processes import first_row, gather

# Bound of the norm of a pooled feature.
SMALLEST = 1e-12


class ConditionedPooling(nn.Module):
    """Projection of patches and multi-head attention with LayerNorm on queries, keys and values.

    The loss pools pairs of the whole batch, after the towers have run. So the module gives out its weights, in one
    tensor, through which gradients flow back to it.

    Args:
        token_width: C, size of a patch.
        width: D, size of the features that are compared.
        heads: attention heads; they divide D.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, token_width: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"loss.conditioned.heads is {heads}, which does not divide the image tower's features of width {width}"
            )
        self.project = nn.Linear(token_width, width, bias=False)
        self.inputs, self.output = nn.Parameter(torch.empty(3 * width, width)), nn.Parameter(torch.empty(width, width))
        for weight in (*self.inputs.data.chunk(3), self.output):
            nn.init.xavier_uniform_(weight)
        self.input_bias, self.output_bias = nn.Parameter(torch.zeros(3 * width)), nn.Parameter(torch.zeros(width))
        norm = torch.stack([torch.ones(width), torch.zeros(width)])  # weight and bias of a LayerNorm
        self.norm_query, self.norm_key, self.norm_value = (nn.Parameter(norm.clone()) for _ in range(3))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Returns projected patches, [B, P, D], of patches [B, P, C], and the weights of the pooling, [4 D + 10, D]."""
        return self.project(patches), self.weights()

    def weights(self) -> Tensor:
        """Returns the weights of the pooling, [4 D + 10, D]."""
        norms = self.norm_query, self.norm_key, self.norm_value
        return torch.cat([self.inputs, self.output, self.input_bias.view(3, -1), self.output_bias[None], *norms])


class _Weights(NamedTuple):
    """The pooling's weights: of the attention's inputs [3 D, D] and output [D, D], their biases, and of the norms."""

    inputs: Tensor
    output: Tensor
    input_bias: Tensor
    output_bias: Tensor
    norm_query: Tensor
    norm_key: Tensor
    norm_value: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Weights:
        """Takes apart what `ConditionedPooling` gives."""
        width = rows.shape[1]
        return cls(*rows.split([3 * width, width, 3, 1, 2, 2, 2]))

    def projected(self, number: int, values: Tensor) -> Tensor:
        """Queries (0), keys (1) or values (2): normalised, then projected."""
        norm = (self.norm_query, self.norm_key, self.norm_value)[number]
        width = values.shape[-1]
        rows = slice(number * width, (number + 1) * width)
        return linear(layer_norm(values, (width,), norm[0], norm[1]), self.inputs[rows], self.input_bias[number])


def queries(texts: Tensor, pooling: Tensor) -> Tensor:
    """Queries of normalised texts [..., D].

    They are scaled to a variance of about 1. LayerNorm makes the scale irrelevant, except to its constant.
    """
    return _Weights.of(pooling).projected(0, texts * texts.shape[-1] ** 0.5)


def _pooled(tokens: Tensor, query: Tensor, pooling: Tensor, heads: int) -> Tensor:
    """Image features, one for each query, before normalisation.

    Args:
        tokens: projected patches, [B, P, D].
        query: of texts, from `queries`, [B, S, D].
        pooling: weights, as `ConditionedPooling` gives them.
        heads: attention heads.

    Returns:
        [B, S, D]
    """
    weights = _Weights.of(pooling)

    def split(values: Tensor) -> Tensor:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, …, D / heads]

    nothing = tokens.new_zeros(len(tokens), 1, tokens.shape[2])  # a text that no patch fits attends to it
    key, value = (torch.cat([weights.projected(number, tokens), nothing], dim=1) for number in (1, 2))
    attended = scaled_dot_product_attention(split(query), split(key), split(value))
    return linear(attended.transpose(1, 2).flatten(2), weights.output, weights.output_bias[0])


def conditioned_loss(
    tokens: Tensor,
    texts: Tensor,
    partners: Tensor,
    pooling: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    heads: int,
    first: int,
    values_at_once: int,
) -> Tensor:
    """Sigmoid loss of pooled features: summed over images and texts, divided by the number of an image's texts.

    Args:
        tokens: projected patches of B images, [B, P, D].
        texts: normalised, those of all T images, [T, N, D].
        partners: for each of the B images the S texts that it is compared with, own and others', by their position
            among the T · N, [B, S].
        pooling: weights, as `ConditionedPooling` gives them.
        scale: inverse temperature, [1].
        bias: added to every logit, [1].
        heads: attention heads.
        first: position of the first of the B images among the T.
        values_at_once: elements of pooled features at a time (at least one image's); changes memory, not the result.

    Returns:
        [1]
    """
    flat = texts.flatten(0, 1)
    query = queries(flat, pooling)
    own = torch.arange(first, first + len(tokens), device=texts.device)[:, None] == partners // texts.shape[1]
    size = max(1, values_at_once // (partners.shape[1] * flat.shape[1]))

    def block(tokens: Tensor, query: Tensor, flat: Tensor, partners: Tensor, own: Tensor) -> Tensor:
        pooled = _pooled(tokens, embedding(partners, query), pooling, heads)
        # the cosine of normalised features, with fewer passes over the pooled ones
        products = (pooled * embedding(partners, flat)).sum(-1)
        logits = scale * products / vector_norm(pooled, dim=-1).clamp(min=SMALLEST) + bias
        return (softplus(logits) - logits * own).sum()

    costs = []
    for part in zip(tokens.split(size), partners.split(size), own.split(size), strict=True):
        arguments = part[0], query, flat, *part[1:]
        if size < len(tokens):
            costs.append(checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            costs.append(block(*arguments))
    return torch.stack(costs).sum()[None] / partners.shape[1]


def choose_partners(draws: Tensor, first: int, number: int, texts: int) -> Tensor:
    """Chooses the texts that images are compared with: all of an image's own, and one of each other image.

    Each text of another image is equally likely. The choice for two images depends on their draws only, so it is the
    same for any order of the batch and any number of processes.

    Args:
        draws: two random numbers of each of all T images, [T, 2].
        first: position of the first of the B images among the T.
        number: B.
        texts: N, number of each image's texts.

    Returns:
        positions among the T · N texts, [B, N + T − 1].
    """
    everyone = torch.arange(len(draws), device=draws.device)
    images = everyone[first : first + number, None]
    chosen = everyone * texts + (draws[first : first + number, :1] + draws[:, 1]) % texts  # [B, T]
    others = chosen[images != everyone].view(number, -1)
    return torch.cat([images * texts + torch.arange(texts, device=draws.device), others], dim=1)


def batch_loss(
    tokens: Tensor,
    texts: Tensor,
    pooling: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    draws: Tensor,
    heads: int,
    values_at_once: int,
) -> Tensor:
    """`conditioned_loss` of the global batch, from this process's patches [B, P, D], texts [B, N, D], draws [B, 2]."""
    everything = gather(texts)
    first = first_row(len(tokens))
    partners = choose_partners(gather(draws), first, len(tokens), texts.shape[1])
    loss = conditioned_loss(
        tokens, everything, partners, pooling, scale, bias, heads=heads, first=first, values_at_once=values_at_once
    )
    return gather(loss).sum()


# --- retrieval ------------------------------------------------------------------------------------------------------


class TextQueries(NamedTuple):
    """Texts in the form in which `conditioned_scores` reads them, so that this is computed once for all images.

    Attributes:
        features: normalised, [D, Q].
        queries: scaled by the square root of a head's width, [heads, D / heads, Q].
    """

    features: Tensor
    queries: Tensor

    @classmethod
    def of(cls, texts: Tensor, pooling: Tensor, heads: int) -> TextQueries:
        """Prepares normalised texts, [Q, D], for a pooling with these weights and heads."""
        scaled = queries(texts, pooling) * (texts.shape[1] // heads) ** -0.5
        return cls(texts.T.contiguous(), scaled.T.reshape(heads, -1, len(texts)))

    def part(self, which: slice | Tensor) -> TextQueries:
        """Selects some of the texts."""
        return TextQueries(self.features[:, which].contiguous(), self.queries[:, :, which].contiguous())


def conditioned_scores(tokens: Tensor, texts: TextQueries, pooling: Tensor, values_at_once: int = 2**17) -> Tensor:
    """Cosines of all images and texts, each image pooled for each text, [I, Q].

    With P patches, a pair takes about 2 P D + D² multiply-adds. Patches are projected once for all texts.

    Args:
        tokens: projected patches, [I, P, D].
        texts: the texts.
        pooling: weights, as `ConditionedPooling` gives them.
        values_at_once: elements of an image's attention or pooled features at a time (at least one text's); changes
            time and memory, not the result. The default fits the cache of a CPU core.
    """
    weights = _Weights.of(pooling)
    heads, _, number = texts.queries.shape
    nothing = tokens.new_zeros(len(tokens), 1, tokens.shape[2])  # as in `_pooled`
    key, value = (
        torch.cat([weights.projected(which, tokens), nothing], dim=1).unflatten(-1, (heads, -1)) for which in (1, 2)
    )  # [I, P + 1, heads, D / heads]
    keys, values = key.transpose(1, 2).contiguous(), value.permute(0, 2, 3, 1).contiguous()
    size = max(1, values_at_once // max(tokens.shape[2], heads * keys.shape[2]))
    scores = tokens.new_empty(len(tokens), number)
    # The texts come last in every product, so that softmax and sums over heads run over contiguous memory.
    for start in range(0, number, size):
        columns = slice(start, start + size)
        part = texts.part(columns)
        for image in range(len(tokens)):
            attention = torch.bmm(keys[image], part.queries).softmax(dim=1)  # [heads, P + 1, size]
            attended = torch.bmm(values[image], attention).flatten(0, 1)  # [D, size]
            pooled = torch.addmm(weights.output_bias[0][:, None], weights.output, attended)
            norms = pooled.square().sum(dim=0).sqrt().clamp(min=SMALLEST)
            scores[image, columns] = (pooled * part.features).sum(dim=0) / norms
    return scores
