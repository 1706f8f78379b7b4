"""A saved model as MLflow's python_function, without pickle: what `mlflow models serve` and `mlflow.pyfunc` load."""

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

# What the code needs to embed; `lotlip` itself comes with the model.
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
    """Writes a model that MLflow serves. It has all it needs: the saved model, this package, versions of the others.

    Its input is a table with the columns `text` (of any length) and `image` (an encoded image, as base64). A row has
    one of the two; the other is null or its column not there. Its output are the rows' normalised features. A model
    with late interaction is written too, but has no such features, and says so when it is loaded.

    Args:
        folder: of the saved model.
        path: folder to write, whole or not there; one that is there is replaced.
        provenance: what its configuration and its card are to tell beside what they do, such as scores.
        identity: what MLflow is to know of it, such as its run.

    Raises:
        ValueError: the folder has no model.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    from lotlip.models.saving import copy_with_provenance

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model: config.json is not there")
    model = identity or Model()
    with atomic_write(path) as partial:
        # by hand: `pyfunc.save_model` copies once more, and looks through all that is installed, which takes a second
        copy_with_provenance(folder, partial / "data", provenance or {})
        package = Path(lotlip.__file__).parent
        shutil.copytree(package, partial / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        # without what no index has, the "+cpu" of a local version
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
    """What MLflow calls to load a model that `save_served_model` wrote."""
    return ServedModel(Embedder(Path(data_path)))


class ServedModel:
    """Embeds the rows of a table."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[list[float]]:
        """Each row's normalised feature, [N, D].

        Args:
            model_input: columns `text` and `image`, as `save_served_model` tells.
            params: none are known.

        Raises:
            MlflowException: a row has not exactly one of the two, or an image that cannot be decoded. Servers answer
                with status 400 and the message, which names the row, counted from 0.
        """
        from mlflow.exceptions import MlflowException

        texts: dict[int, str] = {}
        pictures: dict[int, np.ndarray] = {}
        try:
            if not set(COLUMNS) & set(model_input):  # MLflow has dropped all others
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
        found = dict(zip(texts, self._embedder.texts(list(texts.values())).tolist(), strict=True))
        found |= zip(pictures, self._embedder.prepared(pictures.values()).tolist(), strict=True)
        return [found[row] for row in range(len(model_input))]

    def _picture(self, row: int, image: str) -> np.ndarray:
        try:
            return self._embedder.prepare(base64.b64decode("".join(image.split()), validate=True))
        except binascii.Error as error:
            raise ValueError(f"row {row}: the image is not base64 ({error})") from error
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error


def _cells(table: pd.DataFrame, column: str) -> list[str]:
    """A column's texts; "" for what is null or blank."""
    if column not in table:
        return [""] * len(table)
    return [cell if isinstance(cell, str) and cell.strip() else "" for cell in table[column]]
