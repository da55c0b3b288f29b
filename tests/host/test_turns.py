"""Where turns of a conversation begin."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe_kt.engine.chat.turns import Turns
from hybrimoe_kt.engine.vocabulary import Vocabulary
from tests.server.scripted import ScriptedEngine

LONG = "You are terse. " * 20
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def vocabulary(template: str | None = None) -> Vocabulary:
    """Qwen's template, unless another is given; a byte a token."""
    made = ScriptedEngine(lambda prompt: "").vocabulary
    made.finds_leads = True
    if template is not None:
        made._tokenizer.chat_template = template
    return made


def turns(made: Vocabulary, messages: list[dict[str, Any]], **given: Any) -> tuple[str, str]:
    """The prompt up to where each turn begins."""
    prompt = made.chat_ids(messages, given.get("tools"), given.get("options"))
    found = made.turns_of(prompt, messages, given.get("tools"), given.get("options"))
    return made.text_of_all(prompt[: found.lead]), made.text_of_all(prompt[: found.answer])


SYSTEM = {"role": "system", "content": LONG}
HELLO = {"role": "user", "content": "hello"}


def test_the_lead_is_what_comes_before_the_first_question() -> None:
    made = vocabulary()
    head = f"<|im_start|>system\n{LONG}<|im_end|>\n<|im_start|>user\n"
    assert turns(made, [SYSTEM, HELLO])[0] == head
    longer = [SYSTEM, HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}]
    assert turns(made, longer)[0] == head
    assert turns(made, [SYSTEM, {"role": "user", "content": "a"}])[0] == head, "whatever is asked"


def test_the_answers_turn_begins_where_the_template_says_so() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert turns(vocabulary(template), [HELLO]) == ("", "")
    begins = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert turns(vocabulary(begins), [SYSTEM, HELLO]) == (f"[system]{LONG}[user]", f"[system]{LONG}[user]hello")


def test_tools_belong_to_it() -> None:
    made = vocabulary()
    lead, _ = turns(made, [SYSTEM, HELLO], tools=[TOOL])
    assert "look" in lead and lead.endswith("<|im_start|>user\n")
    other, _ = turns(made, [SYSTEM, HELLO], tools=[TOOL | {"function": {**TOOL["function"], "name": "hear"}}])  # type: ignore[dict-item]
    assert "hear" in other and "look" not in other


@pytest.mark.parametrize(
    "messages",
    [[HELLO], [{"role": "system", "content": "Be brief."}, HELLO], [HELLO, SYSTEM]],
    ids=["no system message", "a short one", "a late one"],
)
def test_where_it_is_not_worth_it_there_is_none(messages: list[dict[str, Any]]) -> None:
    assert turns(vocabulary(), messages)[0] == ""


def test_a_template_that_puts_it_elsewhere_has_none() -> None:
    """With the last question, as Mistral's do."""
    template = (
        "{% for m in messages[1:] %}[{{ m.role }}]{% if loop.last %}{{ messages[0].content }} {% endif %}"
        "{{ m.content }}{% endfor %}[assistant]"
    )
    made = vocabulary(template)
    assert turns(made, [SYSTEM, HELLO])[0] == f"[user]{LONG} "
    assert turns(made, [SYSTEM, HELLO, {"role": "assistant", "content": "hi"}, HELLO])[0] == ""


def test_a_template_that_refuses_what_it_is_asked_has_none() -> None:
    refusing = "{% if messages[1].content in 'aZ' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert turns(vocabulary(refusing), [SYSTEM, HELLO])[0] == ""


def test_it_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = vocabulary(), []
    prompt = made.chat_ids([SYSTEM, HELLO])
    read = made._leads._chat_ids
    monkeypatch.setattr(made._leads, "_chat_ids", lambda *given: asked.append(given) or read(*given))
    found = [made.turns_of(prompt, [SYSTEM, HELLO]) for _ in range(3)]
    assert len(set(found)) == 1 and len(asked) == 2
    for number in range(40):
        made.turns_of(prompt, [{"role": "system", "content": f"{LONG}{number}"}, HELLO])
    assert len(made._leads._known) <= 16
    made.finds_leads = False
    assert made.turns_of(prompt, [SYSTEM, HELLO]) == Turns(0, found[0].answer)
