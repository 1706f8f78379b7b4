"""Exports a saved model to the layout of another library, and compares the result with the model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import lotlip
from lotlip.core.files import atomic_write, check_model, weights_hash, write_json, write_record
from lotlip.data.tokenizer import TextTokenizer
from lotlip.exporting.plain import check_similarity, logit_scale
from lotlip.importing.output import check_out
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import load_model
from lotlip.models.vision.spec import ImageTowerSpec

Format = Literal["transformers", "open_clip", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
ABOUT = "export.json"  # each export has it, and nothing else does
TOLERANCE = 1e-4  # largest difference between normalised features of the model and the export

_TEXTS = ["", "a photo", "A red house stands by a lake. Behind it stand two trees, and a boat is on the water."]


def export(folder: Path, to: Format, out: Path, force: bool = False) -> float:
    """Exports a saved model; the output folder is written atomically.

    Args:
        folder: of the model.
        to: format.
        out: folder to write.
        force: whether an earlier export in `out` may be replaced; a folder with other files is never replaced.

    Returns:
        The largest difference between features of the model and the export.

    Raises:
        ValueError: the folder has no model, the format cannot represent it, packages are missing, `out` is in use, or
            the export gives other features than the model.
    """
    check_out(out, [folder.resolve()], force)
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise ValueError(f"--out {out} has a model that is not an export; name another folder")
    check_model(folder)
    # modules of formats import their libraries
    module: Any = import_module(f"lotlip.exporting.{to}")
    model, tokenizer = load_model(folder)
    check_similarity(model)
    with atomic_write(out.resolve()) as partial, torch.no_grad():
        partial.mkdir()
        use = module.write(model, tokenizer, partial)
        about = _about(model, folder, to)
        write_json(partial / ABOUT, about)
        (partial / "README.md").write_text(_card(about, use), encoding="utf-8")
        difference = _difference(model, tokenizer, module.features, partial)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"features of the export differ from those of {folder} by {difference:.1e}, more than {TOLERANCE:g}; "
                "nothing was written. Please report this model's config.json"
            )
        write_record(partial, Path(out.resolve().name))
    return difference


def _difference(model: LotlipModel, tokenizer: TextTokenizer, features: Any, folder: Path) -> float:
    """Returns the largest difference between features of a model and of its export in a folder."""
    size = model.image_tower.spec.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids, lengths = tokenizer(_TEXTS)
    expected = model.encode_text(torch.from_numpy(ids), torch.from_numpy(lengths))[:, 0], model.encode_image(pixels)
    found = features(folder, _TEXTS, pixels)
    return max(float((theirs - ours).abs().max()) for theirs, ours in zip(found, expected, strict=True))


def _about(model: LotlipModel, folder: Path, to: Format) -> dict[str, Any]:
    spec = ImageTowerSpec.from_json(model.config.image_config)
    return {
        "format": to,
        "name": (model.config.provenance or {}).get("name", folder.resolve().name),
        "weights_sha256": weights_hash(folder),
        "lotlip": lotlip.__version__,
        "logit_scale": logit_scale(model).exp().item(),
        "logit_bias": 0.0 if model.logit_bias is None else model.logit_bias.item(),
        "context_length": model.config.context_length,
        "embed_dim": model.config.embed_dim,
        "image": dict(spec.preprocessing),
    }


def _card(about: dict[str, Any], use: str) -> str:
    """Returns the export's README."""
    image = about["image"]
    bias = f" and the bias {about['logit_bias']:.6g}" if about["logit_bias"] else ""
    return f"""# {about["name"]}

A language-image model, exported by lotlip {about["lotlip"]}. This folder does not need lotlip.

```python
{use.strip()}
```

- Texts have up to {about["context_length"]} tokens. Features have {about["embed_dim"]} dimensions.
- Images have {image["image_size"]} pixels per side (resize {image["resize"]}, crop {image["crop"]:g}, interpolation
  {image["interpolation"]}). Values in 0..1 are normalised by the mean {list(image["mean"])} and the standard
  deviation {list(image["std"])}.
- Logits are similarities times {about["logit_scale"]:.6g}{bias}.
"""
