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
    CONDITIONED_LONG_IMAGE_TO_TEXT_R1 = "conditioned-long.image_to_text.r1"
    CONDITIONED_LONG_IMAGE_TO_TEXT_R5 = "conditioned-long.image_to_text.r5"
    CONDITIONED_LONG_IMAGE_TO_TEXT_R10 = "conditioned-long.image_to_text.r10"
    CONDITIONED_LONG_TEXT_TO_IMAGE_R1 = "conditioned-long.text_to_image.r1"
    CONDITIONED_LONG_TEXT_TO_IMAGE_R5 = "conditioned-long.text_to_image.r5"
    CONDITIONED_LONG_TEXT_TO_IMAGE_R10 = "conditioned-long.text_to_image.r10"
    CONDITIONED_SHORT_IMAGE_TO_TEXT_R1 = "conditioned-short.image_to_text.r1"
    CONDITIONED_SHORT_IMAGE_TO_TEXT_R5 = "conditioned-short.image_to_text.r5"
    CONDITIONED_SHORT_IMAGE_TO_TEXT_R10 = "conditioned-short.image_to_text.r10"
    CONDITIONED_SHORT_TEXT_TO_IMAGE_R1 = "conditioned-short.text_to_image.r1"
    CONDITIONED_SHORT_TEXT_TO_IMAGE_R5 = "conditioned-short.text_to_image.r5"
    CONDITIONED_SHORT_TEXT_TO_IMAGE_R10 = "conditioned-short.text_to_image.r10"
    RERANKED_LONG_IMAGE_TO_TEXT_R1 = "reranked-long.image_to_text.r1"
    RERANKED_LONG_IMAGE_TO_TEXT_R5 = "reranked-long.image_to_text.r5"
    RERANKED_LONG_IMAGE_TO_TEXT_R10 = "reranked-long.image_to_text.r10"
    RERANKED_LONG_TEXT_TO_IMAGE_R1 = "reranked-long.text_to_image.r1"
    RERANKED_LONG_TEXT_TO_IMAGE_R5 = "reranked-long.text_to_image.r5"
    RERANKED_LONG_TEXT_TO_IMAGE_R10 = "reranked-long.text_to_image.r10"
    RERANKED_SHORT_IMAGE_TO_TEXT_R1 = "reranked-short.image_to_text.r1"
    RERANKED_SHORT_IMAGE_TO_TEXT_R5 = "reranked-short.image_to_text.r5"
    RERANKED_SHORT_IMAGE_TO_TEXT_R10 = "reranked-short.image_to_text.r10"
    RERANKED_SHORT_TEXT_TO_IMAGE_R1 = "reranked-short.text_to_image.r1"
    RERANKED_SHORT_TEXT_TO_IMAGE_R5 = "reranked-short.text_to_image.r5"
    RERANKED_SHORT_TEXT_TO_IMAGE_R10 = "reranked-short.text_to_image.r10"
    PREFIXES_HIMO2 = "prefixes.himo2"
    PREFIXES_HIMO3 = "prefixes.himo3"
    PREFIXES_HIMO4 = "prefixes.himo4"
    UNCHANGED_IMAGE_TO_TEXT_R1 = "unchanged.image_to_text.r1"
    UNCHANGED_TEXT_TO_IMAGE_R1 = "unchanged.text_to_image.r1"
    SWAPPED_IMAGE_TO_TEXT_R1 = "swapped.image_to_text.r1"
    SWAPPED_TEXT_TO_IMAGE_R1 = "swapped.text_to_image.r1"
    DELETED_IMAGE_TO_TEXT_R1 = "deleted.image_to_text.r1"
    DELETED_TEXT_TO_IMAGE_R1 = "deleted.text_to_image.r1"
    CLASSIFICATION_TOP1 = "classification.top1"
    CLASSIFICATION_TOP5 = "classification.top5"

    @property
    def family(self) -> str:
        """The kind of text, such as "long" or "conditioned-long"; the change to long texts; or "classification"."""
        return self.partition(".")[0]

    @property
    def direction(self) -> str:
        """ "image_to_text", "text_to_image", or empty for classification and prefixes."""
        return self.rpartition(".")[0].partition(".")[2]

    @property
    def statistic(self) -> str:
        """The statistic, such as "r1", "median_rank", "top5" or "himo2"."""
        return self.rpartition(".")[2]

    @property
    def is_rank(self) -> bool:
        """Whether it is a rank from 1, where lower is better.

        All other scores are fractions from 0 to 1, except HiMo@4, a correlation.
        """
        return self.statistic.endswith("rank")


# The scores that tables and figures compare.
MAIN = {
    "long": (Metric.LONG_IMAGE_TO_TEXT_R1, Metric.LONG_TEXT_TO_IMAGE_R1),
    "short": (Metric.SHORT_IMAGE_TO_TEXT_R1, Metric.SHORT_TEXT_TO_IMAGE_R1),
    "classification": (Metric.CLASSIFICATION_TOP1,),
}
MAIN_METRICS = tuple(metric for metrics in MAIN.values() for metric in metrics)
SENTENCES = 4  # long texts with fewer sentences have no scores of `SENTENCE_METRICS`
COUNTED_TEXTS = f"long_texts_of_{SENTENCES}_sentences"  # key of their number in the protocol
# Long texts cut into growing prefixes, and with changed sentences; see `lotlip.evaluate.sentence_scores`.
SENTENCE_METRICS = tuple(m for m in Metric if m.family in ("prefixes", "unchanged", "swapped", "deleted"))
# Prefixes of the kind of text, for image features that the text pools (FLAIR): of all pairs, or of the best of the
# images' own features; see `lotlip.evaluate.conditioned`.
CONDITIONED, RERANKED = "conditioned-", "reranked-"
RECALLS = (*MAIN["long"], *MAIN["short"])  # R@1 on long and short text, both directions
