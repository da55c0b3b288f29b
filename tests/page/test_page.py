"""The chat page in a real browser, against a server that answers as the test says."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest

from .conftest import Visit
from .stub_server import Refusal, Writer, say


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}


def for_ever(send: Writer) -> None:
    """An answer that only ends when nobody listens any more."""
    for number in itertools.count():
        send(piece(f"word{number} "))
        time.sleep(0.02)


def test_an_answer_streams(visit: Visit) -> None:
    go_on = threading.Event()

    def answer(send: Writer) -> None:
        send(piece("One, "))
        assert go_on.wait(20)
        say("two.")(send)

    visit.server.answers.append(answer)
    visit.open().send("Count!")
    visit.answers().get_by_text("One,").wait_for()
    assert "two" not in visit.answers().inner_text()
    assert visit.page.get_by_role("button", name="Stop").is_visible()
    assert visit.answers().get_attribute("aria-busy") == "true"
    go_on.set()
    assert "One, two." in visit.done().inner_text()
    assert visit.page.get_by_role("button", name="Send").is_visible()
    asked = visit.server.asked[0]
    assert asked["stream"] is True and asked["messages"] == [{"role": "user", "content": "Count!"}]


def test_a_second_turn_carries_the_first(visit: Visit) -> None:
    visit.server.answers += [say("Hel", "lo."), say("Still here.")]
    visit.open().send("Hi")
    visit.done()
    visit.send("And now?")
    assert "Still here." in visit.done(1).inner_text()
    assert [(m["role"], m["content"]) for m in visit.server.asked[1]["messages"]] == [
        ("user", "Hi"), ("assistant", "Hello."), ("user", "And now?"),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_hangs_up_and_keeps_what_was_said(visit: Visit, how: str) -> None:
    visit.server.answers += [for_ever, say("Back.")]
    visit.open().send("Talk!")
    visit.answers().get_by_text("word2 ").wait_for()
    if how == "button":
        visit.page.get_by_role("button", name="Stop").click()
    else:
        visit.page.keyboard.press("Escape")
    shown = visit.done().inner_text()
    assert "word2" in shown and "stopped" in shown
    assert visit.server.gone.wait(20), "the request was not aborted"
    visit.send("Go on.")
    visit.done(1)
    roles = [(m["role"], m["content"].startswith("word0 ")) for m in visit.server.asked[1]["messages"]]
    assert roles == [("user", False), ("assistant", True), ("user", False)]


def test_a_new_conversation_forgets_also_a_running_answer(visit: Visit) -> None:
    visit.server.answers += [say("One."), for_ever, say("Anew.")]
    visit.open().send("Hi")
    visit.done()
    visit.send("Talk!")
    visit.answers().get_by_text("word2 ").wait_for()
    visit.page.get_by_role("button", name="New conversation").click()
    assert visit.server.gone.wait(20)
    assert visit.answers().count() == 0
    assert visit.page.get_by_role("heading", name="Ask the model something").is_visible()
    visit.send("Who?")
    assert "Anew." in visit.done().inner_text()
    assert [m["content"] for m in visit.server.asked[-1]["messages"]] == ["Who?"]


def test_one_answer_at_a_time(visit: Visit) -> None:
    visit.server.answers += [for_ever]
    visit.open().send("Talk!")
    visit.answers().get_by_text("word2 ").wait_for()
    visit.send("Me too!")
    assert visit.answers().count() == 1 and len(visit.server.asked) == 1
    assert visit.page.get_by_label("Message", exact=True).input_value() == "Me too!"  # kept for later
    visit.page.keyboard.press("Escape")
    visit.done()


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Refusal(500, "an error inside the server"), "an error inside the server."),
        (Refusal(429, "3 requests are waiting already", "queue_full", {"Retry-After": "7"}), "Try again in 7 s."),
        (Refusal(400, "too long", "context_length_exceeded"), "Start a new conversation"),
        (Refusal(503, ""), "the server answered 503"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Refusal) else "",
)
def test_errors_are_said_and_can_be_tried_again(visit: Visit, refusal: Refusal, words: str) -> None:
    visit.server.answers += [refusal, say("Now it works.")]
    visit.open().send("Hi")
    assert words in visit.page.get_by_role("alert").inner_text()
    visit.page.get_by_role("button", name="Try again").click()
    assert "Now it works." in visit.done().inner_text()
    assert visit.page.get_by_role("alert").count() == 0
    assert [m["content"] for m in visit.server.asked[1]["messages"]] == ["Hi"]


def test_an_error_in_the_middle_keeps_what_was_said(visit: Visit) -> None:
    def answer(send: Writer) -> None:
        send(piece("Half of"))
        send({"error": {"message": "the weights are broken", "code": "internal_error"}})

    visit.server.answers.append(answer)
    visit.open().send("Hi")
    assert "Half of" in visit.done().inner_text()
    assert "the weights are broken." in visit.page.get_by_role("alert").inner_text()


def test_a_connection_that_ends_early_is_no_answer(visit: Visit) -> None:
    visit.server.answers.append(lambda send: send(piece("Half of")))
    visit.open().send("Hi")
    assert "the connection ended before the answer did" in visit.done().inner_text()


def test_a_server_that_is_gone(visit: Visit) -> None:
    visit.open()
    visit.server.shutdown()
    visit.server.server_close()
    visit.send("Hi")
    assert "the server cannot be reached" in visit.page.get_by_role("alert").inner_text()


def test_the_api_key_is_asked_for_and_used(visit: Visit) -> None:
    visit.server.api_key = "sesame"
    visit.page.goto(visit.server.url)
    field = visit.page.get_by_label("API key")
    field.wait_for()
    visit.send("Hi")
    field.wait_for()
    assert visit.answers().count() == 0
    field.fill("wrong")
    visit.page.keyboard.press("Enter")
    visit.page.locator("label").get_by_text("does not take this API key").wait_for()
    visit.page.locator("#key").fill("sesame")
    visit.page.keyboard.press("Enter")
    visit.done()  # the message was kept, and sent
    assert visit.server.keys == ["Bearer sesame"]
    assert visit.page.get_by_role("heading", name="stub-moe").is_visible()
    visit.page.reload()
    visit.send("Again")
    visit.done()
    assert visit.server.keys[-1] == "Bearer sesame"


HOSTILE = """<script>document.title='hacked'</script><img src=x onerror="alert(1)">
# <b onclick=alert(1)>heading</b>
- <svg onload=alert(1)> item
> <iframe src="javascript:alert(1)"></iframe>

| <i>cell</i> | b |
|---|---|
| <a href=javascript:alert(1)>c</a> | ![pixel](http://evil.test/x.png) |

[click](javascript:alert(1)) [data](data:text/html,<script>alert(1)</script>) [fine](https://example.org/a?b=1)

```html
<script>alert(2)</script>
```
`</code><script>alert(3)</script>`"""


def test_hostile_text_is_shown_as_text(visit: Visit) -> None:
    visit.server.model = "<img src=x onerror=alert(0)>"
    visit.server.answers.append(say(*(HOSTILE[at : at + 7] for at in range(0, len(HOSTILE), 7))))
    visit.page.goto(visit.server.url)
    visit.send("<script>alert('me')</script>")
    answer = visit.done()
    shown = answer.inner_text()
    for words in (
        "<script>document.title='hacked'</script>", "<b onclick=alert(1)>heading</b>", "<svg onload=alert(1)>",
        "<iframe", "<i>cell</i>", "![pixel](http://evil.test/x.png)", "<script>alert(2)</script>",
        "[click](javascript:alert(1))", "</code><script>alert(3)</script>",
    ):  # fmt: skip
        assert words in shown
    assert answer.locator("script, img, svg, iframe, b, i, [onclick], [onload], [onerror]").count() == 0
    links = answer.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/a?b=1"]
    assert "noopener" in (links.first.get_attribute("rel") or "")
    assert "<script>alert('me')</script>" in visit.page.locator("article.user").inner_text()
    assert "hacked" not in visit.page.title()
    assert visit.page.locator("h1").inner_text() == visit.server.model
    assert visit.page.locator("h1 *").count() == 0


def picture(visit: Visit) -> str:
    """The map as it is drawn."""
    found: str = visit.page.evaluate("() => document.getElementById('heat').toDataURL()")
    return found


def num_colors(visit: Visit) -> int:
    found: int = visit.page.evaluate(
        "() => { const c = document.getElementById('heat');"
        " const {data} = c.getContext('2d').getImageData(0, 0, c.width, c.height);"
        " return new Set(new Uint32Array(data.buffer)).size; }"
    )
    return found


def test_the_heat_map_follows_the_answer(visit: Visit) -> None:
    visit.open()
    visit.page.locator("#heat").wait_for()
    before, colors = picture(visit), num_colors(visit)
    visit.server.answers.append(for_ever)
    visit.send("Talk!")
    visit.page.get_by_text("12.5 tokens/s").wait_for()
    visit.page.wait_for_timeout(1500)
    assert visit.page.locator("#queue").inner_text() == "Answering."
    assert picture(visit) != before and num_colors(visit) >= colors + 2  # of what is in a slot, and of what is not
    visit.page.keyboard.press("Escape")
    visit.done()
    assert picture(visit) != before
    assert visit.page.get_by_role("img", name="Map of 4 layers by 16 experts").is_visible()
    assert "50 % of this answer's experts" in (visit.page.locator("#heat").get_attribute("aria-label") or "")
    assert visit.page.locator("#moved").inner_text() == "3.4 GB"
    assert visit.page.locator("#hit-rate").inner_text() == "50 %"
    polls = len(visit.requests)
    visit.page.wait_for_timeout(1000)
    assert len(visit.requests) == polls, "nothing is asked when nothing runs"


def test_how_many_are_answered_and_wait(visit: Visit) -> None:
    for parallel, active, waiting, words in (
        (None, 0, 0, "Idle."),
        (None, 1, 3, "Answering, 3 waiting (at most 64)."),
        (1, 1, 0, "Answering."),
        (4, 0, 0, "Idle."),
        (4, 2, 0, "2 of 4 answering."),
        (4, 4, 3, "4 of 4 answering, 3 waiting (at most 64)."),
        (4, 0, 1, "0 of 4 answering, 1 waiting (at most 64)."),  # before its first step
    ):
        visit.server.parallel, visit.server.num_elsewhere, visit.server.num_waiting = parallel, active, waiting
        visit.open()
        assert visit.page.locator("#queue").inner_text() == words


def test_this_answer_and_all_of_them(visit: Visit) -> None:
    visit.server.num_polls = 40
    visit.open()
    everything = picture(visit)
    visit.send("Hi")
    visit.done()
    of_answer = picture(visit)
    visit.page.get_by_role("button", name="all", exact=True).click()
    assert visit.page.get_by_role("button", name="all", exact=True).get_attribute("aria-pressed") == "true"
    assert picture(visit) != of_answer
    assert everything != of_answer


def test_cells_are_read_with_the_keyboard_and_the_pointer(visit: Visit) -> None:
    visit.server.num_polls = 40
    visit.open()
    heat, read = visit.page.locator("#heat"), visit.page.locator("#heat-read")
    heat.focus()
    visit.page.keyboard.press("ArrowRight")
    assert read.inner_text() == "layer 0, expert 0: used 5 times, 3 times in a slot"
    visit.page.keyboard.press("ArrowDown")
    assert read.inner_text().startswith("layer 1, expert 0:")
    box = heat.bounding_box()
    assert box is not None
    visit.page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 3)
    assert read.inner_text().startswith("layer 0, expert 15:")


def test_without_an_accelerator_there_are_no_hits_to_speak_of(visit: Visit) -> None:
    visit.server.accelerator = "none"
    visit.open().send("Hi")
    assert "at hand" not in visit.done().inner_text()
    assert visit.page.get_by_text("all experts on the CPU").is_visible()
    assert visit.page.locator("#hit-rate").inner_text() == "–"
    assert visit.page.get_by_text("computed on the CPU").is_visible()
    assert not visit.page.locator("#busy").is_visible()


def test_everything_by_keyboard(visit: Visit) -> None:
    visit.open()
    message = visit.page.get_by_label("Message", exact=True)
    assert message.evaluate("element => element === document.activeElement")
    visit.page.keyboard.type("one")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("two")
    visit.page.keyboard.press("Enter")
    visit.done()
    assert visit.server.asked[0]["messages"][0]["content"] == "one\ntwo"
    assert message.evaluate("element => element === document.activeElement")
    visit.page.keyboard.press("ArrowUp")
    assert message.input_value() == "one\ntwo"
    names = []
    for _ in range(14):
        visit.page.keyboard.press("Tab")
        names.append(
            visit.page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()")
        )
    assert {"send", "Settings", "of-answer", "of-all", "heat", "new", "theme", "Copy"} <= set(names)


def test_settings_are_sent_and_kept(visit: Visit) -> None:
    visit.open()
    visit.page.get_by_text("Settings").click()
    visit.page.get_by_label("System message").fill("Be brief.")
    visit.page.get_by_label("Temperature").fill("0.2")
    visit.page.get_by_label("Longest answer").fill("12")
    visit.page.keyboard.press("Escape")
    visit.server.answers.append(say("Cut", finish="length"))
    visit.send("Hi")
    assert "the longest answer was reached" in visit.done().inner_text()
    asked = visit.server.asked[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["max_tokens"]) == (0.2, 12)
    visit.page.reload()
    visit.send("Hi")
    visit.done()
    assert visit.server.asked[1]["temperature"] == 0.2


def test_thoughts_are_folded_away_and_not_sent_back(visit: Visit) -> None:
    def answer(send: Writer) -> None:
        send({"choices": [{"delta": {"reasoning_content": "Let me see."}, "finish_reason": None}]})
        say("Four.")(send)

    visit.server.answers.append(answer)
    visit.open().send("2 + 2?")
    shown = visit.done()
    assert "Four." in shown.inner_text() and "Let me see." not in shown.inner_text()
    shown.get_by_text("Thoughts").click()
    assert shown.get_by_text("Let me see.").is_visible()
    visit.send("Sure?")
    visit.done(1)
    assert [m["content"] for m in visit.server.asked[1]["messages"]] == ["2 + 2?", "Four.", "Sure?"]


@pytest.mark.parametrize("size", [(390, 844), (320, 568), (1280, 800)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_nothing_sticks_out(visit: Visit, size: tuple[int, int]) -> None:
    visit.page.set_viewport_size({"width": size[0], "height": size[1]})
    visit.server.model = "A-model-with-a-rather-long-name-that-goes-on-and-on-Q4_K_M"
    visit.server.answers.append(
        say("x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n| " + "| wide " * 20 + "|\n|" + "---|" * 20)
    )
    visit.open().send("word" * 100)
    visit.done()
    for is_open in (False, True):
        if is_open and size[0] < 800:
            visit.page.get_by_role("button", name="Show live statistics").click()
            assert visit.page.locator("#heat").is_visible()
        assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert visit.page.evaluate(
            "() => { const s = document.getElementById('scroll'); return s.scrollWidth <= s.clientWidth; }"
        )
        box = visit.page.get_by_label("Message", exact=True).bounding_box()
        assert box is not None and box["y"] + box["height"] <= size[1]
    assert visit.page.locator("#heat").is_visible() or size[0] < 800


def test_light_and_dark(visit: Visit) -> None:
    visit.open()
    background = "() => getComputedStyle(document.body).backgroundColor"
    light = visit.page.evaluate(background)
    visit.page.emulate_media(color_scheme="dark")
    dark = visit.page.evaluate(background)
    assert dark != light
    visit.page.get_by_role("button", name="Switch between light and dark").click()
    assert visit.page.evaluate(background) == light
    visit.page.reload()
    assert visit.page.evaluate(background) == light  # kept


def test_controls_have_names(visit: Visit) -> None:
    visit.open().send("Hi")
    visit.done()
    unnamed = visit.page.locator("button, input, textarea, canvas, meter, summary").evaluate_all(
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert unnamed == []
