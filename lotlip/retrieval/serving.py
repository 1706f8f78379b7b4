"""A saved model as an MLflow python_function without pickle, for `mlflow models serve` and `mlflow.pyfunc`."""

from __future__ import annotations

import base64
import binascii
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lotlip
from lotlip.core.files import atomic_write, write_json
from lotlip.retrieval.embedding import Embedder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from mlflow.models import Model

# Dependencies for embedding; `lotlip` itself is packaged with the model.
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "timm",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)
COLUMNS = ("text", "image")
EXAMPLE = {"columns": ["text"], "data": [["A red ball lies on the grass. Behind it stands a house."]]}


def save_served_model(
    folder: Path, path: Path, provenance: Mapping[str, Any] | None = None, identity: Model | None = None
) -> None:
    """Writes a self-contained model for MLflow: the saved model, this package, and pinned dependencies.

    The input is a table with the columns `text` (of any length) and `image` (an encoded image, as base64). Each row has
    exactly one of the two; the other is null or its column is missing. The output is the normalised feature of each
    row. A model with late interaction is written, too, but fails to load, because it has no such features.

    Args:
        folder: folder of the saved model.
        path: output folder, written atomically; an existing one is replaced.
        provenance: entries added to its configuration and model card, such as scores.
        identity: MLflow's metadata of the model, such as its run.

    Raises:
        ValueError: the folder has no model.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    from lotlip.models.saving import copy_with_provenance

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model: config.json is missing")
    model = identity or Model()
    with atomic_write(path) as partial:
        # Not with `pyfunc.save_model`, which makes another copy and scans all installed packages.
        copy_with_provenance(folder, partial / "data", provenance or {})
        package = Path(lotlip.__file__).parent
        shutil.copytree(package, partial / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        # Local versions such as "+cpu" are not on package indexes.
        versions = [f"{name}=={version(name).partition('+')[0]}\n" for name in REQUIREMENTS]
        (partial / "requirements.txt").write_text("".join(versions))
        python = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
        write_json(partial / "python_env.yaml", python)  # JSON is YAML
        write_json(partial / "input_example.json", EXAMPLE)
        write_json(partial / "serving_input_example.json", {"dataframe_split": EXAMPLE})
        model.saved_input_example_info = {
            "type": "dataframe",
            "pandas_orient": "split",
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
        }
        columns = [ColSpec(DataType.string, name, required=False) for name in COLUMNS]
        model.signature = ModelSignature(Schema([*columns]), Schema([ColSpec(Array(DataType.float))]))
        pyfunc.add_to_model(model, __name__, data="data", code="code", python_env="python_env.yaml")
        model.save(partial / "MLmodel")


def _load_pyfunc(data_path: str) -> ServedModel:
    """Loads a model written by `save_served_model`; called by MLflow."""
    return ServedModel(Embedder(Path(data_path)))


class ServedModel:
    """A model that embeds the rows of a table."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[list[float]]:
        """Returns the normalised feature of each row, [N, D].

        Args:
            model_input: columns `text` and `image`, see `save_served_model`.
            params: ignored.

        Raises:
            MlflowException: a row does not have exactly one of the two, or its image cannot be decoded. Servers respond
                with status 400 and the message, which names the row, counted from 0.
        """
        from mlflow.exceptions import MlflowException

        texts: dict[int, str] = {}
        pictures: dict[int, np.ndarray] = {}
        try:
            if not set(COLUMNS) & set(model_input):  # MLflow drops all other columns
                raise ValueError("the table has neither of the columns text and image")
            for row, (text, image) in enumerate(zip(*(_cells(model_input, name) for name in COLUMNS), strict=True)):
                if bool(text) == bool(image):
                    raise ValueError(f"row {row} has {'both text and' if text else 'neither text nor'} image")
                if text:
                    texts[row] = text
                else:
                    pictures[row] = self._picture(row, image)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        features = dict(zip(texts, self._embedder.texts(list(texts.values())).tolist(), strict=True))
        features |= zip(pictures, self._embedder.prepared(pictures.values()).tolist(), strict=True)
        return [features[row] for row in range(len(model_input))]

    def _picture(self, row: int, image: str) -> np.ndarray:
        try:
            return self._embedder.prepare(base64.b64decode("".join(image.split()), validate=True))
        except binascii.Error as error:
            raise ValueError(f"row {row}: the image is not base64 ({error})") from error
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error


def _cells(table: pd.DataFrame, column: str) -> list[str]:
    """Returns a column's texts, with "" for null and blank cells."""
    if column not in table:
        return [""] * len(table)
    return [cell if isinstance(cell, str) and cell.strip() else "" for cell in table[column]]
