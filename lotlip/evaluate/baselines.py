"""Models of other projects as encoders: CLIP, SigLIP and their kin of transformers, and whatever open_clip loads.

Each has its own tokenizer, context length and preprocessing. Images are decoded as everywhere in this project (turned
upright, brought to sRGB, on white), so that all models of a table see the same pictures.
"""

from __future__ import annotations

import difflib
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
from lotlip.data.weights import check_finite, check_weights
from lotlip.evaluate.encoders import ACCEPTED, OPEN_CLIP, Runner, preprocessing

OPEN_CLIP_CONFIG = "open_clip_config.json"
_LOCAL, _HUB = "local-dir:", "hf-hub:"  # how open_clip calls a folder, and a name of Hugging Face's
# What a folder of transformers' or open_clip's is made of: no code.
_PARTS = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Trained without an attention mask: padding is a part of the text, and the last position, padding or not, its feature.
_PADDING_IS_TEXT = ("siglip", "siglip2")


def from_hub(name: str) -> Path:
    """The folder with the files of a model of Hugging Face's, which are fetched unless they are there.

    Raises:
        ValueError: there is no such model, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, name, ignore_patterns=["*/*"])
    try:
        folder = Path(fetch(allow_patterns=_PARTS))
        if not list(folder.glob("*.safetensors")):
            fetch(allow_patterns=["*.bin"])
    except (OSError, ValueError) as error:  # its HTTP errors are OSErrors
        reason = shorten(str(error), 300, placeholder=" …")
        raise ValueError(
            f"no folder {name} is there, and no model of that name can be had of Hugging Face ({reason}); {ACCEPTED}"
        ) from error
    return folder


class TransformersEncoder:
    """A dual encoder of transformers: whatever has get_image_features and get_text_features.

    Args:
        name: for its protocol.
        folder: in Hugging Face layout.
        run: how.

    Raises:
        ValueError: the folder's model is no such model, or the folder lacks weights, tokenizer or image processor.
    """

    def __init__(self, name: str, folder: Path, run: Runner) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        from lotlip.models.saving import without_bars

        self._name = name
        self._run = run
        self._weights = _weights_files(folder)
        with _named(name), without_bars():
            kind = _dual_encoder(folder)
            # no name of Hugging Face's: all is in the folder, and nothing else is looked for
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
            raise ValueError(f"{name} does not hold all weights of a {kind}: {missing} are not there")
        check_finite(model.named_parameters(), name)
        self._model = model.to(run.device).eval()
        text = model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", self._tokenizer.model_max_length)
        self._context_length = min(positions, self._tokenizer.model_max_length)

    def images(self, images: Iterable[bytes]) -> Tensor:
        """As of `Encoder`."""
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
        """As of `Encoder`."""
        encode = _pooled(self._model.get_text_features)
        batches = in_batches(texts, self._run.batch_size)
        return torch.cat([self._run.features(encode, **self._tokens(batch)) for batch in batches]), None

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        found = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context_length, return_tensors="pt"
        )
        if self._model.config.model_type in _PADDING_IS_TEXT:
            return {"input_ids": found["input_ids"]}
        return dict(found)

    def protocol(self) -> dict[str, str | int]:
        """As of `Encoder`."""
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
    """The kind of model that a folder has, if it encodes images and texts apart."""
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    made = MODEL_MAPPING.get(type(config), None)
    if not all(hasattr(made, f"get_{side}_features") for side in ("image", "text")):
        raise ValueError(f"a {config.model_type} gives no features of images and of texts to compare; {ACCEPTED}")
    return config.model_type


def _weights_files(folder: Path) -> list[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # in the order in which transformers looks for them
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder} has no weights: neither model*.safetensors nor pytorch_model*.bin is there")


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
        name: for its protocol.
        address: NAME:TAG or NAME:FILE, where NAME is an architecture; `hf-hub:NAME` or `local-dir:FOLDER`.
        run: how.

    Raises:
        ValueError: there is no such model, no such weights, or they cannot be loaded.
    """

    def __init__(self, name: str, address: str, run: Runner) -> None:
        import open_clip
        from transformers import AutoConfig

        self._name = name
        self._run = run
        whole = address.startswith((_LOCAL, _HUB))
        made, _, weights = (address, "", "") if whole else address.partition(":")
        if not whole:
            _check_address(made, weights)
        with _named(name):
            text = (open_clip.get_model_config(made) or {}).get("text_cfg", {})
            # a model's own configuration could ask for its tokenizer's code to be run
            never = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
            if text.get("hf_model_name"):  # open_clip would let the terminal decide about a text tower's code
                AutoConfig.from_pretrained(text["hf_model_name"], trust_remote_code=False)
            model, self._transform = open_clip.create_model_from_pretrained(
                made, weights or None, device=run.device, weights_only=True
            )
            self._tokenizer = open_clip.get_tokenizer(made, **never)
        check_finite(model.named_parameters(), name)
        self._model = model.eval()
        self._preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)

    def images(self, images: Iterable[bytes]) -> Tensor:
        """As of `Encoder`."""
        batches = self._run.prepared(images, self._prepare)
        return torch.cat([self._run.features(self._model.encode_image, torch.stack(batch)) for batch in batches])

    def _prepare(self, image: bytes) -> Tensor:
        picture = decode_rgb(image)
        return self._transform(without_ends(picture) if self._preprocess.resize_mode == "shortest" else picture)

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, None]:
        """As of `Encoder`."""
        batches = in_batches(texts, self._run.batch_size)
        return torch.cat(
            [self._run.features(self._model.encode_text, self._tokenizer(batch)) for batch in batches]
        ), None

    def protocol(self) -> dict[str, str | int]:
        """As of `Encoder`."""
        used = self._preprocess
        height, width = used.size if isinstance(used.size, (tuple, list)) else (used.size, used.size)
        size = f"{height} × {width}"
        # open_clip's own words: what becomes of pictures that are no squares
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


def _check_address(architecture: str, weights: str) -> None:
    """Whether open_clip knows an architecture and weights for it; its own messages list all that it has."""
    import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"open_clip has no architecture {architecture!r}{hint} ({ACCEPTED})")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights.lower().replace("-", "_") not in tags and not Path(weights).is_file():
        wrong = f"{weights!r} is none of its tags, and no file" if weights else "which weights is not said"
        raise ValueError(
            f"{OPEN_CLIP}{architecture}: {wrong}; give {OPEN_CLIP}{architecture}:FILE, or a tag after the colon: "
            f"{', '.join(tags) or 'there are none'}"
        )


def _state_hash(model: nn.Module) -> str:
    """Of the weights as they are in memory: their names, kinds, shapes and bytes.

    open_clip chooses among several files, and does not tell which one it took.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever a library says of a model that it cannot load becomes one line that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError, UnpicklingError) as error:
        raise ValueError(f"{name} cannot be loaded: {shorten(str(error), 600, placeholder=' …')}") from error
