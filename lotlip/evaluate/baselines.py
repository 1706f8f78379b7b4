"""Encoders for external models: CLIP, SigLIP and similar models of transformers, and all models of open_clip.

Each uses its own tokenizer, context length and preprocessing. Images are decoded as everywhere in this project (rotated
upright, converted to sRGB, on white), so that all models of a table see the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from lotlip.core.files import sha256_files
from lotlip.data.batches import in_batches
from lotlip.data.images import decode_rgb, without_ends
from lotlip.data.models import LOCAL, check_address
from lotlip.data.weights import check_finite, check_weights
from lotlip.evaluate.encoders import ACCEPTED, Runner, preprocessing

OPEN_CLIP_CONFIG = "open_clip_config.json"
_HUB = "hf-hub:"  # open_clip's prefix for a Hugging Face name
# The files of a model; code is never downloaded.
_PARTS = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Trained without an attention mask: padding is part of the text, and the feature is that of the last position.
_PADDING_IS_TEXT = ("siglip", "siglip2")


def from_hub(name: str) -> Path:
    """Downloads a model from Hugging Face, unless it is cached, and returns its folder.

    Raises:
        ValueError: there is no such model, or it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, name, ignore_patterns=["*/*"])
    try:
        folder = Path(fetch(allow_patterns=_PARTS))
        if not list(folder.glob("*.safetensors")):
            fetch(allow_patterns=["*.bin"])
    except (OSError, ValueError) as error:  # huggingface_hub's HTTP errors are OSErrors
        reason = shorten(str(error), 300, placeholder=" …")
        raise ValueError(
            f"there is no folder {name}, and no model of that name can be downloaded from Hugging Face ({reason}); "
            f"{ACCEPTED}"
        ) from error
    return folder


class TransformersEncoder:
    """A dual encoder of transformers: any model with get_image_features and get_text_features.

    Args:
        name: its name in the protocol.
        folder: a folder in Hugging Face layout.
        run: device, precision and batch size.

    Raises:
        ValueError: the model is of another kind, or the folder lacks weights, tokenizer or image processor.
    """

    def __init__(self, name: str, folder: Path, run: Runner) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        from lotlip.models.saving import without_progress_bars

        self._name = name
        self._run = run
        self._weights = _weights_files(folder)
        with _loading(name), without_progress_bars():
            kind = _dual_encoder(folder)
            # `folder` is local and complete, so nothing is downloaded
            check_weights(folder)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self._processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            model, info = AutoModel.from_pretrained(
                folder,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                weights_only=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"{name} lacks weights of a {kind}: {missing}")
        check_finite(model.named_parameters(), name)
        self._model = model.to(run.device).eval()
        text = model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", self._tokenizer.model_max_length)
        self._context_length = min(positions, self._tokenizer.model_max_length)

    def images(self, images: Iterable[bytes]) -> Tensor:
        """See `Encoder`."""
        encode = _pooled(self._model.get_image_features)
        return torch.cat(
            [
                self._run.features(encode, **{name: torch.cat([one[name] for one in batch]) for name in batch[0]})
                for batch in self._run.prepared(images, self._prepare)
            ]
        )

    def _prepare(self, image: bytes) -> dict[str, Tensor]:
        picture = decode_rgb(image)
        if getattr(self._processor, "do_center_crop", False):
            picture = without_ends(picture)
        return dict(self._processor(images=[picture], return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, None]:
        """See `Encoder`."""
        encode = _pooled(self._model.get_text_features)
        batches = in_batches(texts, self._run.batch_size)
        return torch.cat([self._run.features(encode, **self._tokens(batch)) for batch in batches]), None

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        encoding = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context_length, return_tensors="pt"
        )
        if self._model.config.model_type in _PADDING_IS_TEXT:
            return {"input_ids": encoding["input_ids"]}
        return dict(encoding)

    def protocol(self) -> dict[str, str | int]:
        """See `Encoder`."""
        vision = self._model.config.vision_config
        return {
            "model": self._name,
            "weights_sha256": sha256_files(self._weights),
            "kind": f"transformers, {self._model.config.model_type}",
            "context_length": self._context_length,
            "image_size": getattr(vision, "image_size", "each picture's own"),
            "preprocessing": f"{type(self._processor).__name__}: {_processor_words(self._processor)}",
            "text_preparation": f"{type(self._tokenizer).__name__}, cut at the context length, padded to it",
            "similarity": "cosine",
            **self._run.protocol("transformers", "tokenizers", "torchvision"),
        }


def _dual_encoder(folder: Path) -> str:
    """Returns the type of a folder's model, which must be a dual encoder."""
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model_class = MODEL_MAPPING.get(type(config), None)
    if not all(hasattr(model_class, f"get_{side}_features") for side in ("image", "text")):
        raise ValueError(f"a {config.model_type} is not a dual encoder of images and texts; {ACCEPTED}")
    return config.model_type


def _weights_files(folder: Path) -> list[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # in transformers' order of precedence
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder} has no weights: there is neither model*.safetensors nor pytorch_model*.bin")


def _pooled(encode: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda **inputs: encode(**inputs).pooler_output


def _processor_words(processor: Any) -> str:
    def size(of: Any) -> str:
        return " × ".join(f"{name.replace('_', ' ')} {value}" for name, value in dict(of).items() if value)

    def has(step: str) -> bool:
        return bool(getattr(processor, f"do_{step}", False))

    from PIL.Image import Resampling

    resize = f"to {size(processor.size)}, {Resampling(processor.resample).name.lower()}" if has("resize") else ""
    if not getattr(processor, "size", None):
        resize = f"to at most {processor.max_num_patches} patches" if has("resize") else ""
    crop = f"centre crop to {size(processor.crop_size)}" if has("center_crop") else ""
    mean, std = (processor.image_mean, processor.image_std) if has("normalize") else ((0, 0, 0), (1, 1, 1))
    return preprocessing(resize, crop, mean, std)


class OpenClipEncoder:
    """A model of open_clip.

    Args:
        name: its name in the protocol.
        address: NAME:TAG or NAME:FILE, where NAME is an architecture; `hf-hub:NAME` or `local-dir:FOLDER`.
        run: device, precision and batch size.

    Raises:
        ValueError: there is no such model, there are no such weights, or they cannot be loaded.
    """

    def __init__(self, name: str, address: str, run: Runner) -> None:
        import open_clip
        from transformers import AutoConfig

        self._name = name
        self._run = run
        has_weights = address.startswith((LOCAL, _HUB))
        architecture, _, weights = (address, "", "") if has_weights else address.partition(":")
        if not has_weights:
            check_address(architecture, weights)
        with _loading(name):
            text = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
            # A model's configuration could request running its tokenizer's code.
            no_code = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
            if text.get("hf_model_name"):  # open_clip would ask on the terminal whether to run a text tower's code
                AutoConfig.from_pretrained(text["hf_model_name"], trust_remote_code=False)
            model, self._transform = open_clip.create_model_from_pretrained(
                architecture, weights or None, device=run.device, weights_only=True
            )
            self._tokenizer = open_clip.get_tokenizer(architecture, **no_code)
        check_finite(model.named_parameters(), name)
        self._model = model.eval()
        self._preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)

    def images(self, images: Iterable[bytes]) -> Tensor:
        """See `Encoder`."""
        batches = self._run.prepared(images, self._prepare)
        return torch.cat([self._run.features(self._model.encode_image, torch.stack(batch)) for batch in batches])

    def _prepare(self, image: bytes) -> Tensor:
        picture = decode_rgb(image)
        return self._transform(without_ends(picture) if self._preprocess.resize_mode == "shortest" else picture)

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, None]:
        """See `Encoder`."""
        batches = in_batches(texts, self._run.batch_size)
        return torch.cat(
            [self._run.features(self._model.encode_text, self._tokenizer(batch)) for batch in batches]
        ), None

    def protocol(self) -> dict[str, str | int]:
        """See `Encoder`."""
        used = self._preprocess
        height, width = used.size if isinstance(used.size, (tuple, list)) else (used.size, used.size)
        size = f"{height} × {width}"
        # open_clip's resize modes: how non-square images are made square
        resize, crop = {
            "shortest": (f"shorter side to {size}", f"centre crop to {size}"),
            "longest": (f"longer side to {size}", f"filled up to {size}"),
            "squash": (f"to {size}, whatever its shape", ""),
        }[used.resize_mode]
        return {
            "model": self._name,
            "weights_sha256": _state_hash(self._model),
            "kind": "open_clip",
            "context_length": self._tokenizer.context_length,
            "image_size": height if height == width else size,
            "preprocessing": preprocessing(f"{resize}, {used.interpolation}", crop, used.mean, used.std),
            "text_preparation": f"{type(self._tokenizer).__name__}, cut at the context length, padded to it",
            "similarity": "cosine",
            **self._run.protocol("open_clip_torch", "timm", "torchvision"),
        }


def _state_hash(model: nn.Module) -> str:
    """Hashes the weights in memory: their names, dtypes, shapes and bytes.

    open_clip does not report which of several files it loaded.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turns a library's error while it loads a model into a ValueError that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError, UnpicklingError) as error:
        raise ValueError(f"{name} cannot be loaded: {shorten(str(error), 600, placeholder=' …')}") from error
