"""Where each stage writes."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from lotlip.core.section import ConfigError, Section

# What the project consists of, and what its tools keep in it.
_RESERVED = frozenset(
    {
        "lotlip",
        "flows",
        "tests",
        "docs",
        "benchmarks",
        "infra",
        "profiles",
        "imported",
        "mlruns",
        "mlartifacts",
        "params.yaml",
        "dvc.yaml",
        "dvc.lock",
        "Makefile",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "requirements.lock",
        "mlflow.db",
    }
)


class Paths(Section):
    """Where each stage writes, relative to the project's root; dvc.yaml reads the same names.

    Each is a folder of its own inside the project: none is in another, except `stages` in `metrics`. Only
    `caption_store` may be an absolute path. For any other path outside of the project, plain `dvc repro` may end with
    an empty error before a stage runs; `make reproduce` and `python -m flows STAGE` name the path.
    """

    ingest: Path = Field(Path("data/ingest"), description="images and short captions, as partitions")
    image_tower: Path = Field(Path("data/image-tower"), description="the image tower")
    captions: Path = Field(Path("data/captions"), description="long captions, a folder for each captioner")
    shards: Path = Field(Path("data/shards"), description="WebDataset tars that training reads")
    models: Path = Field(Path("models"), description="trained models, a folder for each ablation")
    metrics: Path = Field(Path("metrics"), description="scores of each ablation")
    stages: Path = Field(Path("metrics/stages"), description="records of the stages' last runs")
    caption_store: Path = Field(
        Path("data/caption-store"), description="captions that were written once, kept whatever changes; not DVC's"
    )
    report: Path = Field(Path("report"), description="the report")

    def check(self) -> None:
        """Checks that each is a folder of its own inside the project.

        Raises:
            ValueError: one is not; the message names its key.
        """
        named = {name: Path(os.path.normpath(path)) for name, path in self}
        for name, path in self:
            # the store is added to and never replaced; several checkouts may share one
            if name == "caption_store" and path.is_absolute():
                continue
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"paths.{name} must be a folder inside the project, not {str(path)!r}")
            if path.parts[0] in _RESERVED or path.parts[0].startswith("."):
                raise ValueError(
                    f"paths.{name} is {str(path)!r}, but {path.parts[0]!r} is part of the project; name another"
                )
        for name, path in named.items():
            for other, its in named.items():
                nested = name == "stages" and other == "metrics" and path.parent == its
                if name != other and not nested and path.is_relative_to(its):
                    raise ValueError(
                        f"paths.{name} ({path}) is in paths.{other} ({its}), but each must be a folder of its own"
                    )
        if self.stages.parent == self.metrics and self.stages.name in ("summary", "attention"):
            raise ValueError(f"paths.stages ({self.stages}) has the name of a folder that metrics has; name another")

    def check_links(self, root: Path) -> None:
        """Checks that no path leads out of the project.

        Args:
            root: of the project.

        Raises:
            ConfigError: one does, by a link.
        """
        real = root.resolve()
        problems = []
        for name, path in self:
            if name == "caption_store":
                continue
            step = root
            for part in path.parts:
                step = step / part
                if not step.resolve().is_relative_to(real):
                    problems.append(
                        f"paths.{name}: {step} is a link that leads out of the project; name a folder in it"
                    )
                    break
        if problems:
            raise ConfigError("params.yaml cannot be used:", problems)

    def overlaps(self, path: Path) -> str | None:
        """The name of an output that a path is, is in, or contains; None where there is none."""
        here = Path(os.path.normpath(path.absolute()))
        for name, own in self:
            there = Path(os.path.normpath(own.absolute()))
            if here.is_relative_to(there) or there.is_relative_to(here):
                return name
        return None
