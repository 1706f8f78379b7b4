"""The names of all scores, as used in metrics/<ablation>.json, MLflow and the report."""

from __future__ import annotations

from enum import StrEnum


class Metric(StrEnum):
    """The name of a score: kind of text, direction and statistic, or "classification" and statistic.

    The order is that of table columns.
    """

    LONG_IMAGE_TO_TEXT_R1 = "long.image_to_text.r1"
    LONG_IMAGE_TO_TEXT_R5 = "long.image_to_text.r5"
    LONG_IMAGE_TO_TEXT_R10 = "long.image_to_text.r10"
    LONG_IMAGE_TO_TEXT_MEAN_RANK = "long.image_to_text.mean_rank"
    LONG_IMAGE_TO_TEXT_MEDIAN_RANK = "long.image_to_text.median_rank"
    LONG_TEXT_TO_IMAGE_R1 = "long.text_to_image.r1"
    LONG_TEXT_TO_IMAGE_R5 = "long.text_to_image.r5"
    LONG_TEXT_TO_IMAGE_R10 = "long.text_to_image.r10"
    LONG_TEXT_TO_IMAGE_MEAN_RANK = "long.text_to_image.mean_rank"
    LONG_TEXT_TO_IMAGE_MEDIAN_RANK = "long.text_to_image.median_rank"
    SHORT_IMAGE_TO_TEXT_R1 = "short.image_to_text.r1"
    SHORT_IMAGE_TO_TEXT_R5 = "short.image_to_text.r5"
    SHORT_IMAGE_TO_TEXT_R10 = "short.image_to_text.r10"
    SHORT_IMAGE_TO_TEXT_MEAN_RANK = "short.image_to_text.mean_rank"
    SHORT_IMAGE_TO_TEXT_MEDIAN_RANK = "short.image_to_text.median_rank"
    SHORT_TEXT_TO_IMAGE_R1 = "short.text_to_image.r1"
    SHORT_TEXT_TO_IMAGE_R5 = "short.text_to_image.r5"
    SHORT_TEXT_TO_IMAGE_R10 = "short.text_to_image.r10"
    SHORT_TEXT_TO_IMAGE_MEAN_RANK = "short.text_to_image.mean_rank"
    SHORT_TEXT_TO_IMAGE_MEDIAN_RANK = "short.text_to_image.median_rank"
    CLASSIFICATION_TOP1 = "classification.top1"
    CLASSIFICATION_TOP5 = "classification.top5"

    @property
    def family(self) -> str:
        """The kind of text, or "classification"."""
        return self.partition(".")[0]

    @property
    def direction(self) -> str:
        """ "image_to_text", "text_to_image", or empty for classification."""
        return self.rpartition(".")[0].partition(".")[2]

    @property
    def statistic(self) -> str:
        """The statistic, such as "r1", "median_rank" or "top5"."""
        return self.rpartition(".")[2]

    @property
    def is_rank(self) -> bool:
        """Whether it is a rank from 1, where lower is better; all other scores are fractions from 0 to 1."""
        return self.statistic.endswith("rank")


# The scores that tables and figures compare.
MAIN = {
    "long": (Metric.LONG_IMAGE_TO_TEXT_R1, Metric.LONG_TEXT_TO_IMAGE_R1),
    "short": (Metric.SHORT_IMAGE_TO_TEXT_R1, Metric.SHORT_TEXT_TO_IMAGE_R1),
    "classification": (Metric.CLASSIFICATION_TOP1,),
}
MAIN_METRICS = tuple(metric for metrics in MAIN.values() for metric in metrics)
RECALLS = (*MAIN["long"], *MAIN["short"])  # R@1 on long and short text, both directions
