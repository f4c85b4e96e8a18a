"""The chat page in a real Chromium."""

from __future__ import annotations

import re

import pytest
from browsing import browser
from playwright.sync_api import expect
from served import served

pytestmark = pytest.mark.chromium
expect.set_options(timeout=20_000)  # for a machine that is busy

# notes every length that the newest answer has had
GROWTH = """() => {
  window.growth = new Set();
  const note = () => growth.add(document.querySelector(".turn:last-child .answer > p")?.textContent.length);
  new MutationObserver(note).observe(document.getElementById("talk"), { childList: true, subtree: true });
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data"), latency=0.4) as child:
        yield child


@pytest.fixture
def page(server):
    """A page that must not complain, and must ask nobody but its server."""
    complaints, asked = [], []
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 360, "height": 740})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.address)
        yield page
    assert [c for c in complaints if "Failed to load resource" not in c] == []
    assert {re.match(r"\w+://[^/]*", url)[0] for url in asked} == {server.address}


def say(page, text):
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    return page.locator(".turn").last


def test_an_answer_streams_in_with_what_is_behind_it(page):
    page.get_by_label("You are").fill("Bo")
    say(page, "My sister Ana lives in Porto.")
    expect(page.locator(".about")).to_have_count(1)
    page.evaluate(GROWTH)
    turn = say(page, "Where does my sister live? I am worried.")
    expect(turn.locator(".about")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(turn.locator(".answer > p")).to_contain_text("Porto")
    assert len(page.evaluate("[...growth]")) > 4
    expect(turn.locator(".memories li").first).to_contain_text("My sister Ana lives in Porto.")
    expect(turn.get_by_role("meter", name="emotion: low")).to_be_visible()
    expect(turn.locator(".timings dt").filter(has_text="llm")).to_be_visible()
    expect(turn.locator(".timings .ms").last).to_contain_text(" ms")
    expect(page.get_by_role("status")).to_contain_text("Porto")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_each_name_has_its_own_memory_and_is_kept(page):
    page.get_by_label("You are").fill("Cleo")
    say(page, "My dog is called Rex.")
    expect(page.locator(".about")).to_be_visible()
    page.reload()
    expect(page.get_by_label("You are")).to_have_value("Cleo")
    page.get_by_label("You are").fill("Dan")
    turn = say(page, "What is my dog called?")
    expect(turn.locator(".about")).to_contain_text("nothing recalled")
    expect(turn.locator(".answer")).not_to_contain_text("Rex")


def test_shift_enter_makes_a_line_and_markup_stays_text(page):
    box = page.get_by_label("Your message")
    box.type("<img src=x onerror=alert(1)>")
    box.press("Shift+Enter")
    box.type("<b>two</b>")
    expect(page.locator(".turn")).to_have_count(0)
    box.press("Enter")
    expect(page.locator(".said")).to_have_text("<img src=x onerror=alert(1)>\n<b>two</b>", use_inner_text=True)
    expect(page.locator(".answer p").first).to_contain_text("<b>two</b>")
    assert page.locator("#talk img, #talk b").count() == 0


def test_nothing_is_sent_for_nothing(page):
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.get_by_label("Your message").fill("  \n ")
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".turn")).to_have_count(0)


def test_an_answer_can_be_stopped(tmp_path):
    with served(tmp_path, latency=20, drain_seconds=0.1) as server, browser() as chromium:
        page = chromium.new_page()
        page.goto(server.address)
        turn = say(page, "a long story please")
        expect(turn.locator(".streaming > p")).to_contain_text("You")
        page.get_by_role("button", name="Stop").click()
        expect(turn).to_contain_text("Stopped.")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.get_by_label("Your message")).to_be_focused()


def test_trying_again_is_the_same_message(page):
    keys = []

    def fail_first(route):
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            route.continue_()
        else:
            body = {"error": {"message": "nobody answers there", "type": "upstream_error", "code": "llm_unavailable"}}
            route.fulfill(status=502, json=body)

    page.route("**/v1/chat/completions", fail_first)
    turn = say(page, "hello")
    expect(turn.get_by_role("alert")).to_contain_text("The language model cannot be reached.")
    turn.get_by_role("button", name="Try again").click()
    expect(turn.locator(".about")).to_be_visible()
    expect(turn.get_by_role("alert")).to_have_count(0)
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_a_server_that_is_gone_is_said_kindly(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    expect(say(page, "hello").get_by_role("alert")).to_contain_text("The server cannot be reached.")


def test_the_keyboard_reaches_everything(page):
    say(page, "hello")
    expect(page.locator(".about")).to_be_visible()
    page.locator(".about summary").press("Enter")
    expect(page.locator(".inside")).to_be_hidden()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Your message")).to_be_focused()
    outline = page.locator("#text").evaluate("element => getComputedStyle(element).boxShadow")
    assert outline != "none"


def test_a_server_with_keys_asks_for_one(tmp_path):
    with served(tmp_path, api_keys="open-sesame") as server, browser() as chromium:
        page = chromium.new_page()
        page.goto(server.address)
        page.get_by_label("API key").fill("open-sesame")
        expect(say(page, "hello").locator(".about")).to_be_visible()
