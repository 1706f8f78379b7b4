"""The stages, in order."""

STAGES = ("ingest", "image-tower", "caption", "shard", "pretrain", "baselines", "evaluate", "report")


def section(stage: str) -> str:
    """What a stage's section of params.yaml, its package and its flow are called.

    `baselines` has only a flow: it scores other models by the section and the package of `evaluate`.
    """
    return stage.replace("-", "_")
