"""The page of `lotlip explore`: its model queries and drawings, and that the browser loads from this machine only."""

from __future__ import annotations

import io
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from lotlip.data.text import split_sub_captions
from lotlip.explore.explorer import Explorer
from lotlip.figures.overlay import heat, scale_to_page, side_by_side
from lotlip.retrieval.embedding import embed, search
from lotlip.retrieval.faiss_index import add, build
from tests.browser import TIMEOUT, chromium, needs_chromium
from tests.conftest import TinySample
from tests.partitions import ingested
from tests.tiny_model import save_tiny_model

TEXT = "A red dog is here. Two of them stand by the house. A tree is green."
TEXTS = [TEXT, "A blue cat.", "A white bird & a <b>black</b> boat. The sky is open."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path, tiny_samples: list[TinySample]) -> Path:
    """A model, ingested images, and indexes of their split `test` and of texts."""
    folder = tmp_path_factory.mktemp("explore")
    model = save_tiny_model(folder / "model", tiny_tower)
    source = ingested(folder / "ingest", {sample.key: sample.image for sample in tiny_samples[:12]})
    embed(model, source, folder / "images.parquet", split="test")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    embed(model, folder / "texts.txt", folder / "texts.parquet")
    return folder


@pytest.fixture(scope="module")
def explorer(folder: Path) -> Explorer:
    return Explorer(folder / "images.parquet", folder / "texts.parquet", top=3)


# --- queries of the model ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_find_pictures_agrees_with_search_and_gives_relevance_maps(explorer, folder, tiny_samples):
    results = explorer.find_pictures(TEXT)
    assert [one.match for one in results] == search(folder / "images.parquet", TEXT, top=3)
    images = {sample.key: sample.image for sample in tiny_samples}
    for one in results:
        assert one.picture == Image.open(io.BytesIO(images[one.match.name])).convert("RGB")
        assert one.relevance.shape == (4, 4)
        assert one.relevance.sum() == pytest.approx(1)
        np.testing.assert_allclose(one.relevance, explorer.analyse(one.picture, TEXT).whole, atol=1e-6)


def test_find_texts_agrees_with_search(explorer, folder, tmp_path, tiny_samples):
    (tmp_path / "a.png").write_bytes(tiny_samples[0].image)
    results = explorer.find_texts(Image.open(tmp_path / "a.png"))
    expected = search(folder / "texts.parquet", image=tmp_path / "a.png", top=3)
    assert [(one.name, one.text) for one in results] == [(one.name, one.text) for one in expected]
    np.testing.assert_allclose([one.score for one in results], [one.score for one in expected], atol=1e-6)


def test_relevance_of_a_sub_caption_is_that_of_a_separate_text(explorer, tiny_samples):
    image = Image.open(io.BytesIO(tiny_samples[0].image)).convert("RGB")
    analysis = explorer.analyse(image, TEXT)
    assert analysis.sub_captions == split_sub_captions(TEXT)
    alone = [explorer.analyse(image, part).whole for part in analysis.sub_captions]
    np.testing.assert_allclose(analysis.relevance, alone, atol=1e-5)
    assert np.abs(analysis.relevance[0] - analysis.relevance[1]).max() > 1e-4


def test_analysis_has_shares_of_cls_and_every_corner_token(explorer, tiny_samples):
    analysis = explorer.analyse(Image.open(io.BytesIO(tiny_samples[0].image)).convert("RGB"), TEXT)
    assert analysis.readers == ["[CLS]", "Cor 1", "Cor 2"]
    assert analysis.shares.shape == (3, 3)
    np.testing.assert_allclose(analysis.shares.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(analysis.tokens, np.array([5, 7, 4]) / 16, atol=1e-6)
    assert ((analysis.entropy > 0) & (analysis.entropy <= 1)).all()


def test_truncation_ends_where_the_model_stops_reading(explorer, tiny_samples):
    """The tiny model takes 32 tokens, of which [CLS], two corner tokens and the last [SEP] are not words."""
    words = " ".join(["dog"] * 20)
    text = f"{words}. {words}"
    reading = explorer.truncation(text)
    assert (reading.tokens, reading.limit) == (45, 32)
    assert text[: reading.end] == f"{words}. " + " ".join(["dog"] * 7)
    analysis = explorer.analyse(Image.open(io.BytesIO(tiny_samples[0].image)).convert("RGB"), text)
    assert analysis.sub_captions == [words, " ".join(["dog"] * 7)]
    short_text = explorer.truncation("A dog. ")
    assert (short_text.tokens, short_text.end) == (6, len("A dog. "))


@pytest.mark.slow
def test_images_added_to_the_index_are_read_from_their_own_folder(folder, tmp_path, tiny_samples):
    index, more = tmp_path / "images.npy", tmp_path / "more.npy"
    for number, name in enumerate(("first", "second")):  # the same file name in both
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(tiny_samples[number].image)
    embed(folder / "model", tmp_path / "first", index)
    embed(folder / "model", tmp_path / "second", more)
    build(index)
    add(index, [more])
    results = Explorer(index).find_pictures(TEXT)
    expected = {
        str(tmp_path / name): Image.open(io.BytesIO(tiny_samples[number].image)).convert("RGB")
        for number, name in enumerate(("first", "second"))
    }
    assert {one.match.source: one.picture for one in results} == expected
    with pytest.raises(ValueError, match="are in 2 folders, so --images cannot name another"):
        Explorer(index, source=tmp_path / "first")


def test_examples_are_the_longest_texts(explorer, folder):
    assert explorer.examples(2) == sorted(TEXTS, key=len, reverse=True)[:2]
    assert Explorer(folder / "images.parquet").examples(2) == []


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_indexes_that_do_not_match_are_an_error(folder, tmp_path, tiny_tower):
    with pytest.raises(ValueError, match=r"texts\.parquet is an index of texts; an index of images is needed"):
        Explorer(folder / "texts.parquet")
    with pytest.raises(ValueError, match=r"images\.parquet is an index of images; an index of texts is needed"):
        Explorer(folder / "images.parquet", folder / "images.parquet")
    other = save_tiny_model(tmp_path / "other", tiny_tower, seed=2)
    embed(other, folder / "texts.txt", tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="were made by different models"):
        Explorer(folder / "images.parquet", tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="top is 0"):
        Explorer(folder / "images.parquet", top=0)


@pytest.mark.slow
def test_a_moved_image_folder_can_be_given(folder, tmp_path, tiny_samples):
    moved = shutil.copytree(folder / "ingest", tmp_path / "ingest")
    embed(folder / "model", moved, tmp_path / "images.parquet")
    moved.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the folder .*ingest of the pictures of .* does not exist; give it"):
        Explorer(tmp_path / "images.parquet")
    results = Explorer(tmp_path / "images.parquet", source=tmp_path / "moved", top=1).find_pictures(TEXT)
    assert results[0].picture.size == (16, 16)


def test_invalid_queries_are_errors(explorer, folder):
    with pytest.raises(ValueError, match="the text is empty"):
        explorer.find_pictures(" \n")
    with pytest.raises(ValueError, match="there is no index of texts; give one with --texts"):
        Explorer(folder / "images.parquet").find_texts(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="has no picture"):
        explorer.picture("../../etc/passwd")


# --- drawings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["black", "white"])
def test_heat_marks_relevance_on_dark_and_light_images(colour):
    relevance = np.zeros((4, 4), dtype=np.float32)
    relevance[0, 3] = 1
    pixels = np.asarray(heat(Image.new("RGB", (64, 64), colour), relevance)).astype(int)
    redder = pixels[..., 0] - pixels[..., 1]
    side = len(pixels) // 4
    assert redder[side // 2, -side // 2] > 120
    assert abs(redder[2 * side :]).max() == abs(redder[:, : 2 * side]).max() == 0


def test_a_uniform_map_is_not_scaled_to_full_heat():
    uniform = np.full((8, 8), 1 / 64, dtype=np.float32)
    pixels = np.asarray(heat(Image.new("RGB", (64, 64), "white"), uniform)).astype(int)
    assert 0 < (pixels[..., 0] - pixels[..., 1]).max() < 80


def test_heat_pales_what_the_centre_crop_removes():
    image = Image.new("RGB", (200, 100), "black")
    pixels = np.asarray(heat(scale_to_page(image), np.full((2, 2), 0.25, dtype=np.float32)))
    assert pixels.shape[1] == 2 * pixels.shape[0] == scale_to_page(image).width
    pale = (pixels[..., 0] == pixels[..., 1]).all(axis=0)
    assert pale.tolist() == [abs(column + 0.5 - len(pale) / 2) > len(pale) / 4 for column in range(len(pale))]
    pair = side_by_side(scale_to_page(image), heat(scale_to_page(image), np.ones((1, 1), dtype=np.float32)))
    assert pair.height == pixels.shape[0]


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_heat_covers_the_full_image_when_nothing_is_cropped(size):
    relevance = np.zeros((4, 4), dtype=np.float32)
    relevance[:, 0] = relevance[:, 3] = 1 / 8
    if size[1] > size[0]:
        relevance = relevance.T.copy()
    image = scale_to_page(Image.new("RGB", size, "black"))
    for resize in ("squash", "pad"):
        pixels = np.asarray(heat(image, relevance, resize)).astype(int)
        assert pixels.shape[:2] == image.size[::-1]
        redder = pixels[..., 0] - pixels[..., 1]
        profile = redder.mean(axis=0 if size[0] > size[1] else 1)  # along the longer side
        assert profile[[0, -1]].min() > 60
        assert profile[len(profile) // 2] == 0


def test_relevance_of_padding_is_not_drawn():
    relevance = np.zeros((8, 8), dtype=np.float32)
    relevance[[0, 7]] = 1 / 16  # rows above and below a wide image
    pixels = np.asarray(heat(scale_to_page(Image.new("RGB", (200, 100), "black")), relevance, "pad")).astype(int)
    assert (pixels[..., 0] == pixels[..., 1]).all()


@pytest.mark.slow
def test_markup_in_a_text_is_escaped(explorer):
    from lotlip.explore.page import attention_html, truncation_html

    text = "<img src=x>. " + "dog " * 40
    assert "<img" not in truncation_html(text, explorer.truncation(text))
    assert "<s>" in truncation_html(text, explorer.truncation(text))
    html = attention_html(explorer.analyse(Image.new("RGB", (16, 16)), text))
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html


@pytest.mark.slow
def test_a_busy_port_is_a_clear_error(explorer):
    from lotlip.explore.page import serve_page

    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot be served on 127\.0\.0\.1: .*{port}.*choose another --port"):
            serve_page(explorer, port).__enter__()


@pytest.mark.slow
def test_requests_of_other_sites_are_rejected(explorer):
    import httpx

    from lotlip.explore.page import serve_page

    with serve_page(explorer) as address:
        for path in ("", "config", "gradio_api/upload"):
            assert httpx.get(address + path, headers={"Host": "evil.example"}).status_code == 421
            assert httpx.post(address + path, headers={"Origin": "http://evil.example"}).status_code == 403
            assert httpx.post(address + path, headers={"Origin": "http://127.0.0.1:1"}).status_code == 403
        assert httpx.get(address).status_code == 200
        assert httpx.get(f"{address}config", headers={"Origin": address.rstrip("/")}).status_code == 200


@pytest.mark.slow
def test_an_image_shown_twice_is_written_to_two_files(explorer):
    # Gradio rewrites the file of each component, even while the browser reads it.
    from gradio import Gallery
    from gradio import Image as ImageOnPage

    from lotlip.explore.page import build_page

    image, files = Image.new("RGB", (8, 8), "red"), {}
    for block in build_page(explorer).blocks.values():
        if isinstance(block, Gallery):
            files[block.elem_id] = block.postprocess([image]).root[0].image.path
        elif isinstance(block, ImageOnPage):
            files["preview"] = block.postprocess(image).path
    assert files["text-maps"] != files["pictures"]
    assert files["picture-maps"] != files["preview"]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
def test_the_page_in_a_browser(explorer, tmp_path, tiny_samples):
    from playwright.sync_api import expect

    from lotlip.explore.page import serve_page

    (tmp_path / "a.png").write_bytes(tiny_samples[0].image)
    (tmp_path / "broken.png").write_bytes(tiny_samples[0].image[:40])
    with serve_page(explorer) as address, chromium() as browser:
        assert urlsplit(address).hostname == "127.0.0.1"
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT)
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)

        page.fill("#text textarea", f"{TEXT} " + "And so on. " * 20)
        expect(page.locator("#reading")).to_contain_text("the model reads only the first 32")
        page.fill("#text textarea", TEXT)
        expect(page.locator("#reading")).to_contain_text("22 of at most 32 tokens: the model reads the whole text")
        page.click("#find")
        expect(page.locator("#pictures img")).to_have_count(3)
        expect(page.locator("#text-maps img")).to_have_count(2 + 3)
        best, second, _ = [one.match.name for one in explorer.find_pictures(TEXT)]
        expect(page.locator("#text-maps")).to_contain_text(best)
        page.locator("#pictures button.thumbnail-item").nth(1).click()
        expect(page.locator("#text-maps")).to_contain_text(second)
        expect(page.locator("#text-attention")).to_contain_text("Cor 2")

        page.get_by_role("tab", name="Picture → texts").click()
        page.set_input_files("#upload input[type=file]", tmp_path / "broken.png")
        expect(page.get_by_text("not a readable image")).to_be_visible()
        page.get_by_label("Clear").first.click()
        page.set_input_files("#upload input[type=file]", tmp_path / "a.png")
        texts = explorer.find_texts(Image.open(tmp_path / "a.png"))
        expect(page.locator("#texts")).to_contain_text(str(texts[0].text))
        expect(page.locator("#picture-maps img")).to_have_count(2 + len(split_sub_captions(str(texts[0].text))))
    requests = [url for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")]
    assert {urlsplit(url).hostname for url in requests} == {"127.0.0.1"}
