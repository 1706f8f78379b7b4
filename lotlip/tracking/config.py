"""Settings of MLflow's tracking and of its model registry."""

from __future__ import annotations

from pydantic import Field, model_validator

from lotlip.core.section import Name, Section, Share


class TrackingConfig(Section):
    """MLflow; MLFLOW_TRACKING_URI in the environment goes before `uri`."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow's tracking server or database")
    experiment: str = Field("lotlip", description="name of the experiment that runs are filed under")


class RegistryConfig(Section):
    """MLflow's model registry: which model of a sweep is kept under a name, if it passes the gate.

    Metrics are called as in MLflow: the benchmark's name, then the metric's.
    """

    model: Name = Field("lotlip", description="name of the registered model")
    alias: Name = Field("champion", description="points at the last model that passed: models:/<model>@<alias>")
    min_scores: dict[str, Share] = Field(
        description="metric → its least value; at least one on long text and one on short"
    )
    max_score_drop: Share = Field(
        0.0, description="how far below the model that the alias points at each of these metrics may be"
    )

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` loads it by."""
        return f"models:/{self.model}@{self.alias}"

    @model_validator(mode="after")
    def _gate_on_both(self) -> RegistryConfig:
        for family in ("long", "short"):
            if not any(f".{family}." in name for name in self.min_scores):
                raise ValueError(
                    f"least has no metric on {family} text, so a model could be kept that lost it; add one, "
                    f"such as scenes.{family}.text_to_image.r1: 0.2"
                )
        if self.alias == "latest" or (self.alias[0] == "v" and self.alias[1:].isdigit()):
            raise ValueError(f"MLflow keeps the alias {self.alias!r} for itself; call it otherwise")
        return self
