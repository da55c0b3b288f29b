"""The page's modules by themselves: Markdown into elements, streams into events."""

from __future__ import annotations

import random
from typing import Any

import pytest

from .conftest import Visit

ALLOWED = {
    "P", "H3", "H4", "H5", "H6", "UL", "OL", "LI", "BLOCKQUOTE", "PRE", "CODE", "DIV", "SPAN", "BUTTON", "STRONG", "EM",
    "S", "A", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "HR",
}  # fmt: skip
SHOW = """async (texts) => {
  const {MarkdownView} = await import('/markdown.js');
  return texts.map((text) => {
    const element = document.createElement('div');
    const view = new MarkdownView(element);
    const step = Math.max(1, Math.ceil(text.length / 50));
    for (let at = step; at < text.length; at += step) view.show(text.slice(0, at));
    view.show(text);
    const once = document.createElement('div');
    new MarkdownView(once).show(text);
    return {html: element.innerHTML, same: once.innerHTML === element.innerHTML, text: element.textContent,
            names: [...new Set([...element.querySelectorAll('*')].map((e) => e.tagName))],
            links: [...element.querySelectorAll('a')].map((e) => e.protocol)};
  });
}"""


@pytest.fixture
def show(visit: Visit) -> Any:
    visit.open()
    return lambda *texts: visit.page.evaluate(SHOW, list(texts))


CASES = {
    "paragraphs": ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
    "emphasis": (
        "**b** *i* ~~s~~ __x__ _y_",
        "<p><strong>b</strong> <em>i</em> <s>s</s> <strong>x</strong> <em>y</em></p>",
    ),
    "nested": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "not emphasis": ("2 * 3 * 4, snake_case_name, a**", "<p>2 * 3 * 4, snake_case_name, a**</p>"),
    "code": ("`a *b*` ``c`d``", "<p><code>a *b*</code> <code>c`d</code></p>"),
    "heading": ("# A\n### *B* ##", "<h3>A</h3><h5><em>B</em></h5>"),
    "list": ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    "numbers": ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    "outdented": ("  - a\n- b", "<div><ul><li>a</li></ul><ul><li>b</li></ul></div>"),
    "quote": ("> a\n> **b**", "<blockquote><p>a\n<strong>b</strong></p></blockquote>"),
    "rule": ("---", "<hr>"),
    "link": ("[a](https://b.test/c)", None),
    "table": (
        "|a|b|\n|-|-|\n|1|2|",
        '<div class="wide" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>",
    ),
    "image": ("![a](https://b.test/c.png)", "<p>![a](https://b.test/c.png)</p>"),
}


def test_markdown(show: Any) -> None:
    for (name, (_, wanted)), found in zip(CASES.items(), show(*(text for text, _ in CASES.values())), strict=True):
        assert found["same"], f"{name}: growing shows something else than all at once"
        if wanted is not None:
            assert found["html"] == wanted, name
    assert show("[a](https://b.test/c)")[0]["links"] == ["https:"]


def test_code_blocks(show: Any) -> None:
    text = "```python\nif a < b:\n    print('*x*')\n\n# y\n```\nafter"
    closed, still_open = show(text, text.partition("\n```")[0])
    for found in (closed, still_open):
        assert "if a &lt; b:\n    print('*x*')\n\n# y</code>" in found["html"]
        assert "python" in found["text"]
    assert closed["html"].endswith("<p>after</p>")


def test_any_text_becomes_known_elements_and_loses_no_word(show: Any) -> None:
    chance = random.Random(1)
    parts = [
        "<script>", "</p>", "**", "*", "_", "`", "```", "\n", "\n\n", "# ", "- ", "1. ", "> ", "|", "|-|", "word", " ",
        "[a](javascript:x)", "[b](https://c.test)", "&lt;", "<img src=x onerror=y>", "~~", "\t", "  ", "é", "\r\n",
    ]  # fmt: skip
    texts = ["".join(chance.choices(parts, k=chance.randint(1, 60))) for _ in range(300)]
    for text, found in zip(texts, show(*texts), strict=True):
        assert set(found["names"]) <= ALLOWED, text
        assert set(found["links"]) <= {"https:"}, text
        assert found["same"], text
        assert found["text"].count("word") == text.count("word"), text


def test_long_and_twisted_texts_end(show: Any) -> None:
    """Patterns that make careless expressions run for ever."""
    twisted = ["*", "**a ", "`", "``a", "_a", "[", "[a](", "# ", "#", "> ", "- ", " - ", "|-", "~~x ", "__ ", " ", "-"]
    for found in show(*(part * (9000 // len(part)) + "x" for part in twisted)):
        assert "x" in found["text"][-5:]  # behind a code block stands its button


EVENTS = """async (cuts) => {
  const {events} = await import('/stream.js');
  const all = [];
  for (const chunks of cuts) {
    const reader = {read: async () => chunks.length ? {value: chunks.shift(), done: false} : {done: true}};
    const found = [];
    for await (const data of events(reader)) found.push(data);
    all.push(found);
  }
  return all;
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_events_however_they_are_cut(visit: Visit, end: str) -> None:
    visit.open()
    stream = end.join([": hello", "", 'data: {"a":1}', "", "event: x", "data: two", "data:lines", "", "data: last"])
    sizes = range(1, len(stream) + 1)
    cuts = [[stream[at : at + size] for at in range(0, len(stream), size)] for size in sizes]
    for size, found in zip(sizes, visit.page.evaluate(EVENTS, cuts), strict=True):
        assert found == ['{"a":1}', "two\nlines", "last"], f"in pieces of {size}"
