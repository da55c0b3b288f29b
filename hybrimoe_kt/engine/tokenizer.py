"""The tokenizer: from a model directory when there is one, else rebuilt from the GGUF file."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.utils import logging as transformers_logging

from hybrimoe_kt.errors import ConfigError, ModelError, first_line
from hybrimoe_kt.host.hf.architectures import every_architecture
from hybrimoe_kt.weights.checkpoint import Checkpoint
from hybrimoe_kt.weights.gguf_file import GgufFile

__all__ = ["chat_prompt", "load_tokenizer", "template_takes"]

logger = logging.getLogger(__name__)

# Arguments of Transformers' own function, which the template never sees or gets another way.
_TEMPLATE_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

# What GPT-2's split is right for; each architecture's entry names those for which Transformers installs another.
_GPT2_PRE_TOKENIZERS = ("default", "gpt-2", "gpt2")


def load_tokenizer(file: GgufFile | Checkpoint, model_path: str | Path | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer; ModelError when neither source has one. Warns where a rebuilt one may split differently."""
    if model_path is not None and any((Path(model_path) / name).is_file() for name in _TOKENIZER_FILES):
        return _or_model_error(f"{model_path}: its tokenizer cannot be used", _from_directory, Path(model_path))
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise ModelError(f"{file.path}: holds no tokenizer; give --model_path a directory that has one")
    split = file.metadata.get("tokenizer.ggml.pre", "default")
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and str(split) not in _faithful_pre_tokenizers():
        logger.warning(
            "%s: the tokenizer is rebuilt from the file, and its text splitting (%s) is only approximated; "
            "give --model_path the model's own tokenizer for exact tokens",
            file.path.name,
            split,
        )
    return _or_model_error(f"{file.path}: its tokenizer cannot be rebuilt", _from_gguf, file.path)


def _faithful_pre_tokenizers() -> set[str]:
    """Those of every architecture: a fine-tuned model may have taken another family's tokenizer."""
    return {*_GPT2_PRE_TOKENIZERS, *(name for family in every_architecture() for name in family.pre_tokenizers)}


def _from_directory(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    # Straight to the converter: AutoTokenizer also wants to know the file's architecture, and refuses most.
    architecture, vocabulary, settings = get_gguf_tokenizer(str(path))
    backend, extra = convert_gguf_tokenizer(architecture, vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **extra)


def _or_model_error(
    failure: str, load: Callable[[Path], PreTrainedTokenizerBase], path: Path
) -> PreTrainedTokenizerBase:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return load(path)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a broken vocabulary
        raise ModelError(f"{failure}: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(level)


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a conversation, ready for the assistant's answer.

    `tools` and `template_options` are what the chat template sees beside the messages. A tokenizer without a chat
    template (a base model's) gets the messages' text, one after the other.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
    options = dict(template_options or {})
    if taken := sorted(options.keys() & _TEMPLATE_ARGUMENTS):
        raise ConfigError(f"{taken[0]!r} is not for the chat template to read; leave it out of its options")
    conversation: Any = list(messages)  # of text only, by Transformers' annotation
    try:
        filled: Any = tokenizer.apply_chat_template(
            conversation, tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=True, tokenize=True, return_dict=True, **options,
        )  # fmt: skip
    except Exception as error:  # a template is a program of the file's own
        reason = first_line(error)
        raise ModelError(f"the model's chat template refuses this conversation: {reason}") from None
    return list(filled["input_ids"])


def template_takes(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template reads a variable such as `tools`: one that does not would drop it silently."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts)
