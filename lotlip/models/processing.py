"""The processor for texts and images, in the form that transformers expects. It works exactly as training does."""

from __future__ import annotations

from transformers import (
    AutoProcessor,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from lotlip.core.temporary import temporary_folder
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.image_processing import LotlipImageProcessor
from lotlip.models.vision.spec import ImageTowerSpec


class LotlipProcessor(ProcessorMixin):
    """`processor(text=…, images=…, return_tensors="pt")` returns the inputs of `LotlipModel`.

    By default, texts are padded to the longest and truncated at the context length.
    """

    text_kwargs = {"padding": True, "truncation": True}  # noqa: RUF012 (transformers' own type)

    def __init__(
        self, image_processor: BaseImageProcessor | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer)

    @classmethod
    def build(cls, tokenizer: TextTokenizer, config: LotlipConfig) -> LotlipProcessor:
        """Builds the processor of a model.

        Args:
            tokenizer: the model's tokenizer.
            config: the model's configuration; its `image_config` defines how images are prepared.
        """
        with temporary_folder("tokenizer") as folder:
            tokenizer.save(folder)
            fast_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        return cls(LotlipImageProcessor.of(ImageTowerSpec.from_json(config.image_config)), fast_tokenizer)


AutoProcessor.register(LotlipConfig, LotlipProcessor, exist_ok=True)
