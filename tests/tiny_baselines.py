"""Tiny models of other projects with random weights, saved in their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZE = 24
WORDS = ("a", "an", "red", "green", "blue", "white", "dog", "house", "tree", "and", "on", "the", "is", "there")
CLIP_LENGTH, SIGLIP_LENGTH, OPEN_CLIP_LENGTH = 20, 12, 16
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# With initial weights, features of different texts would be almost equal.
SPREAD = 0.2


def spread(model: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=SPREAD)
    return model.eval()


def save_clip(folder: Path) -> Path:
    """A CLIP of transformers with letters as tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-%:;()"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    tokenizer.model_max_length = CLIP_LENGTH
    text = {
        **TOWER,
        "vocab_size": len(pieces),
        "max_position_embeddings": CLIP_LENGTH,
        "bos_token_id": len(pieces) - 2,
        "eos_token_id": len(pieces) - 1,
        "pad_token_id": len(pieces) - 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**TOWER, "image_size": SIZE, "patch_size": 8}, projection_dim=16
    )
    spread(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A SigLIP of transformers with words as tokens. Its tokenizer returns an attention mask, which it must not use."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    pieces = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pieces.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SIGLIP_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    text = {
        **TOWER,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": SIGLIP_LENGTH,
        "projection_size": 32,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    config = SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": SIZE, "patch_size": 8})
    spread(SiglipModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": OPEN_CLIP_LENGTH, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def register_open_clip(folder: Path, name: str = "tiny") -> str:
    """Registers an architecture with open_clip, and returns its name."""
    import open_clip

    (folder / f"{name}.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def save_open_clip(folder: Path, name: str) -> Path:
    """A model of open_clip with its own tokenizer, in the layout of Hugging Face's hub."""
    import open_clip
    from safetensors.torch import save_model

    folder.mkdir()
    model = spread(open_clip.create_model(name))
    save_model(model, str(folder / "open_clip_model.safetensors"))
    about = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder
