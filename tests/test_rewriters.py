"""Captioners that reword short captions. They get only the text, and rewrites are checked as short captions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lotlip.caption.captioners import open_captioner
from lotlip.caption.captioners import transformers as language_models
from lotlip.caption.captioners.endpoint import EndpointRewriter
from lotlip.caption.captioners.rewriting import rewrite_in
from lotlip.caption.captioners.table import TableCaptioner
from lotlip.caption.captioners.transformers import TransformersRewriter
from lotlip.caption.config import (
    CaptionConfig,
    EndpointRewriterConfig,
    SceneRewriterConfig,
    TableCaptionerConfig,
    TransformersRewriterConfig,
)
from lotlip.caption.gate import gate_caption
from lotlip.caption.quality import assess, measured
from lotlip.core.checks import GateFailed
from lotlip.core.compute import CaptionerCompute
from lotlip.data.partitions import write_captions
from lotlip.data.records import Caption, Failure, ImageRecord, UnitReport
from lotlip.demo.rewriter import SceneRewriter
from lotlip.demo.world import COLOURS, PLACES, SALIENT_SIZES, SHAPES, TEXTURES, TIMES
from tests.captioning_server import MODEL, CaptioningServer, caption_text
from tests.test_scene_captioner import captions, pieces, records
from tests.tiny_mllm import save_llama, save_t5

CHAT = (
    "{% for message in messages %}USER: {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
FACTS = (*SHAPES, *COLOURS, *TEXTURES, *SALIENT_SIZES, *PLACES.values(), *TIMES.values())
PATTERNS = {"stripes": "striped", "dots": "dotted", "checks": "checked", "border": "bordered"}


def texts(items: Any) -> list[str]:
    return [item.text if isinstance(item, Caption) else item.kind for item in items]


# --- the demo's grammar ---------------------------------------------------------------------------------------------


def rewriter(name: str = "rewrite-1", seed: int = 0) -> SceneRewriter:
    config = SceneRewriterConfig(kind="rewrite-scenes", path=Path("rewriter.py"), seed=seed)
    return SceneRewriter(name, config, lambda text: len(pieces(text)))


def facts(text: str) -> set[str]:
    plain = " ".join(PATTERNS.get(word, word) for word in text.replace(",", "").split())
    return {fact for fact in FACTS if f" {fact} " in f" {plain} "}


@pytest.mark.slow
def test_a_rewrite_states_the_facts_of_the_short_caption():
    rewritten = list(rewriter().caption(records(400)))
    assert all(isinstance(item, Caption) for item in rewritten)
    pairs = [(record.short_caption, item.text) for record, item in zip(records(400), rewritten, strict=True)]
    assert all(facts(text) == facts(short) for short, text in pairs)
    assert sum(short == text for short, text in pairs) < 20


def test_a_rewrite_depends_only_on_its_short_caption_and_key():
    blind = [replace(record, scene=None, image=b"") for record in records(40)]
    assert texts(rewriter().caption(blind)) == texts(rewriter().caption(records(40)))
    assert texts(rewriter().caption(records(40)[7:8])) == texts(rewriter().caption(records(40)))[7:8]
    several = [texts(rewriter(*args).caption(records(40))) for args in (("a", 0), ("b", 0), ("a", 1))]
    assert several[0] != several[1] != several[2] != several[0]


@pytest.mark.slow
def test_rewrites_use_only_word_pieces_of_other_training_texts():
    known = {piece for record in records(1000) for piece in pieces(record.short_caption)}
    long = [caption.text for style in ("instructblip", "llava", "sharegpt4v") for caption in captions(style, 500)]
    known |= {piece for text in long for piece in pieces(text)}
    used = {piece for text in texts(rewriter().caption(records(1000))) for piece in pieces(text)}
    assert used <= known


def test_a_caption_outside_the_grammar_is_a_failure():
    (failure,) = rewriter().caption([ImageRecord("cat", b"", "jpg", "a cat on a mat", 1, 1, "")])
    assert isinstance(failure, Failure)
    assert failure.kind == "missing" and "another kind of captioner" in failure.reason


# --- language models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "rewrite"),
    [
        ("A dog.", "A dog."),
        ('\n\n"A dog runs."\nCaption: a cat', "A dog runs."),
        ("“A dog”", "A dog"),
        ('"A" and "B"', 'A" and "B'),
        ("...\n\n", ""),
        ("", ""),
    ],
)
def test_a_rewrite_is_the_first_line_that_has_words(answer, rewrite):
    assert rewrite_in(answer) == rewrite


def short_captions(count: int) -> list[ImageRecord]:
    words = ("red house", "small dog near the lake", "woman", "two large green tree and old street under light sky")
    return [
        ImageRecord(f"k{number}", b"no image", "jpg", f"a {words[number % 4]} {number % 3}", 1, 1, "")
        for number in range(count)
    ]


def server_rewriter(url: str, **changes: Any) -> EndpointRewriter:
    settings = {"path": "endpoint.py", "url": url, "model": MODEL, "revision": "abc", **changes}
    config = EndpointRewriterConfig(kind="rewrite-endpoint", **settings)
    return EndpointRewriter("rewrite-1", config, lambda text: len(text.split()), CaptionerCompute(retries=0))


@pytest.mark.slow
def test_a_server_receives_the_caption_in_the_prompt_without_an_image():
    with CaptioningServer(plan=lambda image, number: caption_text('"A home in red."\nCaption: a cat')) as server:
        author = server_rewriter(server.url, prompt="In other words: {caption}!", seed=3)
        rewrites = list(author.caption(short_captions(5)))
    assert texts(rewrites) == ["A home in red."] * 5
    assert all(item.prompt == "In other words: {caption}!" for item in rewrites if isinstance(item, Caption))
    prompts = sorted(
        request["messages"][0]["content"] for request in server.requests[1:]
    )  # the first request is a trial
    assert prompts == sorted(f"In other words: {record.short_caption}!" for record in short_captions(5))
    assert "image" not in json.dumps(server.requests)
    assert server.requests[0]["temperature"] == 0.9 and server.requests[0]["seed"] == 3


def test_empty_answers_and_refusals_are_failures():
    def plan(content: bytes, number: int) -> Any:
        return (
            caption_text("...")
            if b"woman" in content
            else caption_text(None, refusal="No.")
            if b"dog near" in content
            else None
        )

    with CaptioningServer(plan=plan) as server:
        rewrites = list(server_rewriter(server.url).caption(short_captions(4)))
    assert [getattr(item, "kind", "") for item in rewrites] == ["", "refused", "empty", ""]
    assert "refused the caption: No." in rewrites[1].reason  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["endpoint", "transformers"])
def test_a_prompt_without_the_caption_placeholder_is_an_error(kind):
    settings = {"kind": f"rewrite-{kind}", "path": "p", "prompt": "Rewrite it.", "model": "m", "revision": "a" * 40}
    if kind == "endpoint":
        settings["url"] = "http://127.0.0.1:1/v1"
    with pytest.raises(ValueError, match=r"no place for the short caption; put \{caption\}"):
        CaptionConfig(captioners={"r": settings})


def folder_rewriter(folder: Path, **changes: Any) -> TransformersRewriter:
    language_models._loaded.cache_clear()
    compute = CaptionerCompute(**{key: changes.pop(key) for key in ("batch_size",) if key in changes})
    settings = {"path": folder, "model": str(folder), "max_new_tokens": 8, "temperature": 0, **changes}
    config = TransformersRewriterConfig(kind="rewrite-transformers", **settings)
    author = open_captioner("rewrite-1", config, "bert-base-uncased", compute)
    assert isinstance(author, TransformersRewriter)
    return author


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, CHAT])
def test_batches_do_not_change_the_rewrites_of_a_language_model(tmp_path, template):
    folder = save_llama(tmp_path / "llama", template)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for record in short_captions(9):
        prompt = f"describe {record.short_caption} with :"
        chat = prompt if template is None else f"USER: {prompt} ASSISTANT:"
        # a chat template contains the start token of its model, if any
        options = {"add_special_tokens": template is None, "return_token_type_ids": False}
        inputs = tokenizer(chat, return_tensors="pt", **options)
        with torch.inference_mode():
            (tokens,) = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected.append(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    rewrites = list(
        folder_rewriter(folder, prompt="describe {caption} with :", batch_size=4).caption(short_captions(9))
    )
    assert texts(rewrites) == [rewrite_in(text) or "empty" for text in expected]
    assert len(set(texts(rewrites))) > 3


@pytest.mark.slow
def test_a_text_to_text_model_rewrites_and_samples_by_key(tmp_path):
    folder = save_t5(tmp_path / "t5")
    samples = [
        texts(folder_rewriter(folder, temperature=1, seed=seed).caption(short_captions(6))) for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1] != samples[2]
    (alone,) = folder_rewriter(folder, temperature=1, seed=0).caption(short_captions(6)[3:4])
    assert texts([alone]) == samples[0][3:4]


def test_a_model_that_does_not_generate_text_is_an_error(tmp_path):
    from transformers import CLIPVisionModel

    from lotlip.data.records import NonRetryableError
    from tests.tiny_mllm import _clip

    CLIPVisionModel(_clip()).save_pretrained(tmp_path / "vision")
    with pytest.raises(NonRetryableError, match="must be a text-generation or text-to-text model"):
        list(folder_rewriter(tmp_path / "vision").caption(short_captions(1)))


# --- quality of rewrites --------------------------------------------------------------------------------------------


def caption_config(**more: Any) -> CaptionConfig:
    long = {"kind": "scenes", "path": "p", "style": "llava"}
    return CaptionConfig(captioners={"llava": long, "r": {"kind": "rewrite-scenes", "path": "p"}}, **more)


def test_declaring_a_tables_texts_rewrites_does_not_recaption(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("key,text\nk,a dog runs\n", encoding="utf-8")
    settings = [TableCaptionerConfig(kind="table", path=table, captioner=None, rewrites=each) for each in (False, True)]
    one, other = (TableCaptioner("r", each, len).about for each in settings)
    assert one == other
    captioners = {"r": {"kind": "table", "path": table, "rewrites": True}, "d": {"kind": "table", "path": table}}
    config = CaptionConfig(captioners=captioners)
    assert (config.describing, config.rewriting) == (["d"], ["r"])


def test_rules_for_rewrites_allow_short_and_reworded_texts():
    config = caption_config(quality={"short": 3, "disagreement": 0.5, "long": 9})
    assert config.rules("llava") == config.quality
    rules = config.rules("r")
    assert (rules.short, rules.disagreement, rules.long) == (2, None, 9)
    assert caption_config(quality={"short": None}).rules("r").short is None
    captions = [Caption(key, "r", text, [text], 1, "stop", "", "") for key, text in (("a", "old mutt"), ("b", "dog"))]
    kept, dropped = assess(measured(captions, {"a": "a dog", "b": "a cat"}, rewrites=True), rules)
    assert isinstance(kept, Caption)
    assert isinstance(dropped, Failure) and dropped.kind == "short"


def write_rewrites(folder: Path, shift: int = 0, constant: bool = False) -> list[UnitReport]:
    rows = records(400)
    short = {record.key: record.short_caption for record in rows}
    rewrites = list(rewriter().caption(rows))
    items = [
        replace(
            item, key=rows[place].key, text=rewrites[(place + shift) % len(rewrites)].text if not constant else "a star"
        )
        for place, item in enumerate(rewrites)
    ]
    return [write_captions("train/part-00000", measured(items, short, rewrites=True), len(rows), folder)]


def gate(folder: Path, reports: list[UnitReport], rewrites: bool = True) -> None:
    gate_caption(caption_config(max_repeated_share=0.02), folder, reports, folder / "report", rewrites)


@pytest.mark.slow
def test_the_gate_passes_repeated_rewrites_without_full_stops(tmp_path):
    reports = write_rewrites(tmp_path)
    assert pd.read_parquet(tmp_path / "train/part-00000.parquet")["text"].duplicated().sum() > 0.02 * 400
    gate(tmp_path, reports)
    with pytest.raises(GateFailed, match="captions that equal another"):
        gate(tmp_path, reports, rewrites=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [({"shift": 3}, "captions are their own images'"), ({"constant": True}, "captions that equal another")],
)
def test_the_gate_fails_swapped_and_constant_rewrites(tmp_path, fault, message):
    with pytest.raises(GateFailed, match=message):
        gate(tmp_path, write_rewrites(tmp_path, **fault))
