"""Drives the server's page in headless Chromium, and prints as JSON what it saw.

Runs in an environment of its own: `python browse.py SCENE URL [WORDS...]`.
"""

import base64
import json
import os
import shutil
import sys
from contextlib import contextmanager

from playwright.sync_api import expect, sync_playwright

PATIENCE = 60_000
"""Milliseconds for what takes moments on an idle machine."""
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script></textarea>"
FOCUSED = """() => {
  const element = document.activeElement;
  const label = element.labels?.[0]?.innerText || element.getAttribute("aria-label") || element.innerText;
  const box = element.getBoundingClientRect();
  const style = getComputedStyle(element);
  return {
    name: (label ?? "").trim(), tag: element.tagName.toLowerCase(), ring: style.outlineStyle !== "none",
    seen: box.width > 1 && box.height > 1,
  };
}"""
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const field = ["INPUT", "TEXTAREA", "SELECT"].includes(element.tagName);
    if (!(own || field) || element.disabled || !element.checkVisibility() || element.closest(".unseen")) continue;
    const below = [];
    for (let at = element; at; at = at.parentElement) below.unshift(getComputedStyle(at).backgroundColor);
    const [ground, text] = [light(paint(below)), light(paint([...below, getComputedStyle(element).color]))];
    const ratio = (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    const name = `${element.tagName}.${element.className} ${element.innerText ?? ""}`.slice(0, 80);
    found.push([Math.round(ratio * 100) / 100, name]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@contextmanager
def page_of(url, key=None, watch=True, **options):
    """A page that has been opened, and what it must not do: a dictionary that fills as it does it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium: install Debian's package of that name")
    seen = {"console": [], "origins": [], "violations": [], "dialogs": []}
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not run as root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page = context.new_page()
        page.expose_function("violated", lambda directive: seen["violations"].append(directive))
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) => violated(event.violatedDirective))"
        )
        page.on("console", lambda line: line.type in ("error", "warning") and seen["console"].append(line.text))
        page.on("pageerror", lambda error: seen["console"].append(str(error)))
        page.on("dialog", lambda dialog: (seen["dialogs"].append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda request: origin(request.url) in seen["origins"] or seen["origins"].append(origin(request.url)),
        )
        if key is not None:
            # As a browser that has asked for the password, but for this one address only.
            word = base64.b64encode(f"me:{key}".encode()).decode()
            page.route(
                url + "/",
                lambda route: route.continue_(headers=route.request.headers | {"authorization": f"Basic {word}"}),
            )
        if watch:
            page.goto(url + "/")
        yield page, seen
        browser.close()


def origin(url):
    return "data:" if url.startswith("data:") else "/".join(url.split("/", 3)[:3])


def loaded(page):
    """Once the models are there."""
    expect(page.locator("#chat select option").first).to_be_attached()


def ended(page, panes=1, turns=1):
    """Once the last answers of all panes have come to an end."""
    expect(page.locator(".view:not([hidden]) .answer:not(.busy)")).to_have_count(panes * turns)


def answers(page):
    """Of the panes in sight."""
    found = []
    for answer in page.locator(".view:not([hidden]) .answer").all():
        wrong = answer.locator(".wrong")
        found.append(
            {
                "model": answer.locator("h3").text_content(),
                "text": answer.locator(".text").text_content(),
                "figures": answer.locator(".figures li").all_text_contents(),
                "wrong": wrong.text_content() if wrong.count() else None,
            }
        )
    return found


def ask(page, prompt):
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").press("Enter")


def greedy(page, tokens):
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill(str(tokens))


def chat(url):
    """Two turns, and the charts after them."""
    with page_of(url, permissions=["clipboard-read", "clipboard-write"]) as (page, seen):
        loaded(page)
        greedy(page, 12)
        sent = []
        page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Top p").fill("0.9")
        page.get_by_label("Seed").fill("7")
        ask(page, "One")
        ended(page)
        ask(page, "Two")
        ended(page, turns=2)
        live = page.locator("#charts figure")
        expect(live.nth(0).locator(".now li").first).to_contain_text("tokens/s")
        expect(live.nth(1).locator(".now li").first).to_contain_text("p95")
        found = {
            "models": page.locator("#chat select option").all_text_contents(),
            "answers": answers(page),
            "sent": sent,
            "said": page.locator("#status").text_content(),
            "charts": {
                figure.locator("h3").evaluate("h => h.firstChild.data"): figure.locator(".now li").all_text_contents()
                for figure in live.all()
            },
            "ink": [canvas.evaluate(INK) for canvas in page.locator("canvas").all()],
        }
        page.get_by_role("button", name="Copy").last.click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        found["copied"] = page.evaluate("() => navigator.clipboard.readText()")
        page.get_by_role("button", name="Clear").click()
        found["cleared"] = page.locator("#chat .turn").count()
    return found | seen


INK = "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
"""How many colours a canvas shows."""


def stop(url, way):
    """An answer that is stopped by `Escape` or by the button, and one after it."""
    with page_of(url) as (page, seen):
        loaded(page)
        greedy(page, 100)
        ask(page, "Go on and on")
        expect(page.locator(".answer .text")).not_to_be_empty()
        if way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        ended(page)
        first = answers(page)
        greedy(page, 3)
        ask(page, "Again")
        ended(page, turns=2)
        return {"stopped": first[0], "next": answers(page)[1]} | seen


def compare(url):
    """One prompt for two models."""
    with page_of(url) as (page, seen):
        loaded(page)
        greedy(page, 40)
        page.get_by_role("button", name="Side by side").click()
        models = [select.input_value() for select in page.locator("#compare select").all()]
        ask(page, "Which of you is faster?")
        expect(page.locator("#compare .answer.busy")).to_have_count(2)
        ended(page, panes=2)
        verdict = page.locator("#verdict span").text_content()
        return {"models": models, "answers": answers(page), "verdict": verdict} | seen


def keyboard(url):
    """All of it without a mouse."""
    with page_of(url) as (page, seen):
        loaded(page)
        start = page.evaluate(FOCUSED)
        page.keyboard.type("first line")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("second line")
        draft = page.locator("#prompt").input_value()
        page.locator("body").evaluate("() => document.activeElement.blur()")
        page.locator(".skip").focus()
        stops = [page.evaluate(FOCUSED)]
        while stops[-1]["name"] != "Clear" and len(stops) < 40:
            page.keyboard.press("Tab")
            stops.append(page.evaluate(FOCUSED))
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        skipped = page.evaluate(FOCUSED)
        page.keyboard.press("Enter")
        expect(page.locator(".answer .text")).not_to_be_empty()
        page.keyboard.press("Tab")
        on_stop = page.evaluate(FOCUSED)
        page.keyboard.press("Escape")
        ended(page)
        after = page.evaluate(FOCUSED)
        said = page.locator(".you .text").text_content()
        found = {"start": start, "draft": draft, "stops": stops, "skipped": skipped, "said": said}
        return found | {"on_stop": on_stop, "after": after, "answers": answers(page)} | seen


def looks(url, scheme):
    """Colours, and widths of a phone."""
    with page_of(url, color_scheme=scheme, reduced_motion="reduce") as (page, seen):
        loaded(page)
        greedy(page, 4)
        ask(page, "Hello")
        ended(page)
        ground = "() => getComputedStyle(document.body).backgroundColor"
        found = {"contrasts": page.evaluate(CONTRASTS)[:5], "ground": page.evaluate(ground)}
        themes = page.locator("#theme")
        found["themes"] = {}
        for _ in range(3):
            themes.click()
            found["themes"][themes.text_content()] = page.evaluate(ground)
        wider = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        found["wider"] = []
        for width in (360, 390, 600, 860, 1100):
            page.set_viewport_size({"width": width, "height": 740})
            for name in ("Chat", "Side by side"):
                page.get_by_role("button", name=name).click()
                found["wider"].append(page.evaluate(wider))
        return found | seen


def hostile(url):
    """Names and answers that try to become markup."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": text}}]} for text in (HOSTILE, "\n```\n", HOSTILE, "\n```\n")
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    listing = {"data": [{"id": HOSTILE, "kind": "language", "max_model_len": 64, "state": HOSTILE}]}
    with page_of(url, watch=False) as (page, seen):
        page.route("**/v1/models", lambda route: route.fulfill(json=listing))
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        page.goto(url + "/")
        loaded(page)
        ask(page, HOSTILE)
        ended(page)
        found = {"hostile": HOSTILE, "answers": answers(page), "asked": page.locator(".you .text").text_content()}
        found["options"] = page.locator("#chat select option").all_text_contents()
        found["elements"] = page.locator("main :is(img, script, iframe, a)").count()
        return found | seen


def broken(url):
    """An error in the middle of an answer, a stream that ends too early, and a server that is full."""
    piece = 'data: {"choices": [{"index": 0, "delta": {"content": "Some"}}]}\n\n'
    error = 'data: {"error": {"message": "it broke", "type": "server_error", "param": null, "code": "worker_died"}}\n\n'
    full = {"error": {"message": "too many wait", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
    replies = [
        {"body": piece + error, "content_type": "text/event-stream", "headers": {"x-request-id": "req_1"}},
        {"body": piece, "content_type": "text/event-stream"},
        {"json": full, "status": 429, "headers": {"retry-after": "3", "x-request-id": "req_3"}},
    ]
    with page_of(url) as (page, seen):
        loaded(page)
        left = iter(replies)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**next(left)))
        for turn in (1, 2, 3):
            ask(page, "Hello")
            ended(page, turns=turn)
        return {"answers": answers(page)} | seen


def raw(url):
    """A model without a chat template."""
    with page_of(url) as (page, seen):
        loaded(page)
        greedy(page, 6)
        ask(page, "Once upon a time")
        ended(page)
        refused = answers(page)
        page.get_by_role("button", name="Send it raw").click()
        expect(page.locator(".answer .text.raw .given")).to_have_count(1)
        ended(page)
        return {"refused": refused, "answers": answers(page)} | seen


def key(url, right):
    """A server that wants a key."""
    with page_of(url, key=right) as (page, seen):
        form, field = page.locator("#keyform"), page.get_by_label("API key")
        expect(form).to_be_visible()
        found = {"first": form.locator("p").text_content(), "focus": page.evaluate(FOCUSED)["name"]}
        field.fill("wrong")
        field.press("Enter")
        expect(form.locator("p")).to_contain_text("not accepted")
        field.fill(right)
        field.press("Enter")
        expect(form).to_be_hidden()
        loaded(page)
        ask(page, "Hello")
        ended(page)
        expect(page.locator("#charts .now li").first).to_contain_text("tokens/s")
        found["answers"] = answers(page)
        found["kept"] = page.evaluate(
            "() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
        )
        page.reload()
        loaded(page)
        found["asked again"] = form.is_visible()
        return found | seen


SCENES = (chat, stop, compare, keyboard, looks, hostile, broken, raw, key)

if __name__ == "__main__":
    scene, *words = sys.argv[1:]
    sys.stdout.write(json.dumps({one.__name__: one for one in SCENES}[scene](*words)))
