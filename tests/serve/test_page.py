"""The page in a real browser: by keyboard, on a phone's width, in the dark, without any outside asset."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moreward.scoring import Scorer
from serving import Live

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

PROMPT = "Tell me of the sea."
RESPONSES = ("No.", "It is calm, and there is more to say of it.", "Perhaps.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (360, "dark")])
def test_a_ranking_is_made_by_keyboard_alone(
    width: int, scheme: Any, browser: Any, live: Live, scorer: Scorer, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{live.url}/")
    page.get_by_text("arliss").wait_for()
    page.get_by_label("Prompt").focus()
    page.keyboard.type(PROMPT)
    page.get_by_role("button", name="Add a response").press("Enter")
    for number, text in enumerate(RESPONSES, start=1):
        page.get_by_label(f"Response {number}", exact=True).focus()
        page.keyboard.type(text)
    page.keyboard.press("Control+Enter")
    page.locator("#ranking li").nth(2).wait_for()
    shown = page.locator("#ranking .head strong").all_inner_texts()
    wanted = scorer.compare(PROMPT, RESPONSES, uncertainty=True)
    assert shown == [f"{rank}. Response {i + 1}" for rank, i in enumerate(wanted.order, start=1)]
    numbers = [float(t.replace("−", "-")) for t in page.locator("#ranking .reward").all_inner_texts()]
    assert numbers == pytest.approx([wanted.rewards[i].number for i in wanted.order], abs=6e-4)
    text = page.locator("#ranking").inner_text()
    assert "What each expert says" in text
    assert "How far to trust it" in text
    share = round(100 * wanted.probabilities[wanted.order[0]][wanted.order[1]])
    assert f"with probability {share} % (calibrated)" in page.locator("#summary").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing stands out sideways"
    assert {url.startswith((live.url, "data:")) for url in asked} == {True}
    assert errors == []
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    page.close()


def test_what_is_wrong_is_said_and_one_expert_can_judge(browser: Any, live: Live, scorer: Scorer) -> None:
    page = browser.new_page()
    page.goto(f"{live.url}/")
    page.get_by_text("arliss").wait_for()
    page.get_by_role("button", name="Score").click()
    page.locator("#error").get_by_text("responses[0] is empty").wait_for()
    page.get_by_role("button", name="Remove response 2").click()
    page.get_by_label("Response 1", exact=True).fill(RESPONSES[1])
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Judge").select_option("long")
    page.get_by_role("button", name="Score").click()
    page.locator("#ranking li").wait_for()
    number = float(page.locator("#ranking .reward").inner_text().replace("−", "-"))
    assert number == pytest.approx(scorer.score([(PROMPT, RESPONSES[1])], expert="long")[0].number, abs=6e-4)
    assert page.locator("#error").inner_text() == ""
    page.close()
