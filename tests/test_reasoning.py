"""Reasoning of models is removed by every captioner, and detected where it cannot be removed."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from lotlip.caption.config import CaptionConfig, QualityConfig, TableCaptionerConfig
from lotlip.caption.gate import gate_caption
from lotlip.caption.quality import broken_rule, measure
from lotlip.caption.reasoning import cut_reasoning, reasoning
from lotlip.core.checks import GateFailed
from lotlip.data.records import Caption, Failure, ImageRecord
from tests.captioning_server import CaptioningServer, caption_text
from tests.test_endpoint_captioner import captioner, no_key, record, records, words  # noqa: F401 (a fixture)
from tests.test_quality import write_partitions

TEXT = "A red house stands by a lake. Two trees are behind it."
WITH_AN_ANSWER = [
    f"<think>Okay, a house.</think>\n\n{TEXT}",
    f"<think>\n\n</think>\n\n{TEXT}",
    f"Okay, the user wants a caption. A house.\n</think>\n{TEXT}",
    f"<THINKING lang='en'>A house?</THINKING>{TEXT}",
    f"<reasoning>A house.</reasoning>{TEXT}",
    f"<think>I may use <think> tags.</think> then more </think>{TEXT}",
    f"<think>one</think><think>two</think>{TEXT}",
    f"<think>a house</think><answer>{TEXT}</answer>",
    f"{TEXT}<think>and now",
    f"[THINK]a house[/THINK]{TEXT}",
    f"◁think▷a house◁/think▷{TEXT}",
    f"<seed:think>a house</seed:think>{TEXT}",
    f"<|begin_of_thought|>a house<|end_of_thought|><|begin_of_solution|>{TEXT}<|end_of_solution|>",
    f"<|START_THINKING|>a house<|END_THINKING|><|START_RESPONSE|>{TEXT}<|END_RESPONSE|>",
    f"<unused94>thought a house<unused95>{TEXT}",
    f"<|channel|>analysis<|message|>A house.<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}<|return|>",
    f"<|channel|>analysis<|message|>A house.<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}",
    f"analysisA house it is.assistantfinal{TEXT}",
    f"analysis A house it is. assistantfinal {TEXT}",
]
WITHOUT_AN_ANSWER = [
    "<think>Okay, a house. It is",
    "<think>Okay, a house.</think>",
    "Okay, a house.</think>  ",
    "<think>",
    "<|channel|>analysis<|message|>A house. It",
    "<|channel|>analysis<|message|>A house.<|end|><|start|>assistant<|channel|>final<|message|>",
    "analysisWe see a house",
]
CLEAN = [
    TEXT,
    "I think <b>this</b> is a house; the sign says [STOP] and 5 < 6 > 4.",
    "analysis of the picture shows a house.",
    "A thinking man sits by the reasoning engine.",
]


@pytest.mark.parametrize("text", WITH_AN_ANSWER)
def test_reasoning_is_removed_and_the_answer_kept(text):
    assert cut_reasoning(text) == TEXT
    assert cut_reasoning(TEXT) == TEXT


@pytest.mark.parametrize("text", WITHOUT_AN_ANSWER)
def test_reasoning_without_an_answer_becomes_empty(text):
    assert cut_reasoning(text) == ""


@pytest.mark.parametrize("text", CLEAN)
def test_text_without_reasoning_is_unchanged(text):
    assert cut_reasoning(f" {text}\n") == text
    assert reasoning(text) == ""


# --- captioners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [WITH_AN_ANSWER[0], WITH_AN_ANSWER[2], WITH_AN_ANSWER[15]])
def test_an_endpoints_caption_has_no_reasoning(text):
    with CaptioningServer(lambda image, number: caption_text(text, reasoning_content="Okay, a house.")) as server:
        (caption,) = captioner(server.url).caption(records(1))
    assert isinstance(caption, Caption)
    assert caption.text == TEXT
    assert caption.sub_captions == ["A red house stands by a lake", "Two trees are behind it"]
    assert caption.tokens == words(TEXT)


@pytest.mark.parametrize(
    ("text", "field"),
    [("<think>Okay, a house", {}), ("", {"reasoning_content": "Okay, a house"}), (None, {"reasoning": "A house"})],
)
def test_an_endpoints_answer_of_reasoning_alone_is_a_failure_without_retry(text, field):
    with CaptioningServer(lambda image, number: caption_text(text, "length", **field)) as server:
        (failure,) = captioner(server.url).caption(records(1))
    assert isinstance(failure, Failure)
    assert failure.kind == "empty"
    assert "reasoning" in failure.reason and "max_tokens" in failure.reason
    assert max(server.attempts.values()) == 1


def test_a_tables_captions_have_no_reasoning(tmp_path):
    from lotlip.caption.captioners.table import TableCaptioner as Table

    rows = {"key": ["k0", "k1", "k2"], "captioner": ["llava"] * 3}
    pd.DataFrame({**rows, "text": [WITH_AN_ANSWER[0], WITHOUT_AN_ANSWER[0], TEXT]}).to_parquet(tmp_path / "t.parquet")
    table = Table("llava", TableCaptionerConfig(kind="table", path=tmp_path / "t.parquet"), words)
    first, second, third = table.caption(records(3))
    assert isinstance(first, Caption) and isinstance(third, Caption)
    assert first.text == third.text == TEXT
    assert isinstance(second, Failure)
    assert second.kind == "empty"


def test_each_column_of_a_table_is_cleaned_separately(tmp_path):
    from lotlip.caption.captioners.table import TableCaptioner as Table

    data = {"key": ["k0"], "short": ["A house."], "long": [f"a house?</think>{TEXT}"]}
    pd.DataFrame(data).to_parquet(tmp_path / "t.parquet")
    settings = TableCaptionerConfig(kind="table", path=tmp_path / "t.parquet", captioner=None, text=["short", "long"])
    (caption,) = Table("llava", settings, words).caption(records(1))
    assert isinstance(caption, Caption)
    assert caption.text == f"A house.\n{TEXT}"


@pytest.mark.integration
@pytest.mark.parametrize("special", [False, True])
def test_a_models_caption_has_no_reasoning(tmp_path, special):
    """The markers are ordinary words of the tokenizer, or special tokens that decoding skips."""
    from transformers import AutoTokenizer

    from lotlip.caption.captioners.transformers import _Mllm
    from tests.tiny_mllm import save_llava

    tokenizer = AutoTokenizer.from_pretrained(save_llava(tmp_path / "llava"), trust_remote_code=False)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    mllm = object.__new__(_Mllm)
    mllm._tokenizer = tokenizer
    mllm._end_tokens = [tokenizer.eos_token_id]

    def answer(text: str):
        return mllm._answer([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])

    plain = answer("a dog on the grass").text
    assert answer("<think> a house by the sea </think> a dog on the grass").text == plain != ""
    assert answer("a house by the sea </think> a dog on the grass").text == plain
    unanswered = answer("<think> a dog on the grass")
    assert (unanswered.text, unanswered.reasoned) == ("", True)


# --- older caption stores ---------------------------------------------------------------------------------------------


def test_reasoning_in_an_older_caption_store_is_removed_when_published():
    from lotlip.caption.partition import _usable

    stored = Caption("k0", "llava", WITH_AN_ANSWER[0], [], 0, "stop", "m@1", "What?")
    assert _usable(stored) == replace(stored, text=TEXT)
    assert _usable(replace(stored, text=TEXT)).text == TEXT
    failure = _usable(replace(stored, text=WITHOUT_AN_ANSWER[0]))
    assert isinstance(failure, Failure)
    assert failure.kind == "empty"


# --- rule and gate ----------------------------------------------------------------------------------------------------

UNCUT = [
    "Okay, let's see. There is a house by a lake and two trees.",
    "The user wants me to describe the picture. I see a house.",
    "So the user asks for details, and I need to describe the house.",
    "Wait, the image also has a lake behind the house.",
    "&lt;think&gt;A house&lt;/think&gt; A house by a lake.",
    "A house by a lake.<|end|>",
]


@pytest.mark.parametrize("text", UNCUT)
def test_remaining_reasoning_breaks_a_rule(text):
    caption = measure(Caption("k", "llava", text, [text], 9, "stop", "m@1", ""), frozenset(), [])
    failure = broken_rule(caption, QualityConfig())
    assert failure is not None
    assert failure.kind == "reasoning"
    assert caption.reasoning in failure.reason
    assert broken_rule(caption, QualityConfig(reasoning=False)) is None


@pytest.mark.slow
def test_captions_dropped_for_reasoning_fail_the_gate(tmp_path, without_pages):
    reports = write_partitions(tmp_path)
    dropped = [Failure(f"d{number}", "llava", "shows reasoning", "reasoning") for number in range(20)]
    damaged = replace(reports[0], read=220, failures=dropped)
    with pytest.raises(GateFailed, match=r"show the model's reasoning"):
        gate_caption(CaptionConfig(), tmp_path, [damaged, *reports[1:]], tmp_path / "report")
    gate_caption(CaptionConfig(max_reasoning_share=0.1), tmp_path, [damaged, *reports[1:]], tmp_path / "report")


# --- content in parts -------------------------------------------------------------------------------------------------


def content_parts(*items: object) -> list[object]:
    return list(items)


@pytest.mark.parametrize(
    "content",
    [
        content_parts({"type": "text", "text": TEXT}),
        content_parts({"type": "text", "text": TEXT[:30]}, {"type": "text", "text": TEXT[30:]}),
        content_parts(
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "output_text", "text": TEXT}
        ),
        content_parts({"text": TEXT}),
        content_parts(TEXT),
    ],
)
def test_parts_of_an_answer_are_joined(content):
    with CaptioningServer(lambda image, number: caption_text(content)) as server:
        (caption,) = captioner(server.url).caption(records(1))
    assert isinstance(caption, Caption)
    assert caption.text == TEXT


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (7, "malformed"),
        ({"text": TEXT}, "malformed"),
        (content_parts(7), "malformed"),
        (content_parts({"type": "image_url", "image_url": {}}), "malformed"),
        (content_parts({"type": "text", "text": None}), "malformed"),
        (content_parts({"type": "refusal", "refusal": "I will not."}), "refused"),
        (content_parts(), "empty"),
        (True, "malformed"),
    ],
)
def test_an_unusable_answer_is_a_failure_without_retry(content, kind):
    with CaptioningServer(lambda image, number: caption_text(content)) as server:
        captions = list(captioner(server.url).caption(records(3)))
    assert [getattr(item, "kind", None) for item in captions] == [kind] * 3
    assert max(server.attempts.values()) == 1


@pytest.mark.parametrize("number", [400, 413, 422])
def test_a_rejected_request_is_not_retried(number):
    from tests.captioning_server import status
    from tests.test_endpoint_captioner import fail_first

    with CaptioningServer(fail_first(status(number), 9)) as server:
        captions = list(captioner(server.url, retries=5).caption(records(2)))
    assert [getattr(item, "kind", None) for item in captions] == ["rejected", None]
    assert max(server.attempts.values()) == 1


def test_a_lone_surrogate_is_replaced():
    from lotlip.caption.captioners.endpoint import EndpointCaptioner
    from lotlip.data.tokenizer import count_tokens

    with CaptioningServer(lambda image, number: caption_text("A red \ud83d house.")) as server:
        author = captioner(server.url)
        counted = EndpointCaptioner("llava", author.settings, count_tokens("bert-base-uncased"))
        (caption,) = counted.caption([record(0)])
    assert isinstance(caption, Caption)
    assert caption.text == "A red \ufffd house."


# --- parameters that a model rejects ----------------------------------------------------------------------------------


def sent_parameters(**changes: object) -> dict[str, object]:
    with CaptioningServer() as server:
        list(captioner(server.url, **changes).caption(records(1)))
    return {name: value for name, value in server.requests[-1].items() if name not in ("model", "messages")}


@pytest.mark.slow
def test_each_parameter_can_be_omitted():
    defaults = {"max_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert sent_parameters() == defaults
    for name in defaults:
        assert sent_parameters(**{name: None}) == {key: value for key, value in defaults.items() if key != name}
    assert sent_parameters(**dict.fromkeys(defaults)) == {}


def test_max_completion_tokens_replaces_max_tokens():
    assert sent_parameters(max_completion_tokens=4096, temperature=None, top_p=None, seed=None) == {
        "max_completion_tokens": 4096
    }
    with pytest.raises(ValueError, match=r"max_completion_tokens.*remove max_tokens"):
        captioner("http://127.0.0.1:1/v1", max_completion_tokens=9, max_tokens=9)


def test_captions_and_failures_keep_the_order_of_images(monkeypatch):
    images = [record(number) for number in range(4)]
    assert all(isinstance(one, ImageRecord) for one in images)
    answers = {images[1].image: "<think>hm", images[2].image: f"hm</think>{TEXT}"}
    with CaptioningServer(lambda image, number: caption_text(answers[image]) if image in answers else None) as server:
        captions = list(captioner(server.url).caption(images))
    assert [item.key for item in captions] == ["k0", "k1", "k2", "k3"]
    assert [type(item) for item in captions] == [Caption, Failure, Caption, Caption]
