"""The demo's benchmark: held-out scenes with long and short texts and prompts for the shape."""

from __future__ import annotations

import json

from lotlip.core.paths import Paths
from lotlip.demo.questions import label, long_text, shape_prompts, short_text
from lotlip.demo.world import Scene
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, Prompts, split_images, version_of
from lotlip.evaluate.config import SceneBenchmarkConfig

SENTENCE_TEXTS = 1000  # each is encoded in seven more versions, which with all texts takes longer than the rest


def scene_benchmark(name: str, settings: SceneBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Opens the benchmark of the scenes of a split.

    Raises:
        ValueError: the split has another number of scenes than `settings.size`, or its images are not scenes.
    """
    source = paths.ingest
    keys, graphs, read = split_images(source, settings.split, "scene")
    if len(keys) != settings.size:
        raise ValueError(
            f"benchmark {name}: {source}/{settings.split} has {len(keys)} scenes, but "
            f"evaluate.benchmarks.{name}.size is {settings.size}; scores of different sizes are not comparable"
        )
    if not all(isinstance(scene, str) for scene in graphs):
        raise ValueError(f"benchmark {name}: the images in {source} are not generated scenes; use `kind: held-out`")
    scenes = [Scene.from_json(json.loads(str(scene))) for scene in graphs]
    indices = list(range(len(scenes)))
    retrieval = {
        "long": ImageTexts([long_text(scene) for scene in scenes], indices),
        "short": ImageTexts([short_text(scene) for scene in scenes], indices),
    }
    return Benchmark(
        name=name,
        images=keys,
        read=read,
        retrieval=retrieval,
        prompts=Prompts(shape_prompts(), [label(scene) for scene in scenes]),
        max_unseen_tokens=settings.max_unseen_tokens,
        about={
            "split": settings.split,
            "version": version_of(keys, retrieval),
            "texts": "frames that no training caption uses, words that they do use",
        },
        scenes=scenes,
        sentence_texts=SENTENCE_TEXTS,
    )
