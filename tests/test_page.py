"""The page of `vlkd serve` as a person uses it: in a headless Chromium, which may reach nothing but the server."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_serve import serving

from vlkd_jax.shapes import world
from vlkd_jax.vlkd import VLKD

CLIENTS = 20
expect.set_options(timeout=60_000)  # a program may be compiled first, on a busy machine
QUESTIONS = ("what color is the triangle?", "how many objects are there?", "where is the cross?")


@pytest.fixture(scope="module")
def model():
    return VLKD.from_pretrained()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        told = "these tests drive a Chromium, and there is none here (Debian's package: chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "scene.png"
    Image.fromarray(world.render(world.make_scene(5, "test", 3))).save(path)
    return path


@pytest.fixture
def page(browser, model):
    """A page that is open; whatever it asks for elsewhere, and whatever its script says is wrong, fails the test."""
    with serving(model, per_minute=10_000, waiting=100) as port:
        opened = browser.new_page()
        faults = []
        opened.on("request", lambda request: outside(request, port) and faults.append(request.url))
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.goto(f"http://127.0.0.1:{port}/")
        yield opened
        opened.close()
        assert not faults


def outside(request, port):
    return not re.match(rf"(http://127\.0\.0\.1:{port}/|blob:|data:)", request.url)


def shown(page, name):
    """The texts of a list of alternatives, without their scores."""
    expect(page.locator(f"#{name} li").first).to_be_visible()
    return [re.sub(r"\s*[−\d.]+$", "", text) for text in page.locator(f"#{name} li").all_inner_texts()]


def test_a_picture_three_questions_and_where_it_looked(page, model, picture):
    expect(page.locator("#question")).to_be_disabled()
    page.locator("#file").set_input_files(picture)
    assert shown(page, "captions")[0] == model.caption(picture, method="beam", returns=3)[0]
    for question in QUESTIONS:
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        expect(page.locator("#answers li").first).to_be_visible()
        (answer,) = shown(page, "answers")[:1]
        assert answer == model.answer(picture, question, method="beam", returns=3)[0]
        attended = model.attention(picture, question, answer)
        expect(page.locator("#where")).to_be_visible()
        assert page.locator("#tokens button").count() == len(attended.tokens)
    token = page.locator("#tokens button").first
    token.click()
    assert token.get_attribute("aria-pressed") == "true"
    share = 100 * attended.patches[0].sum()
    expect(page.locator("#share")).to_contain_text(f"{share:.0f}% were parts of the picture")
    bright = page.evaluate(
        "side => { const c = document.getElementById('map'), p = c.width / side, x = c.getContext('2d');"
        "return [...Array(side * side).keys()].map(k => { const d = x.getImageData("
        "(k % side + 0.5) * p, (Math.floor(k / side) + 0.5) * p, 1, 1).data; return d[0] + d[1] + d[2]; }); }",
        len(attended.patches[0]),
    )
    patches = attended.patches[0].ravel()
    assert bright[int(patches.argmax())] > 1.5 * np.mean([bright[k] for k in patches.argsort()[: len(patches) // 4]])


def test_a_file_that_is_no_picture_is_said_and_the_next_one_works(page, picture, tmp_path):
    bad = tmp_path / "notes.png"
    bad.write_text("<script>alert(1)</script>")
    page.locator("#file").set_input_files(bad)
    expect(page.locator("#error")).to_be_visible()
    expect(page.locator("#error")).to_contain_text("notes.png")
    expect(page.locator("#question")).to_be_disabled()
    page.locator("#file").set_input_files(picture)
    assert shown(page, "captions") and page.locator("#error").is_hidden()


def test_twenty_people_at_once(browser, model, tmp_path):
    """Each is answered about the own picture."""
    with serving(model, per_minute=10_000, waiting=100) as port:
        pages, pictures = [browser.new_page() for _ in range(CLIENTS)], []
        for k, page in enumerate(pages):
            pictures.append(tmp_path / f"{k}.png")
            Image.fromarray(world.render(world.make_scene(6, "test", k))).save(pictures[-1])
            page.goto(f"http://127.0.0.1:{port}/")
        for page, picture in zip(pages, pictures, strict=True):
            page.locator("#file").set_input_files(picture)
        said = [shown(page, "captions")[0] for page in pages]
        assert said == [captions[0] for captions in model.caption(pictures, method="beam", returns=3)]
        assert len(set(said)) > CLIENTS // 2
        for page in pages:
            page.close()
