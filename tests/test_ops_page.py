"""The operations page in a real Chromium: idle, busy and failing, with a screenshot of each in the test's folder."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from browsing import browser
from playwright.sync_api import expect
from served import served

pytestmark = pytest.mark.chromium
expect.set_options(timeout=20_000)  # for a machine that is busy

# the contrast of every text with what is behind it, as WCAG 2 counts it; the text where it is too low
CONTRAST = """() => {
  const linear = (x) => x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = parts(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data, node = walker.currentNode.parentElement;
    if (!text.trim() || !node.checkVisibility() || node.closest(".unseen, noscript")) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${text} ${ratio.toFixed(2)}`);
  }
  return low;
}"""
# what a screen reader could not name: controls, regions and meters without a name
NAMELESS = """() => {
  const kinds = "button, input, a, section, [role=region], [role=meter], [role=switch]";
  const named = (node) => node.ariaLabel || node.labels?.length
    || (node.matches("button, a") && node.textContent.trim())
    || document.getElementById(node.getAttribute("aria-labelledby"))?.textContent;
  const seen = [...document.querySelectorAll(kinds)].filter((node) => node.checkVisibility());
  return seen.filter((node) => !named(node)).map((node) => node.outerHTML.slice(0, 200));
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data"), latency=0.4, process_pool_size=1) as child:
        yield child


@contextmanager
def looking(address, **more):
    """A page that must not complain, and must ask nobody but its server."""
    complaints, asked = [], []
    with browser() as chromium:
        page = chromium.new_page(**{"viewport": {"width": 1280, "height": 900}, **more})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/ops")
        yield page
    assert [c for c in complaints if "Failed to load resource" not in c] == []
    assert {re.match(r"\w+://[^/]*", url)[0] for url in asked} == {address}


def say(address, number, *, key=None):
    """Send one message; return the status of its answer."""
    body = {"model": "whisper-fast", "user": f"u{number}", "messages": [{"role": "user", "content": "hello"}]}
    headers = {"content-type": "application/json", "idempotency-key": f"m{number}"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def picture(page, path):
    """Keep a screenshot; Playwright's own way to write it leaves a thread behind."""
    path.write_bytes(page.screenshot(full_page=True))


def shown(page, name):
    return page.locator(f'[data-show="{name}"]')


def row(page, table, name):
    exact = isinstance(name, str)
    return page.locator(f"#{table} tr").filter(has=page.get_by_role("rowheader", name=name, exact=exact))


def test_idle_and_busy(server, tmp_path):
    with looking(server.address) as page, ThreadPoolExecutor(70) as users:
        expect(page.locator("#state")).to_have_text("All is well")
        expect(shown(page, "running")).to_contain_text("0 of")
        expect(page.get_by_text("No reply in this time.")).to_be_visible()
        picture(page, tmp_path / "idle.png")

        answers = [users.submit(say, server.address, number) for number in range(70)]
        expect(shown(page, "running")).not_to_contain_text(re.compile(r"^0 of"))
        picture(page, tmp_path / "busy.png")
        assert {answer.result() for answer in answers} == {200}
        expect(shown(page, "accepted")).to_contain_text("70 in all")
        expect(row(page, "replies", "The whole reply")).to_contain_text("ms")
        expect(row(page, "endpoints", "simulated")).to_contain_text("well")
        expect(row(page, "batchers", "embedding")).to_contain_text("%")
        expect(row(page, "caches", "memories")).to_contain_text("256 MiB")
        expect(shown(page, "answered")).to_have_text("0.0")

        slow = page.locator("#slowest .turn").first
        slow.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(slow.get_by_text("journal", exact=True)).to_be_visible()
        page.get_by_label("Message id").fill("m7")
        page.keyboard.press("Enter")
        expect(page.locator("#found .timings")).to_be_visible()
        expect(page.get_by_role("status")).to_contain_text("m7 took")
        page.get_by_label("Message id").fill("<b>nobody</b>")
        page.keyboard.press("Enter")
        expect(page.locator("#found")).to_contain_text("no message '<b>nobody</b>' is among the latest")


def test_a_flag_is_switched_by_keyboard_and_its_reason_is_kept(server):
    with looking(server.address) as page:
        page.get_by_label("Reason for the next change").fill("<i>costly</i>")
        lever = page.get_by_role("switch", name="hedging")
        expect(lever).to_have_attribute("aria-checked", "true")
        lever.focus()
        page.keyboard.press("Space")
        expect(lever).to_have_attribute("aria-checked", "false")
        expect(lever).to_be_focused()
        expect(row(page, "changes", re.compile("."))).to_contain_text("hedging off")
        expect(page.locator("#changes")).to_contain_text("local: <i>costly</i>")
        lever.click()
        expect(lever).to_have_attribute("aria-checked", "true")
        expect(page.locator("#changes tbody tr")).to_have_count(2)


def test_it_is_readable_for_everybody(server):
    with looking(server.address) as page:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            expect(page.locator("#state")).to_have_text("All is well")
            assert page.evaluate(CONTRAST) == []
        assert page.evaluate(NAMELESS) == []
        page.set_viewport_size({"width": 320, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to the figures")).to_be_focused()
        page.get_by_role("button", name="Pause").focus()
        page.keyboard.press("Space")
        expect(page.locator("#state")).to_have_text("Paused")
        expect(page.get_by_role("button", name="Pause")).to_have_attribute("aria-pressed", "true")
        page.keyboard.press("Space")
        expect(page.locator("#state")).to_have_text("All is well")


def test_failing_and_gone(tmp_path):
    dead = {"llm": "http://127.0.0.1:9/v1", "drain_seconds": 0.2, "process_pool_size": 1}
    with (
        served(tmp_path / "data", **dead) as server,
        looking(server.address) as page,
        ThreadPoolExecutor(8) as users,
    ):
        assert set(users.map(say, [server.address] * 8, range(8))) == {502}
        expect(page.locator("#state")).to_contain_text("to see to")
        expect(page.locator("#problems")).to_contain_text("keeps failing and is left alone")
        expect(page.locator("#problems")).to_contain_text("wait to be tried again")
        expect(page.locator("#endpoints")).to_contain_text(re.compile("left alone|being tried"))
        expect(row(page, "errors", "LLMUnavailable")).to_be_visible()
        expect(page.get_by_role("status")).to_contain_text("keeps failing")
        picture(page, tmp_path / "failing.png")
        server.terminate()
        expect(page.locator("#state")).to_have_text("No connection")
        expect(page.get_by_role("status")).to_contain_text("is lost")


def test_it_asks_for_the_key_of_an_operator(tmp_path):
    keys = {"api_keys": "plain", "trusted_api_keys": "operator", "process_pool_size": 1}
    with served(tmp_path, **keys) as server, looking(server.address) as page:
        field = page.get_by_label("Trusted API key")
        expect(field).to_be_focused()
        expect(page.locator("#state")).to_have_text("Needs a key")
        field.fill("plain")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("WHISPER_FAST_TRUSTED_API_KEYS")
        field.fill("operator")
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("All is well")
        page.reload()
        expect(page.locator("#state")).to_have_text("All is well")
