"""Fields that other servers know and that would change the answer, each with why it is refused here.

What is left out, null, or says what is done here anyway passes. Fields of neither kind choose how another server runs,
or what it keeps, and are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ApiError

__all__ = ["OLLAMA", "OPENAI", "Unsupported", "refuse"]


def _off(value: Any) -> bool:
    return not value


def _is(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value in allowed


def _at_most(limit: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and value <= limit


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Fields that are refused for one reason unless their value `is_harmless`."""

    names: tuple[str, ...]
    reason: str
    is_harmless: Callable[[Any], bool] = _off


_SAMPLERS = "the samplers here are temperature, top_k, top_p, min_p, the penalties and biases"
_LOADED = "the model and its words are served as they were loaded"
_PROMPT = "the prompt is what the model's chat template makes of the messages"
_TEXT = "only text goes into this server and comes out of it"
_SHAPE = "answers come in one shape here"
_DRAWN = "answers are drawn token by token here"
_ENDS = "an answer ends by end token, stop string or length"
_THINKS = "what a model thinks of is its chat template's business: give chat_template_kwargs what that reads"
_OTHERS = "it belongs to the other endpoint"

_BOTH = (
    Unsupported(("mirostat",), _SAMPLERS),
    Unsupported(("typical_p", "tfs_z"), _SAMPLERS, _is(1)),
    Unsupported(("suffix",), "a text cannot be filled in between two others here"),
    Unsupported(("images",), _TEXT),
)

OPENAI = (
    *_BOTH,
    Unsupported(("best_of",), "all answers are given here: ask for n of them", _is(1)),
    Unsupported(("functions",), "functions are called by tools here"),
    Unsupported(("function_call",), "functions are called by tools here", _is("auto", "none", "")),
    Unsupported(("audio", "multimodal_data"), _TEXT),
    Unsupported(("modalities",), _TEXT, _is(["text"], [])),
    Unsupported(("web_search_options",), "this server searches nothing"),
    Unsupported(("verbosity",), "no model here has it", _is("medium")),
    Unsupported(("xtc_probability", "dry_multiplier", "dynatemp_range", "top_a"), _SAMPLERS),
    Unsupported(("top_n_sigma",), _SAMPLERS, _at_most(0)),
    Unsupported(("adaptive_target",), _SAMPLERS, lambda value: isinstance(value, int | float) and value < 0),
    Unsupported(("min_keep",), _SAMPLERS, _at_most(1)),
    Unsupported(("samplers",), "their order is fixed here: biases, penalties, temperature, top_k, top_p, min_p"),
    Unsupported(("use_beam_search",), _DRAWN),
    Unsupported(("length_penalty",), _DRAWN, _is(1)),
    Unsupported(("min_tokens", "stop_token_ids", "bad_words"), _ENDS),
    Unsupported(("n_indent", "t_max_predict_ms"), _ENDS, _at_most(0)),
    Unsupported(("n_probs", "post_sampling_probs"), "logprobs tells how likely tokens were"),
    Unsupported(("prompt_logprobs",), "echo with logprobs tells how likely a prompt was", lambda value: value is False),
    Unsupported(("lora", "logits_processors", "allowed_token_ids"), _LOADED),
    Unsupported(("chat_template", "documents", "continue_final_message", "truncate_prompt_tokens"), _PROMPT),
    Unsupported(("add_generation_prompt",), _PROMPT, _is(True)),
    Unsupported(("reasoning_budget", "thinking_budget_tokens"), _THINKS, _is(-1)),
    Unsupported(("reasoning_format",), _SHAPE, _is("auto", "deepseek")),
    Unsupported(("reasoning_in_content", "include_stop_str_in_output", "return_tokens_as_token_ids"), _SHAPE),
    Unsupported(("skip_special_tokens", "parse_tool_calls", "include_reasoning"), _SHAPE, _is(True)),
    Unsupported(("echo",), _OTHERS),
    Unsupported(("tools", "chat_template_kwargs", "reasoning_effort", "top_logprobs"), _OTHERS),
    Unsupported(("enable_thinking", "thinking"), _OTHERS, lambda _: False),
)  # fmt: skip
"""Of OpenAI's interface, also as llama.cpp's and vLLM's servers speak it; an endpoint's own fields are not asked."""

OLLAMA = (
    *_BOTH,
    Unsupported(("template",), _PROMPT),
    Unsupported(("context",), "it is Ollama's memory of an earlier request; send the messages to /api/chat"),
    Unsupported(("rope_frequency_base", "rope_frequency_scale"), _LOADED),
    Unsupported(("width", "height", "steps"), _TEXT),
    Unsupported(("_debug_render_only",), _SHAPE),
)
"""Of Ollama's requests and their options."""


def refuse(table: tuple[Unsupported, ...], given: Mapping[str, Any]) -> None:
    """ApiError 400 for the first field of `table` that asks for something else than is done here."""
    for row in table:
        for name in row.names:
            if (value := given.get(name)) is not None and not row.is_harmless(value):
                raise ApiError(
                    400, f"{name} is not supported: {row.reason}", param=name, code="unsupported_parameter"
                )  # fmt: skip
