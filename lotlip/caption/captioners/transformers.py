"""Captions, or rewrites of captions, by models of the transformers library, in batches of similar cost."""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotlip.caption.captioners.rewriting import question, rewrite_in
from lotlip.caption.config import TransformersCaptionerConfig, TransformersRewriterConfig, is_rewriter
from lotlip.caption.reasoning import cut_reasoning, has_marker, is_marker
from lotlip.core.compute import CAPTIONER_DEFAULTS, CaptionerCompute
from lotlip.core.files import sha256_tree
from lotlip.data.batches import in_batches, prefetch
from lotlip.data.images import decode_rgb
from lotlip.data.records import Caption, Failure, ImageRecord, NonRetryableError
from lotlip.data.text import has_words, split_sub_captions
from lotlip.data.weights import check_weights

if TYPE_CHECKING:
    import torch

_WINDOW = 16  # batches of encoded images that are sorted by cost together
_PREFETCH = 2  # batches that threads decode and prepare while the model generates

log = logging.getLogger(__name__)


class TransformersCaptioner:
    """Captions images with a model.

    Opening a captioner loads nothing. The model is loaded at the first caption, once per process, and is shared by all
    captioners; threads take turns using it.

    Attributes:
        revision: the commit on the hub, or the hash of the files in the model's folder.
        prompt: the question.

    Raises:
        ValueError: the model's folder does not exist or has no model, or a local folder has the name of a hub model.
    """

    def __init__(
        self,
        name: str,
        settings: TransformersCaptionerConfig | TransformersRewriterConfig,
        count_tokens: Callable[[str], int],
        compute: CaptionerCompute = CAPTIONER_DEFAULTS,
    ) -> None:
        self._compute = compute
        self._name = name
        self._settings = settings
        self._count_tokens = count_tokens
        self.prompt = settings.prompt
        if settings.in_a_folder:
            if not (settings.path / "config.json").is_file() or not any(settings.path.glob("*.safetensors")):
                raise ValueError(
                    f"{settings.path} has no model: it lacks config.json or weights (*.safetensors); set model and "
                    f"path of caption.captioners.{name} to a folder that has them, or model to a name on the hub"
                )
        elif Path(settings.model).exists():  # transformers would read the folder, whatever the revision is
            raise ValueError(
                f"caption.captioners.{name}.model {settings.model} is also a local folder; set path to it to use it, "
                "or move it to use the hub's model"
            )

    @cached_property
    def revision(self) -> str:
        """The commit on the hub, or the hash of the files in the model's folder."""
        return self._settings.revision or "sha256:" + sha256_tree(self._settings.path)[:12]

    @cached_property
    def about(self) -> dict[str, Any]:
        """Everything besides the image that decides a caption, up to rounding, as JSON."""
        return {**self._settings.model_dump(mode="json", exclude={"path", "preset"}), "revision": self.revision}

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """A caption or failure for each image, in order; a caption does not depend on the other images.

        Some batches of encoded images are in memory at a time, and a few decoded ones.

        Raises:
            NonRetryableError: the model cannot be loaded, or the GPU's memory is too small for a single image.
        """
        mllm = _load(self._settings, self.revision, self._compute.device)
        for batch in prefetch(partial(self._prepare, mllm), self._batches(mllm, records), _PREFETCH):
            window = batch.window
            window.items |= batch.failures
            window.items |= self._captions(mllm, batch)
            if len(window.items) == len(window.records):
                yield from (window.items[place] for place in range(len(window.records)))

    def _batches(self, mllm: _Mllm, records: Iterable[ImageRecord]) -> Iterator[tuple[_Window, list[int]]]:
        """Windows, with indices of images of similar cost in them."""
        size = self._compute.batch_size
        for window_records in in_batches(records, size * _WINDOW):
            window = _Window(window_records)
            # Most expensive first, so that running out of memory shows at once.
            order = sorted(range(len(window.records)), key=lambda place: mllm.cost(window.records[place]), reverse=True)
            for places in in_batches(order, size):
                yield window, places

    def _prepare(self, mllm: _Mllm, work: tuple[_Window, list[int]]) -> _Batch:
        """Decodes a batch and prepares the model's inputs; runs in a thread."""
        window, places = work
        batch = _Batch(window)
        for place in places:
            record = window.records[place]
            try:
                image = self._shown(record)
            except ValueError as error:
                batch.failures[place] = Failure(record.key, record.key, str(error), "unreadable")
            else:
                batch.places.append(place)
                batch.images.append(image)
        if batch.images:
            batch.inputs = mllm.inputs(batch.images, self.prompt)
        return batch

    def _captions(self, mllm: _Mllm, batch: _Batch) -> dict[int, Caption | Failure]:
        """The batch's captions by their indices in the window."""
        records = [batch.window.records[place] for place in batch.places]
        answers = self._answers(mllm, batch.images, [record.key for record in records], batch.inputs)
        return {
            place: self._caption(record, answer)
            for place, record, answer in zip(batch.places, records, answers, strict=True)
        }

    def _answers(self, mllm: _Mllm, images: Sequence[Any], keys: Sequence[str], inputs: Any = None) -> list[_Answer]:
        """The model's answers, in as many batches as the GPU's memory requires."""
        import torch

        if not images:
            return []
        if len(images) <= mllm.fits:
            try:
                return mllm.answers(inputs or mllm.inputs(images, self.prompt), keys, self._settings)
            except torch.OutOfMemoryError as error:
                if len(images) == 1:
                    raise NonRetryableError(
                        f"image {keys[0]} does not fit into the GPU's memory with {self._settings.model}; lower "
                        f"max_new_tokens or num_beams of caption.captioners.{self._name}, or provide more GPUs"
                    ) from error
                mllm.fits = min(mllm.fits, len(images) // 2)
            # outside the handler: the error's traceback keeps references to what filled the memory
            torch.cuda.empty_cache()
            log.warning(
                "%s: %d images do not fit into memory, using %d from now on", self._name, len(images), mllm.fits
            )
        step = mllm.fits  # may become smaller while the parts are captioned
        parts = [slice(start, start + step) for start in range(0, len(images), step)]
        return [answer for part in parts for answer in self._answers(mllm, images[part], keys[part])]

    def _shown(self, record: ImageRecord) -> Any:
        """What the model is given besides the prompt.

        Raises:
            ValueError: the image cannot be decoded.
        """
        return decode_rgb(record.image)

    def _caption(self, record: ImageRecord, answer: _Answer) -> Caption | Failure:
        sub_captions = split_sub_captions(answer.text)
        if not has_words(answer.text):
            wrote = "only reasoning" if answer.reasoned else "no words"
            reason = f"{self._name} wrote {wrote} (finish reason {answer.finish_reason})"
            return Failure(record.key, record.key, reason, "empty")
        return Caption(
            key=record.key,
            captioner=self._name,
            text=answer.text,
            sub_captions=sub_captions,
            tokens=self._count_tokens(answer.text),
            finish_reason=answer.finish_reason,
            revision=self.revision,
            prompt=self.prompt,
        )


class TransformersRewriter(TransformersCaptioner):
    """Rewords short captions with a text-only model, which is given no image (LaCLIP, arXiv 2305.20088)."""

    def _shown(self, record: ImageRecord) -> str:
        return record.short_caption

    def _caption(self, record: ImageRecord, answer: _Answer) -> Caption | Failure:
        return super()._caption(record, replace(answer, text=rewrite_in(answer.text)))


@dataclass
class _Window:
    """Records that are sorted together, and their captions or failures by index."""

    records: list[ImageRecord]
    items: dict[int, Caption | Failure] = field(default_factory=dict)


@dataclass
class _Batch:
    """Some decoded images of a window with the model's inputs, and the failures of those that cannot be decoded."""

    window: _Window
    places: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    inputs: Any = None
    failures: dict[int, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class _Answer:
    text: str  # without reasoning
    finish_reason: str
    reasoned: bool


# --- the model --------------------------------------------------------------------------------------------------------


class _Mllm:
    """A loaded model with its processor.

    Attributes:
        expected: what the model must be, for messages.
        fits: batch size that is not yet known to exceed the GPU's memory.
    """

    expected = "an image-text-to-text model"

    def __init__(self, model: Any, processor: Any) -> None:
        self.fits = sys.maxsize
        self._model, self._processor = model, processor
        self._generating, self._processing = threading.Lock(), threading.Lock()
        tokenizer = self._tokenizer = getattr(processor, "tokenizer", processor)
        # Generation is told where to stop, so that end tokens are known here too.
        self._end_tokens = _end_tokens(model, tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self._end_tokens[0])
        if not model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # generation continues from the prompt's last token

    def cost(self, record: ImageRecord) -> tuple[int, int]:
        """The cost of an image: its prompt tokens, if the processor can tell them from its size, and its pixels."""
        tokens = getattr(self._processor, "_get_num_multimodal_tokens", None)  # as inference servers use it
        size = (record.height, record.width)
        return tokens(image_sizes=[size]).num_image_tokens[0] if tokens else 0, record.width * record.height

    def inputs(self, images: Sequence[Any], prompt: str) -> Any:
        """The model's inputs: padded token ids, their mask, pixels and whatever else the processor returns."""
        image_token = str(getattr(self._processor, "image_token", ""))
        complete = bool(image_token) and image_token in prompt
        with self._processing:  # tokenizers are not thread-safe when they pad
            if complete or not getattr(self._processor, "chat_template", None):
                return self._processor(
                    images=list(images), text=[prompt] * len(images), padding=True, return_tensors="pt"
                )
            question = {"type": "text", "text": prompt}
            return self._processor.apply_chat_template(
                [[{"role": "user", "content": [{"type": "image", "image": image}, question]}] for image in images],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )

    @staticmethod
    def classes(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
        """The classes of transformers that load the model and its processor; `options` are of `from_pretrained`."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        return AutoModelForImageTextToText, AutoProcessor

    def answers(
        self, inputs: Any, keys: Sequence[str], settings: TransformersCaptionerConfig | TransformersRewriterConfig
    ) -> list[_Answer]:
        """Generates an answer to each prompt.

        Raises:
            torch.OutOfMemoryError: the batch does not fit into the GPU's memory.
        """
        import torch

        with self._generating, torch.inference_mode():
            device, dtype = self._model.device, self._model.dtype
            model_inputs = {
                name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                for name, value in inputs.items()
            }
            written = self._model.generate(
                **model_inputs,
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
                length_penalty=settings.length_penalty,
                repetition_penalty=settings.repetition_penalty,
                do_sample=False,  # sampling is done by `_GumbelNoise`
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=_logits_processors(settings, keys),
                eos_token_id=self._end_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            ).cpu()
        prompt = inputs["input_ids"]
        if self._model.config.is_encoder_decoder:
            written = written[:, 1:]  # the decoder's start token, which may be the end token too
        elif torch.equal(written[:, : prompt.shape[1]], prompt):  # most models, but not all, return the prompt too
            written = written[:, prompt.shape[1] :]
        return [self._answer(row) for row in written.tolist()]

    def _answer(self, tokens: list[int]) -> _Answer:
        end = next((place for place, token in enumerate(tokens) if token in self._end_tokens), None)
        tokenizer = self._tokenizer
        written = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if not has_marker(written):  # markers may be special tokens, which decoding skips
            special = {
                index
                for index, token in tokenizer.added_tokens_decoder.items()
                if token.special and not is_marker(token.content)
            }
            whole = tokenizer.decode([token for token in tokens[:end] if token not in special])
            written = whole if has_marker(whole) else written
        return _Answer(cut_reasoning(written), "length" if end is None else "stop", reasoned=has_marker(written))


class _TextModel(_Mllm):
    """A loaded model that reads text only, with its tokenizer."""

    expected = "a text-generation or text-to-text model"

    def cost(self, record: ImageRecord) -> tuple[int, int]:
        """The length of the short caption in characters."""
        return len(record.short_caption), 0

    def inputs(self, images: Sequence[Any], prompt: str) -> Any:
        """The model's inputs: padded token ids and their mask; `images` are the short captions."""
        questions = [question(prompt, caption) for caption in images]
        with self._processing:  # tokenizers are not thread-safe when they pad
            if not getattr(self._tokenizer, "chat_template", None):
                return self._tokenizer(questions, padding=True, return_tensors="pt", return_token_type_ids=False)
            return self._tokenizer.apply_chat_template(
                [[{"role": "user", "content": text}] for text in questions],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            )

    @staticmethod
    def classes(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM), AutoTokenizer


_loading = threading.Lock()


def _load(settings: TransformersCaptionerConfig | TransformersRewriterConfig, revision: str, device: str) -> _Mllm:
    """The model that the settings name; the process has only one copy."""
    kind = _TextModel if is_rewriter(settings) else _Mllm
    with _loading:
        return _loaded(settings.model, revision, settings.in_a_folder, settings.dtype, device, kind)


@lru_cache(maxsize=1)
def _loaded(source: str, revision: str, in_a_folder: bool, dtype: str, device: str, kind: Any) -> _Mllm:
    import torch

    gpu = torch.cuda.is_available() and device != "cpu"
    if device.startswith("cuda") and not gpu:
        raise NonRetryableError(f"torch finds no GPU for the device {device}; set it to auto or cpu")
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    options: dict[str, Any] = {} if in_a_folder else {"revision": revision}
    try:
        if in_a_folder:
            check_weights(Path(source))
        model_class, processor_class = kind.classes(source, options)
        # never run code that comes with a model; weights in other formats are pickles, which may contain code
        processor = processor_class.from_pretrained(source, trust_remote_code=False, **options)
        model: Any = model_class.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            device_map=device if gpu else None,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise NonRetryableError(
            f"model {source} ({revision}) cannot be loaded; it must be {kind.expected} of transformers, "
            f"with safetensors weights and no custom code: {reason}"
        ) from error
    for name in ("patch_size", "num_query_tokens"):
        if getattr(processor, name, 0) is None:
            raise NonRetryableError(
                f"the processor of {source} ({revision}) has no {name}, because an old version of transformers saved "
                "it; use a later revision, or save it again with the value in the model's config.json"
            )
    return kind(model.eval(), processor)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end a text."""
    configurations = (model.generation_config, model.config.get_text_config(decoder=True), tokenizer)
    ids = next((ids for config in configurations if (ids := config.eos_token_id) is not None), None)
    if ids is None:
        raise NonRetryableError(f"{model.name_or_path} has no end-of-text token; add it to generation_config.json")
    return [ids] if isinstance(ids, int) else list(ids)


# --- sampling ---------------------------------------------------------------------------------------------------------


def _logits_processors(
    settings: TransformersCaptionerConfig | TransformersRewriterConfig, keys: Sequence[str]
) -> list[Any]:
    """The processors that turn greedy decoding into sampling; none at temperature 0."""
    if not settings.temperature:
        return []
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList([*steps, _GumbelNoise(settings.seed, keys)])


class _GumbelNoise:
    """Adds Gumbel noise to log-probabilities, so that their maximum is a sample from their distribution.

    Each image has its own random numbers, derived from its key and the seed, so its caption does not depend on the rest
    of the batch or on earlier batches.
    """

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self._seeds = [_hash(f"{seed}/{key}") for key in keys]
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with noise."""
        import torch

        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
