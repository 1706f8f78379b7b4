"""Captioners of the transformers library: tiny models with random weights, asked as the large ones are."""

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
from lotlip.data.records import Caption, Failure, ImageRecord
from tests.tiny_mllm import IDS, picture, save_instructblip, save_llava, save_llava_next

FAMILIES = {"llava": save_llava, "llava-next": save_llava_next, "instructblip": save_instructblip}
SHAPES = [(40, 30), (30, 75), (90, 25), (31, 31), (64, 64)]
RECORDS = [picture(number, *SHAPES[number % len(SHAPES)]) for number in range(24)]
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
def own_llava(llava: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(llava, tmp_path / "own")


def captioner(folder: Path, **changes: Any) -> TransformersCaptioner:
    compute = CaptionerCompute(**{key: changes.pop(key) for key in ("batch_size", "device") if key in changes})
    settings = {"kind": "transformers", "path": folder, "model": str(folder), "max_new_tokens": NEW_TOKENS, **changes}
    return TransformersCaptioner("tiny", Settings(**settings), lambda text: len(text.split()), compute)


def texts(items: Iterator[Caption | Failure]) -> list[str]:
    return [item.text if isinstance(item, Caption) else item.kind for item in items]


def one_by_one(folder: Path, num_beams: int = 1) -> list[tuple[str, bool]]:
    """What a plain loop over the images gives: the text, and whether it was ended by the model."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    prompt = "Describe the following image in detail."
    found = []
    for record in RECORDS:
        text = prompt if folder.name == "instructblip" else f"USER: <image> {prompt} ASSISTANT:"
        inputs = processor(images=decode_rgb(record.image), text=text, return_tensors="pt")
        with torch.inference_mode():
            (tokens,) = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, num_beams=num_beams, do_sample=False, pad_token_id=IDS["<pad>"]
            )
        start = inputs["input_ids"].shape[1]
        assert tokens[:start].tolist() == inputs["input_ids"][0].tolist()
        written = processor.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        found.append((written, IDS["</s>"] in tokens[start:]))
    return found


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_of_mixed_sizes_get_what_single_images_get(family, num_beams):
    expected = one_by_one(family, num_beams)
    assert {ended for _, ended in expected} == {True, False}
    assert len({text for text, _ in expected}) > len(RECORDS) / 2
    for batch_size in (1, 8):
        author = captioner(family, batch_size=batch_size, num_beams=num_beams)
        found = list(author.caption(RECORDS))
        assert all(isinstance(item, Caption) for item in found)
        assert [item.key for item in found] == [record.key for record in RECORDS]
        assert [(item.text, item.finish_reason == "stop") for item in found] == expected
        assert {(item.captioner, item.prompt, item.revision) for item in found} == {
            ("tiny", "Describe the following image in detail.", author.revision)
        }


def test_word_pieces_and_sub_captions_are_those_of_the_text(llava):
    settings = Settings(kind="transformers", path=llava, model=str(llava), max_new_tokens=NEW_TOKENS)
    for item in open_captioner("llava", settings, "bert-base-uncased").caption(RECORDS[:4]):
        parts = [part.strip() for part in item.text.split(".")]
        assert item.sub_captions == [part for part in parts if part]
        # "ASSISTANT" and "USER" are words of the tiny model and of BERT alike
        assert item.tokens == len(item.text.split())


def test_a_prompt_with_the_image_token_is_all_that_the_model_is_told(llava):
    whole = "USER: <image> Describe the following image in detail. ASSISTANT:"
    assert texts(captioner(llava, prompt=whole).caption(RECORDS)) == texts(captioner(llava).caption(RECORDS))
    other = "USER: <image> red tree ASSISTANT:"
    assert texts(captioner(llava, prompt=other).caption(RECORDS)) != texts(captioner(llava).caption(RECORDS))


def test_broken_images_and_empty_texts_are_failures_in_their_places(own_llava):
    broken = [replace(record, image=record.image[:40]) for record in RECORDS]
    mixed = [*broken[:2], RECORDS[2], broken[3], *RECORDS[4:7]]
    found = list(captioner(own_llava, batch_size=2).caption(mixed))
    assert [isinstance(item, Failure) for item in found] == [True, True, False, True, False, False, False]
    assert [(item.key, item.where, item.kind) for item in found[:2]] == [
        ("k0", "k0", "unreadable"),
        ("k1", "k1", "unreadable"),
    ]
    assert "not a readable image" in found[3].reason

    settings = json.loads((own_llava / "generation_config.json").read_text())
    settings["eos_token_id"] = list(IDS.values())  # whatever it writes first ends the text
    (own_llava / "generation_config.json").write_text(json.dumps(settings))
    found = list(captioner(own_llava).caption(RECORDS[:3]))
    assert [(item.key, item.kind) for item in found] == [(f"k{number}", "empty") for number in range(3)]
    assert all("no words" in item.reason for item in found)


def test_no_images_get_no_captions(llava):
    assert list(captioner(llava).caption([])) == []


# --- chance -----------------------------------------------------------------------------------------------------------


def test_what_is_drawn_depends_on_the_seed_and_the_key_alone(llava):
    drawn = {"temperature": 1.0, "top_p": 0.9}
    found = texts(captioner(llava, batch_size=8, **drawn).caption(RECORDS))
    assert found == texts(captioner(llava, batch_size=5, **drawn).caption(RECORDS[::-1]))[::-1]
    assert found != texts(captioner(llava, batch_size=8, seed=1, **drawn).caption(RECORDS))
    assert found != texts(captioner(llava, batch_size=8).caption(RECORDS))
    same_image = [replace(RECORDS[0], key=f"other{number}") for number in range(4)]
    assert len(set(texts(captioner(llava, **drawn).caption(same_image)))) > 1


def test_draws_follow_the_distribution():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = 400
    chance = mllm._GumbelNoise(0, [str(number) for number in range(rows)])
    drawn = torch.cat([chance(torch.empty(0), shares.log().expand(rows, -1)).argmax(-1) for _ in range(20)])
    counted = drawn.bincount(minlength=5) / len(drawn)
    assert torch.allclose(counted, shares, atol=0.02)
    assert counted[4] == 0


# --- how the work is done ---------------------------------------------------------------------------------------------


def test_opening_loads_nothing_and_a_process_has_one_copy(llava):
    first, second = captioner(llava), captioner(llava, max_new_tokens=3, batch_size=2)
    assert first.about["revision"] == first.revision == second.revision
    assert mllm._loaded.cache_info().misses == 0
    list(first.caption(RECORDS[:2])), list(second.caption(RECORDS[:2]))
    assert (mllm._loaded.cache_info().misses, mllm._loaded.cache_info().hits) == (1, 1)


def test_threads_get_what_one_alone_gets(llava):
    author = captioner(llava, batch_size=3)
    parts = [RECORDS[:9], RECORDS[9:14], RECORDS[14:]]
    with ThreadPoolExecutor(3) as pool:
        found = [item for part in pool.map(lambda part: list(author.caption(part)), parts) for item in part]
    assert mllm._loaded.cache_info().misses == 1
    assert found == list(author.caption(RECORDS))


def test_records_are_read_a_window_at_a_time(llava):
    read = []

    def records() -> Iterator[ImageRecord]:
        for number in range(200):
            read.append(number)
            yield picture(number % 5)

    items = captioner(llava, batch_size=1, max_new_tokens=1).caption(records())
    for _ in range(40):
        next(items)
    assert len(read) <= 40 + 2 * mllm._WINDOW
    items.close()


def test_images_of_like_cost_are_together(tmp_path):
    model = mllm._load(captioner(save_llava_next(tmp_path / "next"))._settings, "for-this-test", "cpu")
    for record in RECORDS[: len(SHAPES)]:
        inputs = model.inputs([decode_rgb(record.image)], "detail")
        image_tokens, pixels = model.cost(record)
        assert image_tokens == (inputs["input_ids"] == IDS["<image>"]).sum()
        assert pixels == record.width * record.height
    mixed = model.inputs([decode_rgb(record.image) for record in RECORDS[:5]], "detail")
    assert (mixed["attention_mask"][:, 0] == 0).any()  # padded on the left
    assert (mixed["attention_mask"][:, -1] == 1).all()


class SmallGpu:
    """Lets a model write for so many images at a time, as a GPU's memory would."""

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


def test_a_batch_that_does_not_fit_is_halved(llava, monkeypatch, caplog):
    author = captioner(llava, batch_size=8)
    expected = texts(author.caption(RECORDS))
    gpu = SmallGpu(author, 3, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="lotlip"):
        assert texts(author.caption(RECORDS)) == expected
    assert gpu.sizes == [8, 4, *[2] * 12]  # what did not fit once is not tried again
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
def test_weights_are_of_the_dtype_that_is_set(llava, dtype, loaded):
    author = captioner(llava, dtype=dtype)
    assert len(list(author.caption(RECORDS[:3]))) == 3
    assert mllm._load(author._settings, author.revision, author._compute.device)._model.dtype == loaded


# --- who it is --------------------------------------------------------------------------------------------------------


def test_about_is_what_decides_a_text(llava):
    author = captioner(llava)
    about = author.about
    assert json.loads(json.dumps(about)) == about
    assert {"kind", "model", "prompt", "max_new_tokens", "num_beams", "temperature", "seed", "dtype"} <= set(about)
    assert about == captioner(llava, batch_size=3, device="cpu").about
    assert about != captioner(llava, repetition_penalty=1.2).about
    commit = "0123456789" * 4
    hub = captioner(Path("lotlip/caption/captioners/transformers.py"), model="me/llava", revision=commit)
    assert (hub.revision, hub.about["revision"], hub.about["model"]) == (commit, commit, "me/llava")


def test_a_folder_s_revision_follows_its_files(llava, own_llava):
    before = captioner(own_llava).revision
    assert before == captioner(llava).revision
    assert before.startswith("sha256:")
    (own_llava / "chat_template.jinja").write_text("{{ '<image>' }}")
    after = captioner(own_llava)
    assert after.revision != before
    assert texts(after.caption(RECORDS)) != texts(captioner(llava).caption(RECORDS))


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_refused_at_once(tmp_path, own_llava):
    with pytest.raises(ValueError, match=r"nowhere has no model: .*captioners\.tiny"):
        captioner(tmp_path / "nowhere")
    (own_llava / "model.safetensors").rename(own_llava / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"it lacks config\.json or weights \(\*\.safetensors\)"):
        captioner(own_llava)


def test_a_folder_is_not_taken_for_the_hub_s(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llava, tmp_path / "me" / "llava")
    with pytest.raises(ValueError, match=r"model me/llava is also a local folder.*set path to it"):
        captioner(Path("mllm.py"), model="me/llava", revision="0123456789" * 4)


def test_a_model_that_sees_nothing_is_refused(own_llava):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, **shape)).save_pretrained(own_llava)
    with pytest.raises(ValueError, match=r"cannot be loaded; it must be an image-text-to-text model .*BertConfig"):
        list(captioner(own_llava).caption(RECORDS[:1]))


def test_code_in_the_folder_is_never_run(own_llava, tmp_path):
    settings = json.loads((own_llava / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.M"}}
    (own_llava / "config.json").write_text(json.dumps(settings))
    (own_llava / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        list(captioner(own_llava).caption(RECORDS[:1]))
    assert not (tmp_path / "ran").exists()


def test_a_processor_that_lacks_its_patch_size_is_named(own_llava):
    settings = json.loads((own_llava / "processor_config.json").read_text())
    del settings["patch_size"]
    (own_llava / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no patch_size"):
        list(captioner(own_llava).caption(RECORDS[:1]))


def test_a_missing_gpu_is_an_error(llava):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch finds no GPU for the device cuda:0"):
        list(captioner(llava, device="cuda:0").caption(RECORDS[:1]))


def test_a_model_that_does_not_say_how_a_text_ends_is_named():
    silent = SimpleNamespace(eos_token_id=None)
    config = SimpleNamespace(get_text_config=lambda decoder: silent)
    model = SimpleNamespace(generation_config=silent, config=config, name_or_path="tiny")
    with pytest.raises(ValueError, match="tiny has no end-of-text token"):
        mllm._end_tokens(model, silent)
    assert mllm._end_tokens(model, SimpleNamespace(eos_token_id=7)) == [7]


# --- the paper's third ------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_the_documented_conversion_of_sharegpt4v_writes_what_the_original_has(llava, tmp_path):
    """A tiny LLaVA is taken apart into the layout of ShareGPT4V's repositories, and put together again."""
    whole = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.bfloat16)
    language, vision = tmp_path / "language", tmp_path / "vision"
    parts = whole.model
    parts.vision_tower.save_pretrained(vision)
    words = IDS["<image>"]  # the image's token is the last
    weights = {f"model.{name}": weight for name, weight in parts.language_model.state_dict().items()}
    weights |= {"lm_head.weight": whole.lm_head.weight[:words].clone()}
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:words].clone()
    for old, new in ((0, parts.multi_modal_projector.linear_1), (2, parts.multi_modal_projector.linear_2)):
        weights |= {f"model.mm_projector.{old}.{name}": weight for name, weight in new.state_dict().items()}
    AutoProcessor.from_pretrained(llava).tokenizer.save_pretrained(language)
    settings = whole.config.text_config.to_dict() | {"model_type": "share4v", "vocab_size": words}
    (language / "config.json").write_text(json.dumps(settings))
    torch.save(weights, language / "pytorch_model-00001-of-00001.bin")

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "captioning.md").read_text(), re.DOTALL)
    (tmp_path / "convert.py").write_text(code)
    out = tmp_path / "converted"
    subprocess.run([sys.executable, tmp_path / "convert.py", language, vision, out], check=True)

    converted = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.bfloat16)
    before, after = whole.state_dict(), converted.state_dict()
    assert before.keys() == after.keys()
    rows = {"lm_head.weight", "model.language_model.embed_tokens.weight"}  # the image's own are new
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - rows)
    assert all(torch.equal(before[name][:words], after[name][:words]) for name in rows)
    author = captioner(out, prompt=PRESETS["sharegpt4v-13b"]["prompt"])
    assert all(isinstance(item, Caption) for item in author.caption(RECORDS[:5]))
