"""Tiny multimodal language models with random weights, as folders that transformers reads."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lotlip.data.records import ImageRecord

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = (
    "a the red green blue old small large round house tree dog cat man woman street lake sky stands sits runs near "
    "under above behind and of with is are two three light dark describe following image in detail USER ASSISTANT : ."
)
IDS = {word: number for number, word in enumerate([*SPECIAL, *WORDS.split(), "<image>"])}
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SIDE, PATCH = 28, 14


def save_llava(folder: Path, vision: Mapping[str, int] = {}, text: Mapping[str, int] = {}) -> Path:
    """A LLaVA-1.5: CLIP, a projector and Llama. It is tiny, except for the given sizes of CLIP and Llama."""
    clip, llama = _clip(**vision), _llama(**text)
    config = LlavaConfig(vision_config=clip, text_config=llama, image_token_index=IDS["<image>"])
    model = _random(LlavaForConditionalGeneration, config)
    side = clip.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images, _tokenizer(image_token="<image>"), clip.patch_size, "default", CHAT, num_additional_image_tokens=1
    )
    return _save(folder, model, processor)


def save_llava_next(folder: Path) -> Path:
    """A tiny LLaVA-1.6, whose number of image tokens depends on the shape of the image."""
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
    config = LlavaNextConfig(
        vision_config=_clip(), text_config=_llama(), image_token_index=IDS["<image>"], image_grid_pinpoints=grid
    )
    model = _random(LlavaNextForConditionalGeneration, config)
    size = {"shortest_edge": SIDE}
    images = LlavaNextImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(
        images, _tokenizer(image_token="<image>"), PATCH, "default", CHAT, num_additional_image_tokens=1
    )
    return _save(folder, model, processor)


def save_instructblip(folder: Path) -> Path:
    """A tiny InstructBLIP-Vicuna: a ViT, a Q-Former that reads the question, and Llama, without a chat template."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InstructBlipConfig(
        vision_config={**vision, "image_size": SIDE, "patch_size": PATCH},
        qformer_config={**vision, "vocab_size": len(IDS), "cross_attention_frequency": 1},
        text_config=_llama().to_dict(),
        num_query_tokens=4,
        image_token_index=IDS["<image>"],
    )
    model = _random(InstructBlipForConditionalGeneration, config)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _save(folder, model, InstructBlipProcessor(images, _tokenizer(), _tokenizer(), num_query_tokens=4))


def save_llama(folder: Path, chat_template: str | None = None) -> Path:
    """A tiny language model without vision."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = chat_template
    return _save(folder, _random(LlamaForCausalLM, _llama()), tokenizer)


def save_t5(folder: Path) -> Path:
    """A tiny text-to-text model."""
    config = T5Config(
        vocab_size=len(IDS),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=IDS["<pad>"],
        eos_token_id=IDS["</s>"],
        decoder_start_token_id=IDS["<pad>"],
    )
    return _save(folder, _random(T5ForConditionalGeneration, config), _tokenizer())


def image_record(number: int, width: int = 40, height: int = 30) -> ImageRecord:
    """An image of coloured blocks that depend on the number."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(file, "png")
    data = file.getvalue()
    return ImageRecord(f"k{number}", data, "png", "a picture", width, height, hashlib.sha256(data).hexdigest())


def _clip(**sizes: int) -> CLIPVisionConfig:
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 32,
    }
    return CLIPVisionConfig(**{**tiny, **sizes})


def _llama(**sizes: int) -> LlamaConfig:
    tiny = {
        "vocab_size": len(IDS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": IDS["<s>"],
        "eos_token_id": IDS["</s>"],
        "pad_token_id": IDS["<pad>"],
    }
    return LlamaConfig(**{**tiny, **sizes})


def _tokenizer(**extra: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a list of words without spaces; texts begin with <s>. `extra` names more special tokens."""
    tokenizer = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(" ", "removed")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", IDS["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=extra,
    )


def _random(kind: Any, config: Any) -> Any:
    """A model whose random weights are large enough for captions to depend on the image."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    return model


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
