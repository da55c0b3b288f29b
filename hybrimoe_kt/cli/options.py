"""The flags of `ktransformers`: kTransformers' spellings, and ours in the same style."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hybrimoe_kt import __version__, accelerators
from hybrimoe_kt.backends.registry import CPU_BACKENDS, GPU_BACKENDS
from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES

from .server_options import add_server_flags, settle_server
from .terminal import Parser
from .terminal import number as _number
from .terminal import whole as _whole

if TYPE_CHECKING:
    from hybrimoe_kt.engine.sampling import Sampling

__all__ = [
    "SamplingOptions",
    "build_parser",
    "build_trace_parser",
    "expert_overrides",
    "parse",
    "parse_trace",
    "sampling_of",
]

_EXAMPLES = """examples:
  ktransformers                                    chat with the embedded model
  ktransformers --prompt "Hello!" --temperature 0  one answer, then exit
  ktransformers --gguf_path DeepSeek-V2-Lite.Q4_K_M.gguf \\
      --model_path DeepSeek-V2-Lite --optimize_rule_path my-rules.yaml \\
      --cache_size 12GiB --cpu_infer 8
  ktransformers --gguf_path model.gguf --port 10002    a server and a page
"""

_TRACE_EXAMPLES = """examples:
  hybrimoe trace --out run.npz --text book.txt --tokens 1000
  hybrimoe trace --out run.npz --text book.txt --as prefill --chunk_size 128
  hybrimoe trace --out run.npz --prompt "Hello!" --gguf_path model.gguf
  hybrimoe trace --out chat.npz                 records a chat on the terminal

Replay it, in general or, after a run with an accelerator, just as it was:
  hybrimoe simulate --trace run.npz
  hybrimoe simulate --trace run.npz --method recorded
"""

# Flags of kTransformers that a user's script may pass and that mean nothing here.
_WITHOUT_EFFECT = (
    "use_cuda_graph", "mode", "force_think", "device", "tp", "web", "type", "backend_type", "max_batch_size",
    "log_dir", "log_file", "log_level",
)  # fmt: skip
_MAX_NEW_TOKENS = 256


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every flag may be spelled with underscores or hyphens."""
    parser = Parser(
        prog="ktransformers",
        allow_abbrev=False,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a Mixture-of-Experts model, its experts scheduled between CPU and GPU.",
    )
    parser.add_argument("--version", action="version", version=f"hybrimoe_kt {__version__}")
    _add_model(parser)
    _add_answer(parser)
    _add_experts(parser)
    add_server_flags(parser.add_argument_group("server (--port or --host starts it)"))
    report = parser.add_argument_group("report")
    report.add_argument("--verbose", action="store_true", help="log decisions, and show where a token's time went")
    report.add_argument("--stats_json", type=Path, metavar="FILE", help="write the run's numbers and text")
    _add_timeline(report)
    for flag in _WITHOUT_EFFECT:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def _add_timeline(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timeline", type=Path, metavar="FILE", help="write what CPU, GPU and link did when, for Perfetto"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--gguf_path", type=Path, metavar="PATH", help=".gguf file, one of its splits, or a directory")
    model.add_argument(
        "--model_path",
        type=Path,
        metavar="DIR",
        help="directory with config.json and tokenizer; default: from the GGUF",
    )
    model.add_argument(
        "--optimize_rule_path",
        "--optimize_config_path",
        type=Path,
        metavar="YAML",
        dest="optimize_rule_path",
        help="rule file, or the name of a packaged one; default: the architecture's",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of what is not computed as the file has it; auto: float32 on a CPU, bfloat16 on a GPU",
    )
    model.add_argument(
        "--override_kv",
        action="append",
        default=[],
        metavar="KEY=TYPE:VALUE",
        help="metadata in the place of the GGUF's, as in llama.cpp; TYPE is int, float, bool or str, "
        "e.g. qwen3moe.expert_used_count=int:4",
    )
    model.add_argument(
        "--kv_cache_type",
        choices=tuple(KV_CACHE_TYPES),
        help="how keys and values are kept; default: f16 on a CPU, or as the rules say, the model's dtype on a GPU",
    )
    model.add_argument(
        "--eager",
        action="store_true",
        help="on a GPU, run the model's own code for every token; by default a token's step is captured and replayed",
    )
    model.add_argument(
        "--cache_ram", metavar="SIZE",
        help="host memory for conversations that were answered (8GiB, 0: only the last one); a prompt that begins like "
        "one is read from where it differs; default: an eighth of the machine's",
    )  # fmt: skip
    model.add_argument(
        "--kept_path", type=Path, metavar="DIR",
        help="write those conversations to files there at the end, and go on from them the next time",
    )  # fmt: skip
    model.add_argument(
        "--cache_lens", "--context_tokens", type=_whole(1), metavar="TOKENS", dest="cache_lens",
        help="context limit, and what a GPU's memory is planned for; default: the model's own, planned up to 8192",
    )  # fmt: skip


def _add_answer(parser: argparse.ArgumentParser) -> None:
    answer = parser.add_argument_group("answer")
    answer.add_argument("--prompt", metavar="TEXT", help="answer once and exit")
    answer.add_argument("--prompt_file", type=Path, metavar="FILE", help="the same, from a UTF-8 file")
    answer.add_argument(
        "--max_new_tokens", type=_whole(1), metavar="N",
        help=f"longest answer; default {_MAX_NEW_TOKENS}, for a server what the context holds",
    )  # fmt: skip
    answer.add_argument(
        "--temperature", type=_number(0, 100), default=0.7, metavar="T", help="0: always the likeliest token"
    )
    answer.add_argument(
        "--reasoning_effort", choices=("none", "low", "medium", "high"),
        help="how hard to think, where the model's chat template has such an option; none turns thoughts off",
    )  # fmt: skip
    answer.add_argument("--top_p", type=_number(0, 1), default=0.95, metavar="P")
    answer.add_argument(
        "--seed",
        type=_whole(-1, 2**63 - 1),
        metavar="N",
        help="the same seed draws the same tokens; -1: others each time",
    )


def _add_experts(parser: argparse.ArgumentParser) -> None:
    """Add what `expert_overrides` returns."""
    experts = parser.add_argument_group("experts (these win over the rule file)")
    experts.add_argument("--accelerator", metavar="NAME", help=accelerators.forms())
    experts.add_argument(
        "--cpu_backend", metavar="NAME",
        help=f"who computes on the CPU: {', '.join(CPU_BACKENDS)}, or module:Class; "
        "default: auto, ggml or what `hybrimoe calibrate` measured to be faster",
    )  # fmt: skip
    experts.add_argument(
        "--ggml_library", metavar="PATH", help="another build of ggml than the package's: its directory, or one library"
    )
    experts.add_argument("--gpu_backend", metavar="NAME", help=f"auto, {', '.join(GPU_BACKENDS)}, or module:Class")
    experts.add_argument(
        "--cpu_infer", type=_whole(1), metavar="N",
        help="threads for experts and, on a CPU, dense weights; default: all cores, beside a GPU all but two",
    )  # fmt: skip
    experts.add_argument(
        "--cache_size", metavar="SIZE", help="experts per layer (8), share (25%%), bytes (12GiB), auto"
    )
    experts.add_argument(
        "--card_bytes", metavar="SIZE", help="plan for a card of this size (24GiB); default: all that is free"
    )
    experts.add_argument("--policy", metavar="NAME", help="which expert loses its slot: mrs, lru, ...")
    experts.add_argument("--scheduler", metavar="NAME", help="who computes what: paper, static, ...")
    experts.add_argument(
        "--planner", metavar="NAME",
        help="who plans single tokens: host, or device, kernels within one captured step (not run on a card yet); "
        "default: host",
    )  # fmt: skip
    experts.add_argument(
        "--prefetch_size", type=_whole(0), metavar="N", help="transfers ahead of need per layer, 0: off"
    )
    experts.add_argument("--prefetch_depth", type=_whole(1), metavar="N", help="layers the gates look ahead, 1 to 3")
    experts.add_argument("--profile", metavar="NAME", help="hardware profile: a name or a file")
    experts.add_argument(
        "--chunk_size", type=_whole(1), metavar="TOKENS", help="longest piece of a prompt computed at once"
    )
    experts.add_argument("--host_store", metavar="NAME", help="auto, mapped or page_locked: where transfers come from")
    experts.add_argument(
        "--fallback", choices=("on", "off"), help="give up hybrid plans when they measure slower; default: on"
    )


def build_trace_parser() -> argparse.ArgumentParser:
    """Return the parser of `hybrimoe trace`: what to load as in `ktransformers`, and what to record."""
    parser = Parser(
        prog="hybrimoe trace",
        allow_abbrev=False,
        epilog=_TRACE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Record which experts a model chooses, its router scores, and what gates predict.",
    )
    record = parser.add_argument_group("recording")
    record.add_argument("--out", "-o", type=Path, metavar="FILE", required=True, help="trace to write (.npz)")
    record.add_argument("--text", type=Path, metavar="FILE", help="run this UTF-8 text through the model")
    record.add_argument(
        "--as",
        dest="phase",
        choices=("decode", "prefill"),
        default="decode",
        help="the text token by token, or in chunks of --chunk_size; default: decode",
    )
    record.add_argument("--tokens", type=_whole(1), metavar="N", help="of the text at most; default: all")
    record.add_argument(
        "--depth", type=_whole(1, 3), default=3, metavar="N", help="layers whose gates predict, 1 to 3 (default: 3)"
    )
    _add_timeline(record)
    record.add_argument("--json", action="store_true", help="print one JSON object instead of tables and text")
    record.add_argument("--verbose", action="store_true", help="log decisions")
    _add_model(parser)
    _add_answer(parser)
    _add_experts(parser)
    return parser


def parse_trace(argv: list[str]) -> argparse.Namespace:
    """Parse a command line of `hybrimoe trace`; exits with code 2 and one sentence when it cannot be used."""
    parser = build_trace_parser()
    options = parser.parse_args([_underscored(word) for word in argv])
    given = [flag for flag in ("text", "prompt", "prompt_file") if getattr(options, flag) is not None]
    if len(given) > 1:
        parser.error(f"give --{given[0]} or --{given[1]}, not both")
    if options.text is None and options.tokens is not None:
        parser.error("--tokens shortens a --text; the answer to a prompt is as long as --max_new_tokens")
    options.max_new_tokens = options.max_new_tokens or _MAX_NEW_TOKENS
    return options


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line; exits with code 2 and one sentence when it cannot be used."""
    options = build_parser().parse_args([_underscored(word) for word in argv])
    options.without_effect = [flag for flag in _WITHOUT_EFFECT if getattr(options, flag) is not None]
    if options.prompt is not None and options.prompt_file is not None:
        build_parser().error("give --prompt or --prompt_file, not both")
    settle_server(build_parser(), options)
    if not options.is_server:
        options.max_new_tokens = options.max_new_tokens or _MAX_NEW_TOKENS
    return options


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def expert_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the `ExpertOptions` that the command line sets."""
    names = {"cpu_infer": "cpu_threads", "chunk_size": "max_chunk_tokens"}
    flags = ("accelerator", "cpu_backend", "cpu_infer", "cache_size", "card_bytes", "policy", "scheduler", "planner",
             "prefetch_size", "prefetch_depth", "profile", "chunk_size", "host_store",
             "gpu_backend", "ggml_library")  # fmt: skip
    fallback = {} if options.fallback is None else {"fallback": options.fallback == "on"}
    return fallback | {names.get(flag, flag): value for flag in flags if (value := getattr(options, flag)) is not None}


class SamplingOptions(Protocol):
    """What a command line says of how answers are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


def sampling_of(options: SamplingOptions) -> Sampling:
    """Return it as an engine takes it."""
    from hybrimoe_kt.engine.sampling import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
