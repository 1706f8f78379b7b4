"""Texts and pictures to what the model takes, as transformers' processors do; exactly as in training."""

from __future__ import annotations

from transformers import (
    AutoProcessor,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from lotlip.core.temporary import temporary_folder
from lotlip.data.images import MEAN, STD
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.image_processing import LotlipImageProcessor


class LotlipProcessor(ProcessorMixin):
    """`processor(text=…, images=…, return_tensors="pt")` gives what `LotlipModel` takes.

    Texts are padded to the longest and cut at the context length unless it is told otherwise.
    """

    text_kwargs = {"padding": True, "truncation": True}  # noqa: RUF012 (transformers' own type)

    def __init__(
        self, image_processor: BaseImageProcessor | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer)

    @classmethod
    def build(cls, tokenizer: TextTokenizer, config: LotlipConfig) -> LotlipProcessor:
        """The processor of a model.

        Args:
            tokenizer: of the model.
            config: its image tower says how pictures are prepared.
        """
        image = config.image_config  # an ImageTowerSpec would import timm, which takes 2 s
        with temporary_folder("tokenizer") as folder:
            tokenizer.save(folder)
            of_text = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        of_images = LotlipImageProcessor(
            image["image_size"], image.get("mean", MEAN), image.get("std", STD), image.get("resize", "crop")
        )
        return cls(of_images, of_text)


AutoProcessor.register(LotlipConfig, LotlipProcessor, exist_ok=True)
