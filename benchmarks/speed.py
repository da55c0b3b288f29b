"""Decode speed and memory beside stock Transformers and llama.cpp, as ratios within one run.

    python -m benchmarks.speed                       two small models, five rounds
    python -m benchmarks.speed --models embedded --rounds 3 --tokens 32
    python -m benchmarks.speed --models deepseek-v2-lite --rounds 2 --tokens 32
                       all layers, random weights: a file of 9.6 GB, deleted afterwards; wants 20 GiB of memory

Every engine runs in a process of its own, one after the other, several rounds in turn, so that a machine whose
speed drifts treats them alike; the ratio is taken round by round and its median printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clean import refuse_unless_clean
from hybrimoe_kt.models import embedded_model

PROMPT = [5 + (37 * at) % 200 for at in range(24)]
CACHE = Path(".cache/models")
MIB = 2**20
FULL_SIZE = "deepseek-v2-lite"
MODELS = ("embedded", "deepseek-shaped", FULL_SIZE)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS[:2]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="decoded per run, after a warm-up of 8")
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        engine, file = options.child
        result = ENGINES[engine](Path(file), options.tokens)
        print("RESULT " + json.dumps(result | {"peak_mib": _rss_mib("VmHWM")}))
        return
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {len(os.sched_getaffinity(0))} cores, {time.strftime('%Y-%m-%d')}")
    for name in options.models:
        file = model_file(name)
        try:
            report(name, compare(file, engines_for(name), options.rounds, options.tokens))
        finally:
            if name == FULL_SIZE:
                file.unlink()


def model_file(name: str) -> Path:
    if name == "embedded":
        return embedded_model()
    from tests.support.generated_model import DEEPSEEK_V2_LITE, DEEPSEEK_V2_LITE_LAYER, generate

    is_full = name == FULL_SIZE
    file = CACHE / f"deepseek-v2-lite-{'full' if is_full else 'shaped'}.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"generating {file} ({'9.6 GB, minutes' if is_full else '0.85 GB, half a minute'})", flush=True)
        shape = DEEPSEEK_V2_LITE if is_full else DEEPSEEK_V2_LITE_LAYER
        generate(shape, file.with_suffix(".part"), keep_state=False)
        file.with_suffix(".part").rename(file)
    return file


def engines_for(name: str) -> tuple[str, ...]:
    """A full-size model in float32 is more than a small machine's memory; there both of our modes run."""
    return (
        ("none", "emulated", "llama.cpp") if name == FULL_SIZE else ("none", "stock Transformers, float32", "llama.cpp")
    )


def compare(file: Path, engines: tuple[str, ...], rounds: int, num_tokens: int) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            results[engine].append(_child(engine, file, num_tokens))
    return results


def _child(engine: str, file: Path, num_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed", "--child", engine, str(file), "--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def report(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{name}\n{'engine':<28}{'tokens/s':>10}{'ours / it':>11}{'  (rounds)'}")
    ours = [run["tokens_per_s"] for run in results["none"]]
    for engine, runs in results.items():
        rates = [run["tokens_per_s"] for run in runs]
        ratios = [mine / other for mine, other in zip(ours, rates, strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"{engine:<28}{statistics.median(rates):>10.1f}{statistics.median(ratios):>11.2f}  {spread}")
    for engine, runs in results.items():
        peak, loading = (max(run[value] for run in runs) for value in ("peak_mib", "load_s"))
        print(f"{engine}: at most {peak:.0f} MiB resident, mapped pages included; loaded within {loading:.0f} s")
    last = results["none"][-1]
    print("one token: " + ", ".join(f"{share} {value:.2f} ms" for share, value in last["per_token_ms"].items()))
    allowed = last["dense_mib"] + last["experts_mib"] + 300
    print(
        f"resident after load {last['loaded_mib']:.0f} MiB, {last['libraries_mib']:.0f} of them the imported libraries "
        f"(dense weights + experts + 300 = {allowed:.0f} MiB); "
        f"grown over {last['grown_tokens']} tokens: {last['grown_mib']:.1f} MiB "
        f"(the KV cache is {last['kv_cache_mib']:.1f})"
    )


def _rss_mib(what: str = "VmRSS") -> float:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / MIB


def _rate(step: Callable[[], None], num_tokens: int, warm_up: int = 8) -> float:
    for _ in range(warm_up):
        step()
    began = time.perf_counter()
    for _ in range(num_tokens):
        step()
    return num_tokens / (time.perf_counter() - began)


def run_ours(file: Path, num_tokens: int, *, warm_up: int = 8, grow: int = 500, **overrides: Any) -> dict[str, Any]:
    from hybrimoe_kt.engine.build import build_engine
    from hybrimoe_kt.engine.engine import Sampling

    libraries, began = _rss_mib(), time.perf_counter()
    engine = build_engine(file, progress=False, time_shares=True, option_overrides=overrides)
    loaded, load_s = _rss_mib(), time.perf_counter() - began
    engine.end_ids = set()
    sampling = Sampling(max_new_tokens=10**6, temperature=0)
    tokens = engine.tokens(PROMPT, sampling)
    next(tokens)
    rate = _rate(lambda: next(tokens), num_tokens, warm_up)
    more = min(grow, 10 * num_tokens, engine.context_tokens - len(PROMPT) - num_tokens - 16)
    before = _rss_mib()
    for _ in range(more):
        next(tokens)
    cache = engine.cache_bytes / MIB
    floats = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    packed = sum(matrix.data.numel() for matrix in engine.loaded.loader.packed.values())
    refuse_unless_clean(engine.runtime)
    assert engine.shares is not None
    return {
        "tokens_per_s": rate,
        "load_s": load_s,
        "per_token_ms": engine.shares.per_token_ms(),
        "libraries_mib": libraries,
        "loaded_mib": loaded,
        "dense_mib": (floats + packed) / MIB,
        "experts_mib": engine.runtime.store.num_bytes / MIB,
        "grown_mib": _rss_mib() - before,
        "grown_tokens": more,
        "kv_cache_mib": cache,
    }


_ONLY_EXPERTS = r"""
- match: {name: ^model\.layers\.\d+\.mlp\.experts$}
  replace: {class: hybrimoe_kt.operators.experts.HybriMoEExperts}
  recursive: false
"""
"""Rules that leave everything dense to Transformers."""


def run_stock(file: Path, num_tokens: int) -> dict[str, Any]:
    """Stock Transformers on the same weights, dequantised to float32, with all cores."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from hybrimoe_kt.device.cores import physical_cores
    from hybrimoe_kt.host.hf.loading import load_model

    torch.set_num_threads(physical_cores())
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as rules:
        rules.write(_ONLY_EXPERTS)
        rules.flush()
        overrides = {"cpu_backend": "torch_reference"}
        loaded = load_model(file, rules_path=rules.name, progress=False, option_overrides=overrides)
    stock = AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.float32).eval()
    _copy_weights(loaded, stock)
    load_s = time.perf_counter() - began
    cache, ids = DynamicCache(config=stock.config), torch.tensor([PROMPT])

    @torch.inference_mode()
    def step() -> None:
        nonlocal ids
        ids = stock(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    step()
    return {"tokens_per_s": _rate(step, num_tokens), "load_s": load_s}


def _copy_weights(loaded: Any, stock: Any) -> None:
    import torch

    from hybrimoe_kt.backends.dequantize import dequantize

    dense = dict(loaded.model.state_dict())
    for layer, experts in loaded.runtime.store.layers.items():
        gate, up, down = (
            dequantize(m.data.flatten(), m.ggml_type, (experts.num_experts, m.rows, m.columns))
            for m in experts.matrices
        )
        prefix = f"model.layers.{layer}.mlp.experts"
        dense |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}.down_proj": down}
    missing, unexpected = stock.load_state_dict(dense, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected


def run_llama_cpp(file: Path, num_tokens: int) -> dict[str, Any]:
    import xllamacpp

    from hybrimoe_kt.device.cores import physical_cores

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel = 1024, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = physical_cores()
    began = time.perf_counter()
    server = xllamacpp.Server(parameters)
    load_s = time.perf_counter() - began
    request = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "n_probs": 0}
    server.handle_completions(request | {"max_tokens": 8})
    answer = server.handle_completions(request | {"max_tokens": num_tokens, "timings_per_token": True})
    return {"tokens_per_s": answer["timings"]["predicted_per_second"], "load_s": load_s}


def run_emulated(file: Path, num_tokens: int) -> dict[str, Any]:
    """A quarter of the experts in slots; the "GPU's" share is computed by plain torch on the CPU, seconds a token."""
    return run_ours(file, min(num_tokens, 4), warm_up=1, grow=0, accelerator="emulated", cache_size="25%")


ENGINES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "none": run_ours,
    "emulated": run_emulated,
    "stock Transformers, float32": run_stock,
    "llama.cpp": run_llama_cpp,
}

if __name__ == "__main__":
    main()
