"""Captioners of the transformers library, with tiny models of random weights."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BertConfig, BertModel

from lotlip.caption.captioners import open_captioner
from lotlip.caption.captioners import transformers as mllm
from lotlip.caption.captioners.transformers import TransformersCaptioner
from lotlip.caption.config import PRESETS
from lotlip.caption.config import TransformersCaptionerConfig as Settings
from lotlip.core.compute import CaptionerCompute
from lotlip.data.images import decode_rgb
from lotlip.data.records import Caption, Failure, ImageRecord, NonRetryableError
from tests.tiny_mllm import IDS, image_record, save_instructblip, save_llava, save_llava_next

FAMILIES = {"llava": save_llava, "llava-next": save_llava_next, "instructblip": save_instructblip}
SHAPES = [(40, 30), (30, 75), (90, 25), (31, 31), (64, 64)]
RECORDS = [image_record(number, *SHAPES[number % len(SHAPES)]) for number in range(24)]
NEW_TOKENS = 16
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    mllm._loaded.cache_clear()


@pytest.fixture
def llava_copy(llava: Path, tmp_path: Path) -> Path:
    """A copy that tests may change."""
    return shutil.copytree(llava, tmp_path / "own")


def captioner(folder: Path, **changes: Any) -> TransformersCaptioner:
    compute = CaptionerCompute(**{key: changes.pop(key) for key in ("batch_size", "device") if key in changes})
    settings = {"kind": "transformers", "path": folder, "model": str(folder), "max_new_tokens": NEW_TOKENS, **changes}
    return TransformersCaptioner("tiny", Settings(**settings), lambda text: len(text.split()), compute)


def texts(items: Iterator[Caption | Failure]) -> list[str]:
    return [item.text if isinstance(item, Caption) else item.kind for item in items]


def caption_one_by_one(folder: Path, num_beams: int = 1) -> list[tuple[str, bool]]:
    """Captions from a plain loop over the images: the text, and whether the model ended it."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    prompt = "Describe the following image in detail."
    captions = []
    for record in RECORDS:
        text = prompt if folder.name == "instructblip" else f"USER: <image> {prompt} ASSISTANT:"
        inputs = processor(images=decode_rgb(record.image), text=text, return_tensors="pt")
        with torch.inference_mode():
            (tokens,) = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, num_beams=num_beams, do_sample=False, pad_token_id=IDS["<pad>"]
            )
        start = inputs["input_ids"].shape[1]
        assert tokens[:start].tolist() == inputs["input_ids"][0].tolist()
        text_generated = processor.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        captions.append((text_generated, IDS["</s>"] in tokens[start:]))
    return captions


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
def test_mixed_batches_give_the_captions_of_single_images(family, num_beams):
    expected = caption_one_by_one(family, num_beams)
    assert {ended for _, ended in expected} == {True, False}
    assert len({text for text, _ in expected}) > len(RECORDS) / 2
    for batch_size in (1, 8):
        author = captioner(family, batch_size=batch_size, num_beams=num_beams)
        captions = list(author.caption(RECORDS))
        assert all(isinstance(item, Caption) for item in captions)
        assert [item.key for item in captions] == [record.key for record in RECORDS]
        assert [(item.text, item.finish_reason == "stop") for item in captions] == expected
        assert {(item.captioner, item.prompt, item.revision) for item in captions} == {
            ("tiny", "Describe the following image in detail.", author.revision)
        }


def test_token_counts_and_sub_captions_match_the_text(llava):
    settings = Settings(kind="transformers", path=llava, model=str(llava), max_new_tokens=NEW_TOKENS)
    for item in open_captioner("llava", settings, "bert-base-uncased").caption(RECORDS[:4]):
        parts = [part.strip() for part in item.text.split(".")]
        assert item.sub_captions == [part for part in parts if part]
        # "ASSISTANT" and "USER" are tokens of both the tiny model and BERT
        assert item.tokens == len(item.text.split())


@pytest.mark.slow
def test_a_prompt_with_the_image_token_is_the_full_prompt(llava):
    full_prompt = "USER: <image> Describe the following image in detail. ASSISTANT:"
    assert texts(captioner(llava, prompt=full_prompt).caption(RECORDS)) == texts(captioner(llava).caption(RECORDS))
    other_prompt = "USER: <image> red tree ASSISTANT:"
    assert texts(captioner(llava, prompt=other_prompt).caption(RECORDS)) != texts(captioner(llava).caption(RECORDS))


@pytest.mark.slow
def test_broken_images_and_empty_texts_are_failures(llava_copy):
    broken = [replace(record, image=record.image[:40]) for record in RECORDS]
    mixed = [*broken[:2], RECORDS[2], broken[3], *RECORDS[4:7]]
    captions = list(captioner(llava_copy, batch_size=2).caption(mixed))
    assert [isinstance(item, Failure) for item in captions] == [True, True, False, True, False, False, False]
    assert [(item.key, item.where, item.kind) for item in captions[:2]] == [
        ("k0", "k0", "unreadable"),
        ("k1", "k1", "unreadable"),
    ]
    assert "not a readable image" in captions[3].reason

    settings = json.loads((llava_copy / "generation_config.json").read_text())
    settings["eos_token_id"] = list(IDS.values())  # any first token ends the text
    (llava_copy / "generation_config.json").write_text(json.dumps(settings))
    captions = list(captioner(llava_copy).caption(RECORDS[:3]))
    assert [(item.key, item.kind) for item in captions] == [(f"k{number}", "empty") for number in range(3)]
    assert all("no words" in item.reason for item in captions)


def test_no_images_get_no_captions(llava):
    assert list(captioner(llava).caption([])) == []


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sampling_depends_on_the_seed_and_the_key(llava):
    sampling = {"temperature": 1.0, "top_p": 0.9}
    captions = texts(captioner(llava, batch_size=8, **sampling).caption(RECORDS))
    assert captions == texts(captioner(llava, batch_size=5, **sampling).caption(RECORDS[::-1]))[::-1]
    assert captions != texts(captioner(llava, batch_size=8, seed=1, **sampling).caption(RECORDS))
    assert captions != texts(captioner(llava, batch_size=8).caption(RECORDS))
    same_image = [replace(RECORDS[0], key=f"other{number}") for number in range(4)]
    assert len(set(texts(captioner(llava, **sampling).caption(same_image)))) > 1


def test_samples_follow_the_distribution():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = 400
    chance = mllm._GumbelNoise(0, [str(number) for number in range(rows)])
    samples = torch.cat([chance(torch.empty(0), shares.log().expand(rows, -1)).argmax(-1) for _ in range(20)])
    frequencies = samples.bincount(minlength=5) / len(samples)
    assert torch.allclose(frequencies, shares, atol=0.02)
    assert frequencies[4] == 0


# --- batches and memory -----------------------------------------------------------------------------------------------


def test_a_process_loads_one_copy_at_first_use(llava):
    first, second = captioner(llava), captioner(llava, max_new_tokens=3, batch_size=2)
    assert first.about["revision"] == first.revision == second.revision
    assert mllm._loaded.cache_info().misses == 0
    list(first.caption(RECORDS[:2])), list(second.caption(RECORDS[:2]))
    assert (mllm._loaded.cache_info().misses, mllm._loaded.cache_info().hits) == (1, 1)


@pytest.mark.slow
def test_threads_do_not_change_the_captions(llava):
    author = captioner(llava, batch_size=3)
    parts = [RECORDS[:9], RECORDS[9:14], RECORDS[14:]]
    with ThreadPoolExecutor(3) as pool:
        captions = [item for part in pool.map(lambda part: list(author.caption(part)), parts) for item in part]
    assert mllm._loaded.cache_info().misses == 1
    assert captions == list(author.caption(RECORDS))


@pytest.mark.slow
def test_records_are_read_in_windows(llava):
    numbers = []

    def records() -> Iterator[ImageRecord]:
        for number in range(200):
            numbers.append(number)
            yield image_record(number % 5)

    items = captioner(llava, batch_size=1, max_new_tokens=1).caption(records())
    for _ in range(40):
        next(items)
    assert len(numbers) <= 40 + 2 * mllm._WINDOW
    items.close()


def test_cost_counts_image_tokens_and_pixels(tmp_path):
    model = mllm._load(captioner(save_llava_next(tmp_path / "next"))._settings, "for-this-test", "cpu")
    for record in RECORDS[: len(SHAPES)]:
        inputs = model.inputs([decode_rgb(record.image)], "detail")
        image_tokens, pixels = model.cost(record)
        assert image_tokens == (inputs["input_ids"] == IDS["<image>"]).sum()
        assert pixels == record.width * record.height
    mixed = model.inputs([decode_rgb(record.image) for record in RECORDS[:5]], "detail")
    assert (mixed["attention_mask"][:, 0] == 0).any()  # left padding
    assert (mixed["attention_mask"][:, -1] == 1).all()


class SmallGpu:
    """Limits the batch size of a model's `generate` like the memory of a GPU."""

    def __init__(self, author: TransformersCaptioner, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        mllm._loaded.cache_clear()
        model = mllm._load(author._settings, author.revision, author._compute.device)._model
        self._generate, self._room, self.sizes = model.generate, room, []
        monkeypatch.setattr(model, "generate", self.generate)

    def generate(self, **inputs: Any) -> Any:
        self.sizes.append(len(inputs["input_ids"]))
        if self.sizes[-1] > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._generate(**inputs)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(llava, monkeypatch, caplog):
    author = captioner(llava, batch_size=8)
    expected = texts(author.caption(RECORDS))
    gpu = SmallGpu(author, 3, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="lotlip"):
        assert texts(author.caption(RECORDS)) == expected
    assert gpu.sizes == [8, 4, *[2] * 12]  # a size that did not fit is not tried again
    assert [record.getMessage() for record in caplog.records] == [
        "tiny: 8 images do not fit into memory, using 4 from now on",
        "tiny: 4 images do not fit into memory, using 2 from now on",
    ]


def test_an_image_that_does_not_fit_alone_is_an_error(llava, monkeypatch):
    author = captioner(llava)
    SmallGpu(author, 0, monkeypatch)
    with pytest.raises(ValueError, match=r"image k\d+ does not fit .*captioners\.tiny"):
        list(author.caption(RECORDS[:3]))


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_have_the_configured_dtype(llava, dtype, loaded):
    author = captioner(llava, dtype=dtype)
    assert len(list(author.caption(RECORDS[:3]))) == 3
    assert mllm._load(author._settings, author.revision, author._compute.device)._model.dtype == loaded


# --- identity ---------------------------------------------------------------------------------------------------------


def test_about_holds_what_decides_a_text(llava):
    author = captioner(llava)
    about = author.about
    assert json.loads(json.dumps(about)) == about
    assert {"kind", "model", "prompt", "max_new_tokens", "num_beams", "temperature", "seed", "dtype"} <= set(about)
    assert about == captioner(llava, batch_size=3, device="cpu").about
    assert about != captioner(llava, repetition_penalty=1.2).about
    commit = "0123456789" * 4
    hub = captioner(Path("lotlip/caption/captioners/transformers.py"), model="me/llava", revision=commit)
    assert (hub.revision, hub.about["revision"], hub.about["model"]) == (commit, commit, "me/llava")


@pytest.mark.slow
def test_the_revision_of_a_folder_depends_on_its_files(llava, llava_copy):
    before = captioner(llava_copy).revision
    assert before == captioner(llava).revision
    assert before.startswith("sha256:")
    (llava_copy / "chat_template.jinja").write_text("{{ '<image>' }}")
    after = captioner(llava_copy)
    assert after.revision != before
    assert texts(after.caption(RECORDS)) != texts(captioner(llava).caption(RECORDS))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_an_error_at_once(tmp_path, llava_copy):
    with pytest.raises(ValueError, match=r"nowhere has no model: .*captioners\.tiny"):
        captioner(tmp_path / "nowhere")
    (llava_copy / "model.safetensors").rename(llava_copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"it lacks config\.json or weights \(\*\.safetensors\)"):
        captioner(llava_copy)


def test_a_folder_with_an_adapter_is_an_error(llava_copy):
    (llava_copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(NonRetryableError, match=r"has an adapter .* merge it into its model first"):
        list(captioner(llava_copy).caption(RECORDS[:1]))


def test_a_folder_is_not_confused_with_a_hub_model(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llava, tmp_path / "me" / "llava")
    with pytest.raises(ValueError, match=r"model me/llava is also a local folder.*set path to it"):
        captioner(Path("mllm.py"), model="me/llava", revision="0123456789" * 4)


@pytest.mark.slow
def test_a_model_without_vision_is_an_error(llava_copy):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, **shape)).save_pretrained(llava_copy)
    with pytest.raises(ValueError, match=r"cannot be loaded; it must be an image-text-to-text model .*BertConfig"):
        list(captioner(llava_copy).caption(RECORDS[:1]))


def test_code_in_the_folder_is_not_run(llava_copy, tmp_path):
    settings = json.loads((llava_copy / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.M"}}
    (llava_copy / "config.json").write_text(json.dumps(settings))
    (llava_copy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        list(captioner(llava_copy).caption(RECORDS[:1]))
    assert not (tmp_path / "ran").exists()


def test_a_processor_without_a_patch_size_is_an_error(llava_copy):
    settings = json.loads((llava_copy / "processor_config.json").read_text())
    del settings["patch_size"]
    (llava_copy / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no patch_size"):
        list(captioner(llava_copy).caption(RECORDS[:1]))


def test_a_missing_gpu_is_an_error(llava):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch finds no GPU for the device cuda:0"):
        list(captioner(llava, device="cuda:0").caption(RECORDS[:1]))


def test_a_model_without_an_end_token_is_an_error():
    silent = SimpleNamespace(eos_token_id=None)
    config = SimpleNamespace(get_text_config=lambda decoder: silent)
    model = SimpleNamespace(generation_config=silent, config=config, name_or_path="tiny")
    with pytest.raises(ValueError, match="tiny has no end-of-text token"):
        mllm._end_tokens(model, silent)
    assert mllm._end_tokens(model, SimpleNamespace(eos_token_id=7)) == [7]


# --- ShareGPT4V -------------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_the_documented_conversion_of_sharegpt4v_keeps_the_weights(llava, tmp_path):
    """A tiny LLaVA is saved in the layout of ShareGPT4V's repositories and converted back."""
    original = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.bfloat16)
    language, vision = tmp_path / "language", tmp_path / "vision"
    parts = original.model
    parts.vision_tower.save_pretrained(vision)
    words = IDS["<image>"]  # the image token is the last
    weights = {f"model.{name}": weight for name, weight in parts.language_model.state_dict().items()}
    weights |= {"lm_head.weight": original.lm_head.weight[:words].clone()}
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:words].clone()
    for old, new in ((0, parts.multi_modal_projector.linear_1), (2, parts.multi_modal_projector.linear_2)):
        weights |= {f"model.mm_projector.{old}.{name}": weight for name, weight in new.state_dict().items()}
    AutoProcessor.from_pretrained(llava).tokenizer.save_pretrained(language)
    settings = original.config.text_config.to_dict() | {"model_type": "share4v", "vocab_size": words}
    (language / "config.json").write_text(json.dumps(settings))
    torch.save(weights, language / "pytorch_model-00001-of-00001.bin")

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "captioning.md").read_text(), re.DOTALL)
    (tmp_path / "convert.py").write_text(code)
    out = tmp_path / "converted"
    subprocess.run([sys.executable, tmp_path / "convert.py", language, vision, out], check=True)

    converted = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.bfloat16)
    before, after = original.state_dict(), converted.state_dict()
    assert before.keys() == after.keys()
    rows = {"lm_head.weight", "model.language_model.embed_tokens.weight"}  # the row of the image token is new
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - rows)
    assert all(torch.equal(before[name][:words], after[name][:words]) for name in rows)
    author = captioner(out, prompt=PRESETS["sharegpt4v-13b"]["prompt"])
    assert all(isinstance(item, Caption) for item in author.caption(RECORDS[:5]))
