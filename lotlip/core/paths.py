"""Where each stage writes."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from lotlip.core.section import ConfigError, Section

# The project's own files and folders, and those that its tools create.
_RESERVED = frozenset(
    {
        "lotlip",
        "flows",
        "tests",
        "docs",
        "benchmarks",
        "infra",
        "profiles",
        "examples",
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
    """Where each stage writes, relative to the project's root; dvc.yaml reads the same keys.

    Each is a separate folder inside the project: none is in another, except `stages` in `metrics`. Only
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
        Path("data/caption-store"), description="all captions ever written, kept across runs; not tracked by DVC"
    )
    report: Path = Field(Path("report"), description="the report")

    def check(self) -> None:
        """Checks that each path is a separate folder inside the project.

        Raises:
            ValueError: one is not; the message names its key.
        """
        normal = {name: Path(os.path.normpath(path)) for name, path in self}
        for name, path in self:
            # files are added to the store, never replaced, so several checkouts may share one
            if name == "caption_store" and path.is_absolute():
                continue
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"paths.{name} must be a folder inside the project, not {str(path)!r}")
            if path.parts[0] in _RESERVED or path.parts[0].startswith("."):
                raise ValueError(
                    f"paths.{name} is {str(path)!r}, but {path.parts[0]!r} is part of the project; "
                    "choose another folder"
                )
        for name, path in normal.items():
            for other, other_path in normal.items():
                nested = name == "stages" and other == "metrics" and path.parent == other_path
                if name != other and not nested and path.is_relative_to(other_path):
                    raise ValueError(
                        f"paths.{name} ({path}) is inside paths.{other} ({other_path}); choose separate folders"
                    )
        if self.stages.parent == self.metrics and self.stages.name in ("summary", "attention", "baselines"):
            raise ValueError(
                f"paths.stages ({self.stages}) is a folder that paths.metrics uses itself; choose another folder"
            )

    def check_links(self, root: Path) -> None:
        """Checks that no path leads out of the project through a link.

        Args:
            root: of the project.

        Raises:
            ConfigError: one does.
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
                        f"paths.{name}: {step} is a link that leads out of the project; choose a folder inside it"
                    )
                    break
        if problems:
            raise ConfigError("params.yaml cannot be used:", problems)

    def overlaps(self, path: Path) -> str | None:
        """The key of an output folder that a path is, is in, or contains; None if it overlaps with none."""
        given = Path(os.path.normpath(path.absolute()))
        for name, folder in self:
            output = Path(os.path.normpath(folder.absolute()))
            if given.is_relative_to(output) or output.is_relative_to(given):
                return name
        return None
