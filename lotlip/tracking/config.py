"""Settings of MLflow tracking and the model registry."""

from __future__ import annotations

from pydantic import Field, model_validator

from lotlip.core.section import Name, Section, Share


class TrackingConfig(Section):
    """MLflow tracking; the environment variable MLFLOW_TRACKING_URI overrides `uri`."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking server or database")
    experiment: str = Field("lotlip", description="name of the MLflow experiment for all runs")


class RegistryConfig(Section):
    """MLflow's model registry: the best model of a sweep is registered under a name if it passes the gate.

    Metrics have their MLflow names: the benchmark's name, then the metric's.
    """

    model: Name = Field("lotlip", description="name of the registered model")
    alias: Name = Field("champion", description="points to the last model that passed: models:/<model>@<alias>")
    min_scores: dict[str, Share] = Field(
        description="metric → smallest accepted value; at least one on long text and one on short text"
    )
    max_score_drop: Share = Field(
        0.0, description="largest accepted drop of each of these metrics below the model that the alias points to"
    )

    @property
    def uri(self) -> str:
        """The URI for `mlflow.pyfunc.load_model`."""
        return f"models:/{self.model}@{self.alias}"

    @model_validator(mode="after")
    def _gate_on_both(self) -> RegistryConfig:
        for family in ("long", "short"):
            if not any(f".{family}." in name for name in self.min_scores):
                raise ValueError(
                    f"min_scores has no metric on {family} text, so a model could pass that has become bad at it; add "
                    f"one, such as scenes.{family}.text_to_image.r1: 0.2"
                )
        if self.alias == "latest" or (self.alias[0] == "v" and self.alias[1:].isdigit()):
            raise ValueError(f"MLflow reserves the alias {self.alias!r}; choose another name")
        return self
