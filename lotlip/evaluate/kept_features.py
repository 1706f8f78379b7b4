"""Features of benchmarks' images, kept on disk for the next ablation with the same frozen image tower."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lotlip.core.caches import lock
from lotlip.core.files import atomic_write, remove, sha256_json
from lotlip.data.weights import read_weights
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.evaluate.evaluate import image_features

_NAME = "images"


class KeptFeatures:
    """Encodes the images of a benchmark, or reads their features if the same tower has encoded the same images.

    Args:
        folder: of the kept features, with a subfolder for each benchmark; a scratch folder.
        inputs: hash of all that decides which images a benchmark has.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self._folder, self._inputs = folder, inputs

    def __call__(self, encoder: LotlipEncoder, benchmark: Benchmark) -> Tensor:
        """Returns the features of the benchmark's images, [I, D], float32.

        Features of patches are not kept, because they are as large as the images. Features of the last tower only are
        kept. A damaged file is written again.

        Raises:
            ValueError: an image cannot be read or decoded.
        """
        if encoder.model.config.similarity == "late-interaction":
            return image_features(encoder, benchmark)
        folder = self._folder / benchmark.name
        file = folder / f"{sha256_json([self._inputs, encoder.image_protocol()])}.safetensors"
        with lock(folder.with_name(f"{benchmark.name}.lock"), wait=True):  # another ablation may be encoding them
            kept = _read(file, len(benchmark.images))
            if kept is not None:
                return kept
            features = image_features(encoder, benchmark)
            remove(folder)
            with atomic_write(file) as temporary:
                save_file({_NAME: features}, temporary)
        return features


def _read(file: Path, images: int) -> Tensor | None:
    """Reads features of a number of images; None if the file is missing or damaged."""
    try:
        features = read_weights(file)[_NAME]
    except (KeyError, ValueError):
        return None
    return features if len(features) == images else None
