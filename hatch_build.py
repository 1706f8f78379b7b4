"""Adds the pipeline to the wheel, inside the package `lotlip`: `lotlip run` copies it into a project's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# `lotlip.init.project` reads them there; an editable install has them in the checkout
FILES = ("flows", "dvc.yaml", ".dvcignore", ".dvc/config")


class PipelineHook(BuildHookInterface):
    """Includes files of the checkout's root."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"].update(
                {str(Path(self.root, name)): f"lotlip/_pipeline/{name}" for name in FILES}
            )
