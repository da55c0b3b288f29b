"""A conversation with a thought and tool calls, as the models of every notation write it.

Each row has a chat template of ours, as short as can be, that writes earlier turns in the notation: what it writes of
an answer is the answer as the model would have written it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARGUMENTS", "CALLS", "CONTENT", "ROWS", "SIMPLE", "THOUGHT", "TOOLS", "Row", "conversation"]

THOUGHT = "The weather? I look.\nTwo days, \u5929\u6c14."
CONTENT = "Let me see."
ARGUMENTS: dict[str, Any] = {
    "place": 'Z\u00fcrich, "old town"\nby the <lake>',
    "days": 2,
    "code": "12",
    "exact": True,
    "ratio": 0.5,
    "where": {"lat": 47.4, "tags": ["a", "b"], "none": None},
}
SIMPLE = {"place": "Bern", "days": 3}
CALLS = (("weather", ARGUMENTS), ("weather", SIMPLE), ("time", {}))
_PROPERTIES = {
    "place": {"type": "string"},
    "days": {"type": "integer"},
    "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "exact": {"type": ["boolean", "null"]},
    "ratio": {"type": "number"},
    "where": {"type": "object"},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells it",
            "parameters": {"type": "object", "properties": _PROPERTIES},
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]


def _template(assistant: str, *, begun: str = "", thoughts: str = "") -> str:
    """Roles in brackets; `assistant` writes an answer's calls, `thoughts` what stands before its content."""
    return (
        "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}" + thoughts + assistant + "{% else %}{{ m.content }}{% endif %}[end]"
        "{% endfor %}[assistant]" + begun
    )


_THINK = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
_SAID = "{{ m.content or '' }}"
_EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
_JSON = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
_VALUE = "{{ v if v is string else v | tojson }}"
_PAIRS = "{% for k, v in f.arguments.items() %}"


def _listed(before: str, after: str, call: str = _JSON) -> str:
    """Calls in one list."""
    return (
        _SAID + "{% if m.tool_calls %}" + before + "[" + _EACH + call + "{{ '' if loop.last else ', ' }}{% endfor %}]"
        + after + "{% endif %}"
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One notation; `special` are the tokens that its vocabularies call special."""

    template: str
    special: tuple[str, ...] = ()
    malformed: str
    """A call that is none, with everything around it."""
    model_type: str = "olmoe"
    """By default of a family without a notation of its own."""
    begun: str = ""
    """What of the answer the chat template has written."""
    has_thoughts: bool = True
    has_content: bool = True
    """Whether content may stand before calls."""
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = CALLS
    options: Mapping[str, Any] = field(default_factory=dict)


def conversation(row: Row) -> list[dict[str, Any]]:
    """A question and the answer, in OpenAI's form with arguments as objects."""
    calls = [
        {"id": f"functions.{name}:{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(row.calls)
    ]
    answer: dict[str, Any] = {"role": "assistant", "content": CONTENT if row.has_content else "", "tool_calls": calls}
    if row.has_thoughts:
        answer["reasoning_content"] = THOUGHT
    return [{"role": "user", "content": "Weather? <think>"}, answer]


_TOOL_CALL = ("<tool_call>", "</tool_call>")
_THINKS = ("<think>", "</think>")
_BEGUN = "{{ '<think>\n' }}"
_XML = (
    "<function={{ f.name }}>\n" + _PAIRS + "<parameter={{ k }}>\n" + _VALUE + "\n</parameter>\n{% endfor %}</function>"
)
_GLM = _PAIRS + "<arg_key>{{ k }}</arg_key>\n<arg_value>" + _VALUE + "</arg_value>\n{% endfor %}"
_DEEPSEEK = (
    _SAID + "{% if m.tool_calls %}<\uff5ctool\u2581calls\u2581begin\uff5c>" + _EACH
    + "<\uff5ctool\u2581call\u2581begin\uff5c>CALL<\uff5ctool\u2581call\u2581end\uff5c>"
    + "{% endfor %}<\uff5ctool\u2581calls\u2581end\uff5c>{% endif %}"
)  # fmt: skip
_DEEPSEEK_TOKENS = tuple(
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
)
_SEP = "<\uff5ctool\u2581sep\uff5c>"
_DSML = "\uff5cDSML\uff5c"
_PYTHON = (
    "{{ f.name }}(" + _PAIRS
    + "{{ k }}={{ py(v) }}{{ '' if loop.last else ', ' }}{% endfor %})"
)  # fmt: skip
# Python's literals, in Jinja: JSON but for three names.
_PY = (
    "{% macro py(v) %}{% if v is mapping %}{% raw %}{{% endraw %}{% for k, one in v.items() %}'{{ k }}': {{ py(one) }}"
    "{{ '' if loop.last else ', ' }}{% endfor %}{% raw %}}{% endraw %}{% elif v is string or v is number and v is not"
    " boolean %}{{ v | tojson }}{% elif v is iterable %}[{% for one in v %}{{ py(one) }}{{ '' if loop.last else ', ' }}"
    "{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"
)
_GEMMA = (
    '{% macro g(v) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is mapping %}{% raw %}{{% endraw %}{% for k, one in'
    " v.items() %}{{ k }}:{{ g(one) }}{{ '' if loop.last else ',' }}{% endfor %}{% raw %}}{% endraw %}"
    "{% elif v is iterable %}[{% for one in v %}{{ g(one) }}{{ '' if loop.last else ',' }}{% endfor %}]"
    "{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
)
_HARMONY = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}Reasoning: {{ reasoning_effort or 'medium' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('not both') }}{% endif %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start|>assistant<|channel|>commentary to=functions.{{ f.name }} "
    "<|constrain|>json<|message|>{{ f.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}<|start|>assistant"
)

ROWS: dict[str, Row] = {
    "hermes (Qwen3)": Row(
        template=_template(_SAID + _EACH + "\n<tool_call>\n" + _JSON + "\n</tool_call>{% endfor %}", thoughts=_THINK),
        special=_TOOL_CALL,
        malformed='<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
    ),
    "hermes, by the family (ERNIE 4.5)": Row(
        template=_template(
            _SAID + _EACH + "\n{{ open }}\n" + _JSON + "\n{{ close }}{% endfor %}", thoughts=_THINK
        ).replace("{{ open }}", "{{ '<tool' + '_call>' }}").replace("{{ close }}", "{{ '</tool' + '_call>' }}"),
        model_type="ernie4_5_moe",
        malformed="<tool_call>weather</tool_call>",
    ),
    "ERNIE 4.5 with its response": Row(
        template=_template(
            "{% if m.content %}<response>\n{{ m.content }}\n</response>\n{% endif %}"
            + _EACH + "\n<tool_call>" + _JSON + "</tool_call>{% endfor %}", thoughts=_THINK
        ),
        has_content=False,
        malformed="<tool_call>{}</tool_call>",
    ),
    "Qwen3-Coder": Row(
        template=_template(_SAID + _EACH + "\n<tool_call>\n" + _XML + "\n</tool_call>{% endfor %}"),
        special=_TOOL_CALL,
        has_thoughts=False,
        malformed="<tool_call>\n<function=weather>\nBern\n</function>\n</tool_call>",
    ),
    "Qwen3.5, thoughts begun": Row(
        template=_template(
            _SAID + _EACH + "\n\n<tool_call>\n" + _XML + "\n</tool_call>{% endfor %}",
            thoughts=_THINK, begun=_BEGUN,
        ),
        begun="<think>\n",
        malformed="<tool_call>\n<function=>\n</function>\n</tool_call>",
    ),
    "DeepSeek-V3": Row(
        template=_template(_DEEPSEEK.replace(
            "CALL", "function<\uff5ctool\u2581sep\uff5c>{{ f.name }}\n```json\n{{ f.arguments | tojson }}\n```"
        )),
        special=_DEEPSEEK_TOKENS,
        has_thoughts=False,
        malformed="<\uff5ctool\u2581calls\u2581begin\uff5c>weather<\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    "DeepSeek-R1, arguments as text, no content": Row(
        template=_template(
            _DEEPSEEK.replace("CALL", f"function{_SEP}{{{{ f.name + '\n```json\n' + f.arguments + '\n```' }}}}")
            .replace("m.tool_calls %}", "m.content is none and m.tool_calls %}"), thoughts=_THINK
        ),
        special=(*_DEEPSEEK_TOKENS, *_THINKS),
        has_content=False,
        malformed="<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>{}"
        "<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    "DeepSeek-V3.1": Row(
        template=_template(_DEEPSEEK.replace("CALL", "{{ f.name }}" + _SEP + "{{ f.arguments | tojson }}"),
                           thoughts=_THINK.replace("\n", ""), begun="<think>"),
        special=(*_DEEPSEEK_TOKENS, *_THINKS),
        begun="<think>",
        malformed="<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>weather"
        "<\uff5ctool\u2581sep\uff5c>{place<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    "DeepSeek-V3.1, no tools in the template": Row(
        template=_template(
            _DEEPSEEK.replace("CALL", "{{ f.name + '" + _SEP + "' + f.arguments }}"), thoughts=_THINK.replace("\n", "")
        ).replace("{% if tools %}[tools]{{ tools | tojson }}{% endif %}", ""),
        special=(*_DEEPSEEK_TOKENS, *_THINKS),
        malformed="<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    "DeepSeek-V3.2": Row(
        template=_template(
            _SAID + f"{{% if m.tool_calls %}}\n\n<{_DSML}function_calls>\n" + _EACH
            + f'<{_DSML}invoke name="{{{{ f.name }}}}">\n' + _PAIRS
            + f'<{_DSML}parameter name="{{{{ k }}}}" string="{{{{ (v is string) | tojson }}}}">' + _VALUE
            + f"</{_DSML}parameter>\n{{% endfor %}}</{_DSML}invoke>\n"
            + f"{{% endfor %}}</{_DSML}function_calls>{{% endif %}}",
            thoughts=_THINK,
        ),
        special=(_DSML, *_THINKS),
        malformed=f'<{_DSML}function_calls>\n<{_DSML}invoke name="weather">Bern</{_DSML}invoke>\n'
        f"</{_DSML}function_calls>",
    ),
    "Kimi-K2": Row(
        template=_template(
            _SAID + "{% if m.tool_calls %}<|tool_calls_section_begin|>" + _EACH
            + "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ f.arguments | tojson }}<|tool_call_end|>"
            + "{% endfor %}<|tool_calls_section_end|>{% endif %}",
            thoughts="<think>{{ m.reasoning_content or '' }}</think>",
        ),
        special=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
                 "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        malformed="<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "GLM-4.5": Row(
        template=_template(_SAID + _EACH + "\n<tool_call>{{ f.name }}\n" + _GLM + "</tool_call>{% endfor %}",
                           thoughts=_THINK.replace("\n", "")),
        special=(*_TOOL_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", *_THINKS),
        malformed="<tool_call>weather\n<arg_key>place</arg_key>\nBern</tool_call>",
    ),
    "GLM-4.7": Row(
        template=_template(
            _SAID + _EACH + "<tool_call>{{ f.name }}" + _GLM.replace("\n", "") + "</tool_call>{% endfor %}",
            thoughts=_THINK.replace("\n", ""),
        ),
        special=(*_TOOL_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", *_THINKS),
        malformed="<tool_call></tool_call>",
    ),
    "MiniMax-M2": Row(
        template=_template(
            _SAID + "{% if m.tool_calls %}\n<minimax:tool_call>\n" + _EACH + '<invoke name="{{ f.name }}">\n' + _PAIRS
            + '<parameter name="{{ k }}">' + _VALUE + "</parameter>\n{% endfor %}</invoke>\n{% endfor %}"
            + "</minimax:tool_call>{% endif %}",
            thoughts=_THINK, begun=_BEGUN,
        ),
        special=("<minimax:tool_call>", "</minimax:tool_call>", *_THINKS),
        begun="<think>\n",
        malformed="<minimax:tool_call>\nweather\n</minimax:tool_call>",
    ),
    "Seed": Row(
        template=_template(
            _SAID + _EACH + "<seed:tool_call>\n" + _XML.replace(">\n{{", ">{{").replace("\n</par", "</par")
            + "\n</seed:tool_call>{% endfor %}",
            thoughts="{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>\n{% endif %}",
        ),
        special=("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
        malformed="<seed:tool_call><function=weather><seed:tool_call>",
    ),
    "Hunyuan": Row(
        template=_template(
            "{% if m.content %}<answer>\n{{ m.content }}\n</answer>\n{% endif %}"
            + _listed("<tool_calls>", "</tool_calls>").replace(_SAID, ""),
            thoughts=_THINK,
        ),
        has_content=False,
        malformed="<tool_calls>[weather]</tool_calls>",
    ),
    "Hunyuan's tags": Row(
        template=_template(
            _SAID + "{% if m.tool_calls %}<tool_calls>\n" + _EACH + "<tool_call>{{ f.name }}<tool_sep>\n" + _GLM
            + "</tool_call>\n{% endfor %}</tool_calls>{% endif %}",
            thoughts=_THINK,
        ),
        malformed="<tool_calls><tool_call>weather</tool_call></tool_calls>",
    ),
    "Nemotron": Row(
        template=_template(_listed("<TOOLCALL>", "</TOOLCALL>"), thoughts=_THINK),
        malformed="<TOOLCALL>[]</TOOLCALL>",
    ),
    "Granite 3": Row(
        template=_template(_listed("<|tool_call|>", ""), thoughts=_THINK),
        special=("<|tool_call|>",),
        malformed="<|tool_call|>weather in Bern",
    ),
    "Command A": Row(
        template=_template(
            _listed("<|START_ACTION|>", "<|END_ACTION|>", '{"tool_call_id": "{{ loop.index0 }}", "tool_name": '
                    '"{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'),
            thoughts="{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>"
            "{% endif %}",
        ),
        special=("<|START_ACTION|>", "<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        malformed="<|START_ACTION|>[1]<|END_ACTION|>",
    ),
    "Mistral (7B v3, Mixtral)": Row(
        template=_template(
            _EACH + "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}{% endfor %}"
            + _listed("[TOOL_CALLS]", "", _JSON[:-1] + ', "id": "{{ c.id }}"}')
        ),
        special=("[TOOL_CALLS]",),
        has_thoughts=False,
        malformed="[TOOL_CALLS] I have none",
    ),
    "Mistral (Small 3.2, Magistral)": Row(
        template=_template(
            _SAID + _EACH + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}",
            thoughts="{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}",
        ),
        special=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
        malformed="[TOOL_CALLS]weather[ARGS]Bern",
    ),
    "LFM2": Row(
        template=_PY + _template(_listed("<|tool_call_start|>", "<|tool_call_end|>", _PYTHON), thoughts=_THINK),
        special=("<|tool_call_start|>", "<|tool_call_end|>"),
        malformed='<|tool_call_start|>[weather("Bern")]<|tool_call_end|>',
    ),
    "Llama 4, Python": Row(
        template=_PY + _template(_listed("<|python_start|>", "<|python_end|>", _PYTHON))
        + "{# a dictionary of argument name and value #}",
        special=("<|python_start|>", "<|python_end|>"),
        has_thoughts=False,
        has_content=False,
        malformed="<|python_start|>[news(of='Bern')]<|python_end|>",
    ),
    "Llama 4, JSON": Row(
        template=_template(_SAID + _EACH + _JSON.replace("arguments\"", "parameters\"") + "{% endfor %}")
        + "{# a dictionary of argument name and value #}",
        has_thoughts=False,
        has_content=False,
        malformed='{"name": "Bern", "parameters": {"is": "a town"}}',
        calls=CALLS[:1],
    ),
    "Gemma 4": Row(
        template=_GEMMA + _template(
            _SAID + _EACH + "<|tool_call>call:{{ f.name }}{{ g(f.arguments) }}<tool_call|>{% endfor %}",
            thoughts="{% if m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}<channel|>{% endif %}",
        ),
        special=("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", '<|"|>'),
        malformed="<|tool_call>call:weather{place}<tool_call|>",
    ),
    "Solar Open": Row(
        template=_template(
            "{% if m.content %}<|begin|>assistant<|content|>{{ m.content }}<|end|>{% endif %}"
            "{% if m.tool_calls %}<|begin|>assistant<|tool_calls|>" + _EACH
            + "<|tool_call:begin|>{{ c.id }}<|tool_call:name|>{{ f.name }}<|tool_call:args|>{{ f.arguments | tojson }}"
            + "<|tool_call:end|>{% endfor %}<|calls|>{% endif %}",
            thoughts="{% if m.reasoning %}<|begin|>assistant<|think|>{{ m.reasoning }}<|end|>{% endif %}",
        ).replace("[assistant]", "<|begin|>assistant").replace("[{{ m.role }}]{% if", "{% if"),
        special=("<|begin|>", "<|end|>", "<|think|>", "<|content|>", "<|calls|>", "<|tool_calls|>",
                 "<|tool_call:begin|>", "<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>"),
        malformed="<|tool_calls|><|tool_call:begin|>weather<|tool_call:end|><|calls|>",
    ),
    "GigaChat 3.1": Row(
        template=_template(_SAID + _EACH + "<|function_call|>" + _JSON + "{% endfor %}"),
        special=("<|function_call|>",),
        has_thoughts=False,
        malformed="<|function_call|>weather",
        calls=CALLS[:1],
    ),
    "gpt-oss": Row(
        template=_HARMONY,
        special=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "<|end|>", "<|return|>"),
        has_content=False,
        malformed="<|channel|>commentary to=functions.weather <|constrain|>json<|message|>Bern<|call|>",
        calls=CALLS[:1],
    ),
}  # fmt: skip
