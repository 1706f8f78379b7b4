"""Starting models in files: the layout of OpenAI's CLIP and Long-CLIP, and that of LoTLIP's released code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor

from lotlip.data.plain_tokenizer import PlainTokenizer
from lotlip.data.tokenizer import CLIP, TextTokenizer
from lotlip.data.weights import read_any_weights
from lotlip.importing import official
from lotlip.importing.clip_names import text_weights
from lotlip.importing.open_clip import SCALARS, spec_text, text_config
from lotlip.importing.start import ACCEPTED, StartingModel
from lotlip.importing.tokenizers import check_tokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.vision.spec import ImageTowerSpec

KEPT_POSITIONS = 20  # the first positions, which Long-CLIP keeps frozen (arXiv 2403.15378, section 3.1)
# The files do not show the number of attention heads. A head is 64 wide in each ViT of OpenAI and Long-CLIP, which have
# these widths, but not in larger ones, such as LAION's ViT-H.
_HEAD = 64
_WIDTHS = {"image": (768, 1024), "text": (512, 768)}
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def open_start(file: Path, tokenizer: str | None = None) -> StartingModel:
    """Opens a checkpoint, whose layout its weights show.

    Args:
        file: a torch checkpoint or safetensors file.
        tokenizer: of the text tower; None: CLIP's, or BERT's for a LoTLIP checkpoint.

    Raises:
        ValueError: it has another layout, is of a CLIP with a ResNet, or its towers are not as wide as OpenAI's.
    """
    weights = read_any_weights(file)
    if any(name.startswith("text.transformer.encoder.") for name in weights):
        config, converted, words = _lotlip(file, tokenizer or "bert-base-uncased")
        return StartingModel(str(file), config, words, lambda: converted)
    if missing := [
        name
        for name in ("positional_embedding", "visual.proj", "text_projection", "logit_scale")
        if name not in weights
    ]:
        resnet = " (OpenAI's CLIP with a ResNet can be named as open_clip:RN50:openai)"
        raise ValueError(
            f"{file} lacks {', '.join(missing)}, so it is neither a checkpoint of CLIP or Long-CLIP with a ViT nor one "
            f"of LoTLIP{resnet if 'visual.attnpool.positional_embedding' in weights else ''}; {ACCEPTED}"
        )
    weights = {name: value.float() for name, value in weights.items() if name not in _NOT_WEIGHTS}
    # Long-CLIP has a frozen table, of which the first positions are used, and a trained one for the others
    trained = weights.pop("positional_embedding_res", None)
    if trained is not None:
        weights["positional_embedding"] = weights["positional_embedding"].clone()
        weights["positional_embedding"][KEPT_POSITIONS:] = trained[KEPT_POSITIONS:]
    _check_widths(file, image=weights["visual.conv1.weight"].shape[0], text=len(weights["ln_final.weight"]))
    spec = _image_tower(weights)
    text = _text(weights)
    words = PlainTokenizer(tokenizer or CLIP, text["context_length"])
    check_tokenizer(words, "clip", text["vocab_size"], str(file))
    config = LotlipConfig(
        text_config=text_config(text, spec.kwargs["embed_dim"], True, words),
        image_config=spec.to_json(),
        embed_dim=spec.kwargs["embed_dim"],
        context_length=words.context_length,
        corner_tokens=0,
        logit_bias="logit_bias" in weights,
    )
    return StartingModel(str(file), config, words, lambda: _ours(weights))


def _lotlip(file: Path, tokenizer: str) -> tuple[LotlipConfig, dict[str, Tensor], TextTokenizer]:
    """Reads LoTLIP's released B/16."""
    checkpoint = official.read_checkpoint(file)
    try:
        return official.convert(checkpoint, official.RELEASED_IMAGE_TOWER, {}, tokenizer)
    except ValueError as error:  # its remedies are options of `import-official`
        raise ValueError(
            f"{file} is not like LoTLIP's released B/16; convert another LoTLIP model with `lotlip import-official "
            f"{file}`, whose options describe it: {shorten(str(error), 400, placeholder=' …')}"
        ) from error


def _check_widths(file: Path, **widths: int) -> None:
    """Raises ValueError if the number of a tower's attention heads is not known from its width."""
    for tower, width in widths.items():
        if width not in _WIDTHS[tower]:
            raise ValueError(
                f"the {tower} tower of {file} is {width} wide, unlike those of OpenAI and Long-CLIP "
                f"({' or '.join(map(str, _WIDTHS[tower]))}), so its number of attention heads is not known; name its "
                f"architecture in open_clip: open_clip:NAME:{file}"
            )


def _image_tower(weights: Mapping[str, Tensor]) -> ImageTowerSpec:
    width, patch = weights["visual.conv1.weight"].shape[0], weights["visual.conv1.weight"].shape[-1]
    side = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    vision = {"layers": _layers(weights, "visual.transformer."), "width": width, "patch_size": patch}
    return ImageTowerSpec(
        "CLIP ViT",
        patch * side,
        kwargs={
            "embed_dim": weights["visual.proj"].shape[1],
            "vision_cfg": {**vision, "head_width": _HEAD, "image_size": patch * side},
            "quick_gelu": True,
        },
        library="open_clip",
        pooling="model",
    )


def _text(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns open_clip's text configuration of a checkpoint."""
    width = len(weights["ln_final.weight"])
    return spec_text("ViT-B-16") | {
        "context_length": len(weights["positional_embedding"]),
        "vocab_size": len(weights["token_embedding.weight"]),
        "width": width,
        "heads": width // _HEAD,
        "layers": _layers(weights, "transformer."),
    }


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    names = [name.removeprefix(prefix) for name in weights if name.startswith(f"{prefix}resblocks.")]
    return len({name.split(".")[1] for name in names})


def _ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    text = {name: value for name, value in weights.items() if name.startswith(_TEXT)}
    image = {
        f"image.trunk.{n.removeprefix('visual.')}": value for n, value in weights.items() if n.startswith("visual.")
    }
    scalars = {name: weights[name].reshape(1) for name in SCALARS if name in weights}
    return {**image, **text_weights(text), **scalars}
