"""Thoughts of every family are told apart from the answer, whichever of the two opens them: model or chat template."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from hybrimoe_kt.engine.answer import Request, answer
from hybrimoe_kt.engine.events import Answer
from hybrimoe_kt.engine.sampling import Sampling

from .scripted import QWEN, ScriptedEngine
from .serving import serving

DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}"
    "{% else %}<\uff5cAssistant\uff5c>{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    "<\uff5cAssistant\uff5c>"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'user' and enable_thinking is defined and not enable_thinking %}/nothink{% endif %}{% endfor %}"
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}\n<think></think>{% endif %}"
)
MINIMAX = "{% for m in messages %}]~b]{{ m.role }}\n{{ m.content }}[e~[\n{% endfor %}{{ ']~b]ai\n<think>\n' }}"
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


@dataclass(frozen=True, slots=True)
class Family:
    template: str
    model_type: str
    opens: bool = False
    """The chat template does, not the model."""


FAMILIES = {
    "DeepSeek-R1": Family(DEEPSEEK, "deepseek_v3"),
    "DeepSeek-R1 of 2025": Family(DEEPSEEK + "{{ '<think>\n' }}", "deepseek_v3", opens=True),
    "GLM-4.5": Family(GLM, "glm4_moe"),
    "MiniMax-M2": Family(MINIMAX, "minimax_m2", opens=True),
    "Qwen3": Family(QWEN, "qwen3_moe"),
    "Qwen3 with thoughts only": Family(QWEN + "{{ '<think>\n' }}", "qwen3_moe", opens=True),
    "Qwen3 with GLM's template": Family(GLM, "qwen3_moe"),
}


def said(family: Family, text: str, **options: object) -> Answer:
    """What an answer says, fed token by token, a byte each."""
    engine = ScriptedEngine(lambda prompt: text, chat_template=family.template, model_type=family.model_type)
    prompt = engine.vocabulary.chat_ids([{"role": "user", "content": "2 + 2? <think>"}], None, options)
    parts = engine.vocabulary.response_parts(prompt)
    request = Request(prompt=prompt, sampling=Sampling(max_new_tokens=999), parts=parts)
    return Answer.of(answer(engine, request, threading.Event()))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_thoughts_and_answer_come_apart(family: Family) -> None:
    begun = "" if family.opens else "<think>\n"
    told = said(family, begun + "Two and two,\n\nfour: \u7b54\u6848.\n</think>\n\nIt is <b>four</b>.\n 4")
    assert (told.thoughts, told.text) == ("Two and two,\n\nfour: \u7b54\u6848.", "It is <b>four</b>.\n 4")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_thoughts_that_never_end_are_thoughts(family: Family) -> None:
    told = said(family, ("" if family.opens else "<think>") + "Two and")
    assert (told.thoughts, told.text) == ("Two and", "")


@pytest.mark.parametrize("family", [one for one in FAMILIES.values() if not one.opens])
def test_an_answer_without_thoughts_is_all_text(family: Family) -> None:
    told = said(family, "Four.  Write <think> and </think> for it.")
    assert (told.thoughts, told.text) == ("", "Four.  Write <think> and </think> for it.")


@pytest.mark.parametrize("name", ["GLM-4.5", "Qwen3"])
def test_thoughts_that_the_template_closes_are_none(name: str) -> None:
    told = said(FAMILIES[name], "Four.", enable_thinking=False)
    assert (told.thoughts, told.text) == ("", "Four.")


@pytest.mark.parametrize("name", ["GLM-4.5", "MiniMax-M2"])
def test_other_special_tokens_are_no_text(name: str) -> None:
    begun = "" if FAMILIES[name].opens else "<think>"
    told = said(FAMILIES[name], begun + "Hm<|im_start|>m</think>\u7b54<|im_start|>\u6848<tool_call>.")
    assert (told.thoughts, told.text) == ("Hmm", "\u7b54\u6848.")


def test_the_server_calls_them_reasoning_content() -> None:
    engine = ScriptedEngine(
        lambda prompt: "Hm.\n</think>\n\nYes.", chat_template=MINIMAX, model_type="minimax_m2"
    )  # fmt: skip
    with serving(engine) as running:
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Well?"}]}]}
        message = running.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    assert engine.prompts == ["]~b]user\nWell?[e~[\n]~b]ai\n<think>\n"]


def test_an_option_that_the_template_does_not_know_is_refused_by_name() -> None:
    with serving(ScriptedEngine(chat_template=PLAIN)) as running:
        body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
        answer = running.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "this model's chat template has no option 'enable_thinking'"
    assert (error["param"], error["code"]) == ("chat_template_kwargs", "unsupported_parameter")
