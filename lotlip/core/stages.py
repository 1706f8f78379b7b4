"""The stages, in order."""

STAGES = ("ingest", "image-tower", "caption", "shard", "pretrain", "evaluate", "report")


def section(stage: str) -> str:
    """What a stage's section of params.yaml, its package and its flow are called."""
    return stage.replace("-", "_")
