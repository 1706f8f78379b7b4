"""The page: what it asks of the model, what it shows, and that nothing but this machine is asked for anything."""

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
from tests.conftest import TinySample
from tests.partitions import ingested
from tests.tiny_model import save_tiny_model

TEXT = "A red dog is here. Two of them stand by the house. A tree is green."
TEXTS = [TEXT, "A blue cat.", "A white bird & a <b>black</b> boat. The sky is open."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path, tiny_samples: list[TinySample]) -> Path:
    """A model, pictures that ingest left, and indexes of their split `test` and of texts."""
    folder = tmp_path_factory.mktemp("explore")
    model = save_tiny_model(folder / "model", tiny_tower)
    source = ingested(folder / "ingest", {sample.key: sample.image for sample in tiny_samples[:12]})
    embed(model, source, folder / "pictures.parquet", split="test")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    embed(model, folder / "texts.txt", folder / "texts.parquet")
    return folder


@pytest.fixture(scope="module")
def explorer(folder: Path) -> Explorer:
    return Explorer(folder / "pictures.parquet", folder / "texts.parquet", top=3)


# --- what is asked of the model ---------------------------------------------------------------------------------------


def test_a_text_finds_the_pictures_that_a_search_finds_each_with_a_map(explorer, folder, tiny_samples):
    found = explorer.find_pictures(TEXT)
    assert [one.match for one in found] == search(folder / "pictures.parquet", TEXT, top=3)
    images = {sample.key: sample.image for sample in tiny_samples}
    for one in found:
        assert one.picture == Image.open(io.BytesIO(images[one.match.name])).convert("RGB")
        assert one.relevance.shape == (4, 4)
        assert one.relevance.sum() == pytest.approx(1)
        np.testing.assert_allclose(one.relevance, explorer.analyse(one.picture, TEXT).whole, atol=1e-6)


def test_a_picture_finds_the_texts_that_a_search_finds(explorer, folder, tmp_path, tiny_samples):
    (tmp_path / "a.png").write_bytes(tiny_samples[0].image)
    found = explorer.find_texts(Image.open(tmp_path / "a.png"))
    expected = search(folder / "texts.parquet", image=tmp_path / "a.png", top=3)
    assert [(one.name, one.text) for one in found] == [(one.name, one.text) for one in expected]
    np.testing.assert_allclose([one.score for one in found], [one.score for one in expected], atol=1e-6)


def test_each_sub_caption_looks_as_a_text_of_its_own(explorer, tiny_samples):
    picture = Image.open(io.BytesIO(tiny_samples[0].image)).convert("RGB")
    look = explorer.analyse(picture, TEXT)
    assert look.sub_captions == split_sub_captions(TEXT)
    alone = [explorer.analyse(picture, part).whole for part in look.sub_captions]
    np.testing.assert_allclose(look.relevance, alone, atol=1e-5)
    assert np.abs(look.relevance[0] - look.relevance[1]).max() > 1e-4


def test_a_text_is_read_by_cls_and_every_corner_token(explorer, tiny_samples):
    look = explorer.analyse(Image.open(io.BytesIO(tiny_samples[0].image)).convert("RGB"), TEXT)
    assert look.readers == ["[CLS]", "Cor 1", "Cor 2"]
    assert look.shares.shape == (3, 3)
    np.testing.assert_allclose(look.shares.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(look.tokens, np.array([5, 7, 4]) / 16, atol=1e-6)
    assert ((look.entropy > 0) & (look.entropy <= 1)).all()


def test_a_text_that_is_too_long_is_cut_where_the_model_stops_to_read(explorer, tiny_samples):
    """The tiny model takes 32 tokens, of which [CLS], two corner tokens and the last [SEP] are no words."""
    words = " ".join(["dog"] * 20)
    text = f"{words}. {words}"
    reading = explorer.truncation(text)
    assert (reading.tokens, reading.limit) == (45, 32)
    assert text[: reading.end] == f"{words}. " + " ".join(["dog"] * 7)
    look = explorer.analyse(Image.open(io.BytesIO(tiny_samples[0].image)).convert("RGB"), text)
    assert look.sub_captions == [words, " ".join(["dog"] * 7)]
    short = explorer.truncation("A dog. ")
    assert (short.tokens, short.end) == (6, len("A dog. "))


def test_pictures_that_were_added_to_the_index_are_found_in_their_own_folder(folder, tmp_path, tiny_samples):
    index, more = tmp_path / "pictures.npy", tmp_path / "more.npy"
    for number, name in enumerate(("first", "second")):  # with the same names
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(tiny_samples[number].image)
    embed(folder / "model", tmp_path / "first", index)
    embed(folder / "model", tmp_path / "second", more)
    build(index)
    add(index, [more])
    found = Explorer(index).find_pictures(TEXT)
    expected = {
        str(tmp_path / name): Image.open(io.BytesIO(tiny_samples[number].image)).convert("RGB")
        for number, name in enumerate(("first", "second"))
    }
    assert {one.match.source: one.picture for one in found} == expected
    with pytest.raises(ValueError, match="are in 2 folders, so --pictures cannot name another"):
        Explorer(index, source=tmp_path / "first")


def test_examples_are_the_longest_texts(explorer, folder):
    assert explorer.examples(2) == sorted(TEXTS, key=len, reverse=True)[:2]
    assert Explorer(folder / "pictures.parquet").examples(2) == []


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_what_does_not_belong_together_is_an_error(folder, tmp_path, tiny_tower):
    with pytest.raises(ValueError, match=r"texts\.parquet is an index of texts; an index of images is needed"):
        Explorer(folder / "texts.parquet")
    with pytest.raises(ValueError, match=r"pictures\.parquet is an index of images; an index of texts is needed"):
        Explorer(folder / "pictures.parquet", folder / "pictures.parquet")
    other = save_tiny_model(tmp_path / "other", tiny_tower, seed=2)
    embed(other, folder / "texts.txt", tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="were made by different models"):
        Explorer(folder / "pictures.parquet", tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="top is 0"):
        Explorer(folder / "pictures.parquet", top=0)


def test_pictures_may_have_moved(folder, tmp_path, tiny_samples):
    moved = shutil.copytree(folder / "ingest", tmp_path / "ingest")
    embed(folder / "model", moved, tmp_path / "pictures.parquet")
    moved.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the folder .*ingest of the pictures of .* does not exist; give it"):
        Explorer(tmp_path / "pictures.parquet")
    found = Explorer(tmp_path / "pictures.parquet", source=tmp_path / "moved", top=1).find_pictures(TEXT)
    assert found[0].picture.size == (16, 16)


def test_what_cannot_be_asked_is_an_error(explorer, folder):
    with pytest.raises(ValueError, match="the text is empty"):
        explorer.find_pictures(" \n")
    with pytest.raises(ValueError, match="there is no index of texts; give one with --texts"):
        Explorer(folder / "pictures.parquet").find_texts(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="has no picture"):
        explorer.picture("../../etc/passwd")


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["black", "white"])
def test_heat_is_where_the_relevance_is_on_dark_and_light_pictures(colour):
    relevance = np.zeros((4, 4), dtype=np.float32)
    relevance[0, 3] = 1
    found = np.asarray(heat(Image.new("RGB", (64, 64), colour), relevance)).astype(int)
    redder = found[..., 0] - found[..., 1]
    side = len(found) // 4
    assert redder[side // 2, -side // 2] > 120
    assert abs(redder[2 * side :]).max() == abs(redder[:, : 2 * side]).max() == 0


def test_a_map_that_is_even_is_not_stretched_to_full_heat():
    found = np.asarray(heat(Image.new("RGB", (64, 64), "white"), np.full((8, 8), 1 / 64, dtype=np.float32))).astype(int)
    assert 0 < (found[..., 0] - found[..., 1]).max() < 80


def test_the_square_in_the_centre_is_what_the_model_sees():
    picture = Image.new("RGB", (200, 100), "black")
    found = np.asarray(heat(scale_to_page(picture), np.full((2, 2), 0.25, dtype=np.float32)))
    assert found.shape[1] == 2 * found.shape[0] == scale_to_page(picture).width
    pale = (found[..., 0] == found[..., 1]).all(axis=0)
    assert pale.tolist() == [abs(column + 0.5 - len(pale) / 2) > len(pale) / 4 for column in range(len(pale))]
    both = side_by_side(scale_to_page(picture), heat(scale_to_page(picture), np.ones((1, 1), dtype=np.float32)))
    assert both.height == found.shape[0]


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_heat_covers_the_whole_picture_where_the_model_sees_all_of_it(size):
    relevance = np.zeros((4, 4), dtype=np.float32)
    relevance[:, 0] = relevance[:, 3] = 1 / 8
    if size[1] > size[0]:
        relevance = relevance.T.copy()
    picture = scale_to_page(Image.new("RGB", size, "black"))
    for resize in ("squash", "pad"):
        found = np.asarray(heat(picture, relevance, resize)).astype(int)
        assert found.shape[:2] == picture.size[::-1]
        redder = found[..., 0] - found[..., 1]
        along = redder.mean(axis=0 if size[0] > size[1] else 1)  # by place on the longer side
        assert along[[0, -1]].min() > 60
        assert along[len(along) // 2] == 0


def test_relevance_of_padding_is_not_drawn():
    relevance = np.zeros((8, 8), dtype=np.float32)
    relevance[[0, 7]] = 1 / 16  # rows above and below a wide picture
    found = np.asarray(heat(scale_to_page(Image.new("RGB", (200, 100), "black")), relevance, "pad")).astype(int)
    assert (found[..., 0] == found[..., 1]).all()


def test_what_stands_in_a_text_is_no_markup(explorer):
    from lotlip.explore.page import attention_html, truncation_html

    text = "<img src=x>. " + "dog " * 40
    assert "<img" not in truncation_html(text, explorer.truncation(text))
    assert "<s>" in truncation_html(text, explorer.truncation(text))
    found = attention_html(explorer.analyse(Image.new("RGB", (16, 16)), text))
    assert "<img" not in found
    assert "&lt;img src=x&gt;" in found


def test_a_port_that_is_taken_is_an_error_in_words(explorer):
    from lotlip.explore.page import serve_page

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot be served on 127\.0\.0\.1: .*{port}.*choose another --port"):
            serve_page(explorer, port).__enter__()


def test_pages_of_other_sites_can_neither_read_nor_ask(explorer):
    import httpx

    from lotlip.explore.page import serve_page

    with serve_page(explorer) as address:
        for path in ("", "config", "gradio_api/upload"):
            assert httpx.get(address + path, headers={"Host": "evil.example"}).status_code == 421
            assert httpx.post(address + path, headers={"Origin": "http://evil.example"}).status_code == 403
            assert httpx.post(address + path, headers={"Origin": "http://127.0.0.1:1"}).status_code == 403
        assert httpx.get(address).status_code == 200
        assert httpx.get(f"{address}config", headers={"Origin": address.rstrip("/")}).status_code == 200


def test_a_picture_at_two_places_of_the_page_is_two_files(explorer):
    # Gradio writes a file again for each place, also while the browser reads it.
    from gradio import Gallery
    from gradio import Image as ImageOnPage

    from lotlip.explore.page import build_page

    picture, files = Image.new("RGB", (8, 8), "red"), {}
    for block in build_page(explorer).blocks.values():
        if isinstance(block, Gallery):
            files[block.elem_id] = block.postprocess([picture]).root[0].image.path
        elif isinstance(block, ImageOnPage):
            files["preview"] = block.postprocess(picture).path
    assert files["text-maps"] != files["pictures"]
    assert files["picture-maps"] != files["preview"]


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_the_page_in_a_browser(explorer, tmp_path, tiny_samples):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed: the page is not looked at")
    from playwright.sync_api import expect, sync_playwright

    from lotlip.explore.page import serve_page

    (tmp_path / "a.png").write_bytes(tiny_samples[0].image)
    (tmp_path / "broken.png").write_bytes(tiny_samples[0].image[:40])
    with serve_page(explorer) as address, sync_playwright() as playwright:
        assert urlsplit(address).hostname == "127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        expect.set_options(timeout=60_000)
        page.set_default_timeout(60_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
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
        browser.close()
    outside = [url for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")]
    assert {urlsplit(url).hostname for url in outside} == {"127.0.0.1"}
