"""Exports both towers of a model as ONNX graphs."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize

from lotlip.core.files import read_json
from lotlip.data.tokenizer import TextTokenizer
from lotlip.exporting.transformers import image_processor
from lotlip.models.lotlip import LotlipModel
from lotlip.models.text.text_tower import TextTower
from lotlip.models.vision.image_tower import ImageTower

# A larger tower has its weights in a second file: protobuf, ONNX's encoding, ends at 2 GiB.
_LARGEST_FILE = 2**30
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED = ["a dog", "a red dog"]

_USE = """
import json

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor

about = json.load(open("export.json"))
tokenizer = Tokenizer.from_file("tokenizer.json")  # pads to the longest text and truncates
{special}texts = tokenizer.encode_batch(["A long text. With many sentences."])
text = onnxruntime.InferenceSession("text.onnx").run(
    None,
    {{
        "input_ids": np.array([text.ids for text in texts]),
        "attention_mask": np.array([text.attention_mask for text in texts]),
    }},
)[0]
pixels = {pixels}
image = onnxruntime.InferenceSession("image.onnx").run(None, {{"pixel_values": pixels}})[0]
print(about["logit_scale"] * image @ text.T + about["logit_bias"])
"""
_PIXELS = 'AutoImageProcessor.from_pretrained(".")(Image.open("picture.jpg"), return_tensors="np")["pixel_values"]'
_PADDED = "...  # float32 [batch, 3, size, size], as `image` in export.json says; transformers cannot pad to a square"
# Captions that spell the end token's name have words instead of the token.
_SPECIAL = "tokenizer.encode_special_tokens = True\n"


class _Text(nn.Module):
    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        _, outputs = self.tower.hidden_states(input_ids, attention_mask.sum(dim=1))
        return normalize(self.tower.features(outputs[:, 0]), dim=-1)


class _Image(nn.Module):
    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return normalize(self.tower(pixel_values), dim=-1)


def check_packages() -> None:
    """Raises ValueError if packages are missing; the message names the extra that has them."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'lotlip[export]'")


def write(model: LotlipModel, tokenizer: TextTokenizer, folder: Path) -> str:
    """Writes `text.onnx`, `image.onnx`, `tokenizer.json` and, where transformers has it, `preprocessor_config.json`.

    Returns:
        A program that uses them.

    Raises:
        ValueError: packages are missing, or torch cannot export a tower.
    """
    check_packages()
    ids, lengths = (torch.from_numpy(part) for part in tokenizer(_TRACED))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    spec = model.image_tower.spec
    pixels = torch.zeros(2, 3, spec.image_size, spec.image_size)
    names = ["input_ids", "attention_mask"]
    _write(_Text(model.text), (ids, mask), names, [0, 1], "text_features", folder / "text.onnx")
    _write(_Image(model.image_tower), (pixels,), ["pixel_values"], [0], "image_features", folder / "image.onnx")
    tokenizer.save(folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.enable_padding(pad_id=tokenizer.pad_id, pad_token=tokenizer.token(tokenizer.pad_id) or "")
    words.save(str(folder / "tokenizer.json"))
    padded = spec.resize == "pad"
    if not padded:
        image_processor(spec).save_pretrained(folder)
    return _USE.format(special="" if tokenizer.family == "bert" else _SPECIAL, pixels=_PADDED if padded else _PIXELS)


def features(folder: Path, texts: list[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns normalised features of texts [T, D] and images [I, D], as onnxruntime computes them."""
    import onnxruntime

    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.encode_special_tokens = read_json(folder / "tokenizer_config.json").get("split_special_tokens", False)
    encoded = words.encode_batch(texts)
    text = onnxruntime.InferenceSession(folder / "text.onnx").run(
        None,
        {
            "input_ids": np.array([text.ids for text in encoded]),
            "attention_mask": np.array([text.attention_mask for text in encoded]),
        },
    )
    image = onnxruntime.InferenceSession(folder / "image.onnx").run(None, {"pixel_values": pixels.numpy()})
    return torch.from_numpy(text[0]), torch.from_numpy(image[0])


def _write(
    tower: nn.Module, example: tuple[Tensor, ...], inputs: list[str], dynamic: list[int], output: str, file: Path
) -> None:
    """Writes a tower.

    Args:
        tower: the tower with its normalisation.
        example: inputs to trace it with.
        inputs: names of the inputs.
        dynamic: axes of each input whose size may change.
        output: name of the output.
        file: where to write; the weights of a large tower are in a second file beside it.
    """
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of optimisations that it leaves out
    size = sum(weight.nbytes for weight in tower.parameters())
    torch.onnx.export(
        tower.eval(),
        example,
        file,
        input_names=inputs,
        output_names=[output],
        dynamic_shapes={name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC) for name in inputs},
        dynamo=True,
        external_data=size > _LARGEST_FILE,
        verbose=False,
    )
