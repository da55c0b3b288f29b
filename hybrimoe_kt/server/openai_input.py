"""From a request in OpenAI's shape to what the service takes; what cannot be done is refused, never dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe_kt.engine.chat.thinking import SWITCHES, effort_options, switch_options
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.vocabulary import Vocabulary

from .errors import ApiError
from .forms import constraint_of
from .openai_schema import ChatRequest, CompletionRequest, Message
from .service import ChatInput, Service
from .unsupported import OPENAI, refuse

__all__ = [
    "ToolChoice",
    "chat_input",
    "completion_prompts",
    "num_answers",
    "sampling_of",
    "stops_of",
    "tool_choice",
]


def chat_input(request: ChatRequest, service: Service) -> ChatInput:
    """Return the conversation; ApiError for what this server cannot do."""
    _refuse(request)
    choice = tool_choice(request.tool_choice, [tool.function.name for tool in request.tools or []])
    tools = [tool for tool in request.tools or [] if tool.function.name in choice.allowed]
    options = dict(request.chat_template_kwargs or {})
    options |= _thinking(request, service.engine.vocabulary)
    return ChatInput(
        messages=[_message(number, message) for number, message in enumerate(request.messages)],
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
        template_options=options,
        one_call=request.parallel_tool_calls is False or choice.is_named,
        forced=choice.allowed if choice.is_forced else (),
    )


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What `tool_choice` says: which tools there are to call, and whether one of them must be."""

    allowed: Sequence[str]
    is_forced: bool = False
    is_named: bool = False


def tool_choice(given: str | Mapping[str, Any] | None, names: Sequence[str]) -> ToolChoice:
    """Read OpenAI's `tool_choice` of both its interfaces; ApiError for what is not understood, or names no tool."""
    if given in (None, "", "auto"):
        return ToolChoice(names)
    if given == "none":
        return ToolChoice(())
    if not names:
        raise _choice_refused("there are no tools to choose from")
    if given == "required":
        return ToolChoice(names, is_forced=True)
    kind = given.get("type") if isinstance(given, Mapping) else None
    if isinstance(given, Mapping) and kind == "function":
        function = given.get("function", given)
        return ToolChoice(_known_tools([function], names), is_forced=True, is_named=True)
    if isinstance(given, Mapping) and kind == "allowed_tools":
        inner = given.get("allowed_tools", given)
        listed = inner.get("tools") if isinstance(inner, Mapping) else None
        if not isinstance(listed, list) or inner.get("mode") not in ("auto", "required"):
            raise _choice_refused("allowed_tools has a mode, auto or required, and a list of tools")
        functions = [one.get("function", one) if isinstance(one, Mapping) else one for one in listed]
        return ToolChoice(_known_tools(functions, names), is_forced=inner["mode"] == "required")
    raise _choice_refused(
        'it is "auto", "none", "required", {"type": "function", "function": {"name": ...}} or of type allowed_tools'
    )


def _known_tools(functions: Sequence[Any], names: Sequence[str]) -> Sequence[str]:
    wanted = [one.get("name") if isinstance(one, Mapping) else None for one in functions]
    for name in wanted:
        if name not in names:
            raise _choice_refused(f"{name!r} is none of the tools")
    return [name for name in names if name in wanted]


def _choice_refused(reason: str) -> ApiError:
    return ApiError(400, f"tool_choice is not understood: {reason}", param="tool_choice", code="invalid_value")


def _thinking(request: ChatRequest, vocabulary: Vocabulary) -> dict[str, Any]:
    """What the chat template is to know of how the model thinks."""
    options: dict[str, Any] = {}
    if (effort := request.reasoning_effort) is not None:
        options |= _known("reasoning_effort", effort, effort_options(vocabulary.takes, effort))
    for name in SWITCHES:
        if (wanted := getattr(request, name)) is not None:
            is_on = wanted if isinstance(wanted, bool) else wanted.type == "enabled"
            options |= _known(name, is_on, switch_options(vocabulary.takes, is_on=is_on))
    return options


def _known(name: str, value: Any, options: dict[str, Any] | None) -> dict[str, Any]:
    if options is None:
        raise ApiError(
            400, f"{name} {value!r} is not supported: this model's chat template has no such option",
            param=name, code="unsupported_parameter",
        )  # fmt: skip
    return options


def _message(number: int, message: Message) -> dict[str, Any]:
    param = f"messages[{number}]"
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{param} has no content", param=f"{param}.content")
    content = message.content or message.refusal or ""
    given = content if isinstance(content, str) else [part.model_dump() for part in content]
    shown: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": given}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            shown[name] = value
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(call.function, f"{param}.tool_calls")}
            for call in message.tool_calls
        ]
    return shown


def _called(function: Any, param: str) -> dict[str, Any]:
    """Chat templates want the arguments as an object."""
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        raise ApiError(400, f"the arguments of {function.name!r} are not JSON", param=param) from None
    return {"name": function.name, "arguments": arguments}


def completion_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts in order, each a text or token ids; ApiError for what this server cannot do."""
    _refuse(request)
    given: Any = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ApiError(400, "there is no prompt", param="prompt")
    return list(given)


def sampling_of(service: Service, request: ChatRequest | CompletionRequest) -> Sampling:
    """Return how to draw; what the request leaves out is the server's default."""
    settings = service.settings
    lengths = (request.max_completion_tokens, request.max_tokens, request.n_predict)
    num_logprobs = _num_logprobs(request)
    return Sampling(
        max_new_tokens=service.longest_answer(_first(*lengths)),
        temperature=_first(request.temperature, settings.temperature),
        top_p=_first(request.top_p, settings.top_p),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=_first(request.repetition_penalty, request.repeat_penalty, 1.0),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        penalty_window=_window(service, request),
        logit_bias=_biases(request.logit_bias or {}),
        seed=_first(request.seed, settings.seed),
        ignore_end=bool(request.ignore_eos),
        constraint=constraint_of(request.model_extra or {}),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_logprobs if getattr(request, "echo", None) else None,
    )


def _window(service: Service, request: ChatRequest | CompletionRequest) -> int | None:
    """llama.cpp's names have its meaning, OpenAI's and vLLM's have theirs."""
    if request.repeat_last_n is None and request.repeat_penalty is None:
        return None
    return service.penalty_window(request.repeat_last_n)


def _num_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _biases(given: dict[str, float]) -> dict[int, float]:
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(400, f"logit_bias names a token by its id, not by {name!r}", param="logit_bias")
    return {int(name): bias for name, bias in given.items()}


def stops_of(request: ChatRequest | CompletionRequest) -> tuple[str, ...]:
    """Return the stop strings; an empty one is none."""
    given = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return tuple(filter(None, given))


def _first(*values: Any) -> Any:
    """The first that is given, None when none is."""
    return next((value for value in values if value is not None), None)


def num_answers(request: ChatRequest | CompletionRequest) -> int:
    """Return how many answers to each prompt are wanted; ApiError where the request's fields disagree."""
    given = {name: value for name in ("n", "n_cmpl") if (value := getattr(request, name)) is not None}
    if len(set(given.values())) > 1:
        raise ApiError(400, "n and n_cmpl are the same and differ here", param="n_cmpl", code="invalid_value")
    return next(iter(given.values()), 1)


def _refuse(request: ChatRequest | CompletionRequest) -> None:
    given = dict(request.model_extra or {})
    if given.get("best_of") == num_answers(request):
        del given["best_of"]
    refuse(OPENAI, given)
