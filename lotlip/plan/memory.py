"""Memory of a training step per GPU, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import VisionTransformer

from lotlip.core.compute import TrainingCompute
from lotlip.models.text.bert import BertTower
from lotlip.models.text.text_tower import TextTower
from lotlip.models.vision.image_tower import ImageTower
from lotlip.objectives.contrastive import LOGITS_AT_ONCE
from lotlip.plan.texts import TextLengths
from lotlip.plan.towers import Towers
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import deepspeed_config

FP32 = 4
# Memory of CUDA, cuBLAS and NCCL before the first tensor.
CONTEXT_BYTES = 1.5e9
# Number of logit matrices in memory: similarities and logits kept for the backward pass; or, for a block at a time, its
# matrices with their gradients.
LOGITS_KEPT, LOGITS_PER_BLOCK = 2, 5


def memory(config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths) -> dict[str, float]:
    """Estimates the bytes per GPU by component, at the end of a forward pass and during gradient exchange."""
    return {
        **state_bytes(config, compute, towers.trained),
        **activation_bytes(config, compute, towers, texts),
        "features and logits": loss_bytes(
            config, compute, texts, towers.model.config.embed_dim, compared_patches(config, towers)
        ),
        "CUDA context": CONTEXT_BYTES,
    }


def state_bytes(config: PretrainConfig, compute: TrainingCompute, trained: int) -> dict[str, float]:
    """Estimates weights, gradients and optimizer states per process (ZeRO, arXiv 1910.02054, section 3).

    ZeRO 1 and 2 partition the optimizer's fp32 weights and AdamW's two moments over the processes. ZeRO 3 also
    partitions the weights and gathers them when needed, at most all at once. A process keeps its partition of the
    reduced gradients. With accumulation, ZeRO 1 keeps all gradients until the reduction.

    Args:
        config: training settings of the ablation.
        compute: compute settings.
        trained: number of trained parameters.
    """
    zero = deepspeed_config(config, compute)["zero_optimization"]
    stage, processes = zero["stage"], compute.processes
    size = _size(config)
    split = processes if stage else 1
    full_gradients = stage == 0 or (stage == 1 and compute.gradient_accumulation_steps > 1)
    bucket = zero["reduce_bucket_size"]
    if stage == 0:
        bucket = min(bucket, trained) if processes > 1 else 0
    return {
        "weights": size * trained / (processes if stage == 3 else 1),
        "gathered weights": float(size * trained) if stage == 3 and processes > 1 else 0.0,
        "gradients": size * trained / (1 if full_gradients else split),
        "fp32 weights": FP32 * trained / split if stage else 0.0,
        "AdamW's moments": 2 * FP32 * trained / split,
        "gradient reduction buffers": float(size * bucket),
    }


def activation_bytes(
    config: PretrainConfig, compute: TrainingCompute, towers: Towers, texts: TextLengths
) -> dict[str, float]:
    """Estimates the activations that autograd keeps for one micro-batch, and the images if a step reads them."""
    size, model = _size(config), towers.model
    batch = config.batch_size // (compute.processes * compute.gradient_accumulation_steps)
    encoder = model.text.transformer.config
    corners = config.text.corner_tokens
    late, packed = config.similarity == "late-interaction", model.text.packs
    # Packed short captions need only [CLS], which does not attend to masked corner tokens, so those are left out.
    dropped = corners if packed and config.text.corner_mask else 0
    kinds = [(texts.short if late else texts.short - dropped, 1)] + texts.per_image * [(texts.long, 1 + corners)]
    text = 0.0
    layers = encoder.num_hidden_layers if compute.activation_checkpointing else 0
    for length, outputs in kinds:
        last = outputs if packed and not late else None
        if type(model.text) is BertTower:
            kept = encoder_bytes(encoder, batch, length, size, masked=True, outputs=last)
        else:
            kept = batch * _other_text_bytes(model.text, round(length)) * size / FP32
        text += _checkpointed(kept, layers, batch * length * encoder.hidden_size * size)
        # Input and output of the pooler's tanh, features before and after normalisation.
        heads = length if late else outputs
        text += batch * heads * 2 * (encoder.hidden_size + model.config.embed_dim) * size
    parts = {"text activations": text, "images and image activations": 0.0}
    if config.from_pixels:
        image = _image_bytes(config, towers.image, batch)
        if not config.image_tower.frozen and compute.activation_checkpointing:
            number, tokens, width = blocks(towers.image)
            image = _checkpointed(image, number, batch * tokens * width * size)
        parts["images and image activations"] = image
    return parts


def _checkpointed(kept: float, layers: int, hidden: float) -> float:
    """Returns the bytes with activation checkpointing: the input of each layer, and all activations of one layer.

    Args:
        kept: bytes without checkpointing.
        layers: number of layers that are checkpointed; 0: checkpointing is off.
        hidden: bytes of a layer's input.
    """
    return min(kept, layers * hidden + kept / layers) if layers else kept


def blocks(tower: ImageTower) -> tuple[int, int, int]:
    """Returns an image tower's number of blocks, of tokens, and the width of a token; convolutional towers have 1."""
    size = tower.spec.image_size
    with torch.no_grad():
        hidden = tower.hidden_states(torch.zeros(1, 3, size, size, device="meta"))
    trunk: Any = getattr(tower.trunk, "trunk", tower.trunk)
    found = getattr(trunk, "blocks", None) or getattr(getattr(trunk, "transformer", None), "resblocks", None)
    number = len(found) if found is not None else getattr(getattr(trunk, "config", None), "num_hidden_layers", 1)
    return number, hidden.shape[1], hidden.shape[2]


def _image_bytes(config: PretrainConfig, tower: ImageTower, batch: int) -> float:
    if not isinstance(tower.trunk, VisionTransformer) or not hasattr(tower.trunk.blocks[0], "mlp"):
        return batch * _other_image_bytes(tower, trained=not config.image_tower.frozen)
    trunk: Any = tower.trunk
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    hidden = trunk.blocks[0].mlp.fc1.out_features
    pixels = batch * 3 * tower.spec.image_size**2 * FP32
    if config.image_tower.frozen:  # nothing is kept for a backward pass; the widest layer is the peak
        return pixels + batch * tokens * (tower.width + 2 * hidden) * FP32
    sizes = SimpleNamespace(
        hidden_size=tower.width,
        intermediate_size=hidden,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=trunk.blocks[0].attn.num_heads,
    )
    return pixels + encoder_bytes(sizes, batch, tokens, _size(config), masked=False)


def _other_image_bytes(tower: ImageTower, trained: bool) -> float:
    """Measures the bytes of one image in a tower of any kind, by a forward pass on the meta device.

    Trained towers keep what autograd saves; a frozen one needs the inputs and outputs of its widest layer.
    """
    widest = 0.0

    def measure(_module: Any, inputs: Any, output: Any) -> None:
        nonlocal widest
        tensors = [one for one in (*inputs, output) if isinstance(one, torch.Tensor)]
        widest = max(widest, sum(one.numel() * FP32 for one in tensors))

    size = tower.spec.image_size
    hooks = [module.register_forward_hook(measure) for module in tower.modules()]
    try:
        saved = _saved_bytes(tower, lambda: tower(torch.zeros(1, 3, size, size, device="meta", requires_grad=True)))
    finally:
        for hook in hooks:
            hook.remove()
    return saved if trained else 3 * size**2 * FP32 + widest  # what is saved includes the image


def _other_text_bytes(tower: TextTower, length: int) -> float:
    """Measures the fp32 bytes that autograd keeps of one text in a tower of any kind, on the meta device.

    The last layer counts in full, although a step computes only a part of it.
    """
    ids, lengths = torch.zeros(1, length, dtype=torch.int64, device="meta"), torch.full((1,), length, device="meta")
    return _saved_bytes(tower, lambda: tower.hidden_states(ids, lengths))


def _saved_bytes(module: torch.nn.Module, run: Callable[[], object]) -> float:
    """Measures what autograd keeps between forward and backward, without the module's weights."""
    saved = dict[int, float]()
    weights = {value.untyped_storage()._cdata for value in module.state_dict().values()}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = float(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        kept = run()  # storages must live until all are counted
    del kept
    return sum(saved.values())


def encoder_bytes(config: Any, texts: int, length: float, size: int, masked: bool, outputs: int | None = None) -> float:
    """Estimates the bytes that autograd keeps for a transformer encoder (BERT-like or ViT) with fused attention.

    Per token and layer there are 8 H + 2 I values: the inputs of both norms; the inputs of the four matrix products
    (one shared by query, key and value; the attention output; two of the feed-forward part, the second I wide); query,
    key and value; and the input of the activation. The statistics of the norms and the normaliser of attention are
    fp32. The mask of a layer has L² values per text. Embeddings and last hidden states add 2 H. Dropout keeps a byte
    per value that it may drop, H at the embeddings and 2 H per layer, as CUDA does; the dropout of attention is
    recomputed.

    Args:
        config: `hidden_size` H, `intermediate_size` I, layers, heads and dropout, as named by transformers.
        texts: number of texts or images.
        length: tokens per text, L.
        size: bytes per value.
        masked: whether attention has a mask for each pair of tokens.
        outputs: for packed texts, the number of tokens per text whose last hidden states are needed. The last layer
            computes keys and values of all tokens, and everything else of these only. In packed texts, the attention
            output exists twice, grouped by length and packed. None for padded texts, with the hidden states of all
            tokens.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)  # DistilBERT has another name for it
    layer = (8 * hidden + 2 * inner) * size + (4 + config.num_attention_heads) * FP32 + masked * length * size
    dropped = (1 + 2 * layers) * hidden if getattr(config, "hidden_dropout_prob", 0) else 0
    if outputs is None:
        return texts * length * (layers * layer + 2 * hidden * size + dropped)
    layer += hidden * size
    needed = min(outputs / length, 1)
    # of queries and of what follows them, with the last hidden states
    after = (7 * hidden + 2 * inner + masked * length) * size + (4 + config.num_attention_heads) * FP32
    copies = hidden * size  # of the inputs of the needed queries
    return texts * length * (layers * layer - (1 - needed) * after + needed * copies + 2 * hidden * size + dropped)


def compared_patches(config: PretrainConfig, towers: Towers) -> int:
    """Number of an image's patches that the loss pools, or compares with the tokens of texts."""
    return blocks(towers.image)[1] if config.loss.conditioned or config.similarity == "late-interaction" else 0


def loss_bytes(
    config: PretrainConfig, compute: TrainingCompute, texts: TextLengths, embed_dim: int, patches: int = 0
) -> float:
    """Estimates the features of a process, the gathered image features, their gradients, and the logits, in fp32.

    Late interaction has a feature for each patch and token, and keeps an int64 for each patch and each token of a pair
    of image and text: the position of its maximum.

    `patches` is that of `compared_patches`.
    """
    kinds = 1 + texts.per_image * (1 + config.text.corner_tokens)
    late = config.similarity == "late-interaction"
    own, shared = (patches + texts.tokens, patches) if late else (1 + patches + kinds, 1)  # of an image
    features = 2 * config.batch_size // compute.processes * own * embed_dim
    gathered = 2 * config.batch_size * shared * embed_dim if compute.processes > 1 else 0
    pairs = logits_per_process(config, compute, kinds)
    logits: float = min(LOGITS_KEPT * pairs, LOGITS_PER_BLOCK * LOGITS_AT_ONCE)
    if late:
        logits += 2 * min(pairs, LOGITS_AT_ONCE) * (patches + texts.tokens / kinds)
    return FP32 * (features + gathered + logits)


def logits_per_process(config: PretrainConfig, compute: TrainingCompute, kinds: int) -> int:
    """Number of logits per process: its texts of all kinds by all images."""
    return kinds * config.batch_size**2 // compute.processes


def _size(config: PretrainConfig) -> int:
    return 2 if config.precision == "bf16" else FP32
