"""Settings that every user of the demo's generated scenes needs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lotlip.core.section import Section

# At most as many as there are positions around the salient object; a text that names another object needs two.
_SmallObjects = Annotated[int, Field(ge=2, le=8)]


class SceneObjects(Section):
    """How many small objects the demo's scenes have."""

    fewest_objects: _SmallObjects = Field(3, description="smallest number of small objects in a scene")
    most_objects: _SmallObjects = Field(6, description="largest number of small objects in a scene")

    @model_validator(mode="after")
    def _fewest_is_below_most(self) -> SceneObjects:
        if self.fewest_objects > self.most_objects:
            raise ValueError(
                f"fewest_objects {self.fewest_objects} is above most_objects {self.most_objects}; lower it"
            )
        return self

    @property
    def small_objects(self) -> tuple[int, int]:
        """Both numbers."""
        return self.fewest_objects, self.most_objects
