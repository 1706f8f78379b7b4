"""The demo's benchmark: held-out scenes, and questions about all that is known of them."""

from __future__ import annotations

import json

from lotlip.core.paths import Paths
from lotlip.demo.questions import label, long_text, shape_prompts, short_text
from lotlip.demo.world import Scene
from lotlip.evaluate.benchmarks import Benchmark, Prompts, Texts, images_of, version_of
from lotlip.evaluate.config import SceneBenchmarkConfig


def scene_benchmark(name: str, settings: SceneBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """The scenes of a split of ingest's partitions.

    Raises:
        ValueError: the split has another number of scenes than it should, or other pictures.
    """
    source = paths.ingest
    keys, drawn, read = images_of(source, settings.split, "scene")
    if len(keys) != settings.size:
        raise ValueError(
            f"benchmark {name}: {source}/{settings.split} has {len(keys)} scenes, but "
            f"evaluate.benchmarks.{name}.size is {settings.size}; scores of another size cannot be compared"
        )
    if not all(isinstance(scene, str) for scene in drawn):
        raise ValueError(f"benchmark {name}: the images in {source} are not generated scenes; use `kind: held-out`")
    scenes = [Scene.from_json(json.loads(str(scene))) for scene in drawn]
    every = list(range(len(scenes)))
    retrieval = {
        "long": Texts([long_text(scene) for scene in scenes], every),
        "short": Texts([short_text(scene) for scene in scenes], every),
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
    )
