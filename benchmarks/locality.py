"""Locality of the embedded model's routing beside recorded traces of large models: writes docs/locality.md.

python -m benchmarks.locality --write docs/locality.md
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from hybrimoe_kt.models import recorded_traces
from hybrimoe_kt.sim.hit_rate import hit_rate
from hybrimoe_kt.sim.locality import LAGS, recall_by_layer, summarize
from hybrimoe_kt.sim.markdown import mean, percent, table
from hybrimoe_kt.sim.trace import Trace
from hybrimoe_kt.sim.trace_file import read_trace

LARGE = {
    "Qwen3-30B-A3B": Path("tests/data/traces/qwen3-30b-a3b.npz"),
    "Gemma-4-26B-A4B": Path("tests/data/traces/gemma4-26b-a4b.npz"),
}
POLICIES = ("lru", "lfu", "mrs", "adaptive", "belady")
SHARES = (0.125, 0.25, 0.5)
"""Of each layer's experts that have a slot."""


def traces() -> dict[str, Trace]:
    """The embedded model's traces by the kind of text, then the large models'."""
    ours = {f"embedded, {name}": read_trace(path) for name, path in recorded_traces().items()}
    return ours | {name: read_trace(path) for name, path in LARGE.items()}


def overview(found: dict[str, Trace]) -> str:
    rows = [
        [name, str(len(t.experts)), str(len(list(t.phase_steps("decode")))), str(len(t.layers)), str(t.num_experts),
         str(t.top_k), "yes" if t.predicted is not None else "no"]
        for name, t in found.items()
    ]  # fmt: skip
    return table(["trace", "tokens", "decoded", "MoE layers", "experts", "top-k", "scores and look-ahead"], rows)


def reuse(found: dict[str, Trace], facts: dict[str, dict]) -> str:
    rows = [
        [name, percent(facts[name]["chance"]), *(percent(share) for share in facts[name]["reuse"].values()),
         *(percent(share) for share in facts[name]["coverage"].values())]
        for name in found
    ]  # fmt: skip
    lags = [f"{lag} before" for lag in LAGS]
    shares = [f"top {share} of experts" for share in next(iter(facts.values()))["coverage"]]
    return table(["trace", "by chance", *lags, *shares], rows)


def hit_rates(found: dict[str, Trace]) -> str:
    rows = []
    for name, trace in found.items():
        for share in SHARES:
            slots = max(trace.top_k, round(share * trace.num_experts))
            rates = [percent(hit_rate(trace, policy, slots)) for policy in POLICIES]
            rows.append([name, f"{slots} of {trace.num_experts}", *rates])
    return table(["trace", "slots a layer", *POLICIES], rows)


def first_layer(found: dict[str, Trace], facts: dict[str, dict]) -> str:
    """The first MoE layer beside the mean of the others."""
    rows = []
    for name, trace in found.items():
        most = facts[name]["max_entropy_bits"]
        layers, slots = facts[name]["layers"], round(0.25 * trace.num_experts)
        hits = [hit_rate(only(trace, position), "lru", slots) for position in range(len(trace.layers))]
        for what, chosen in (("first", [0]), ("others", range(1, len(layers)))):
            rows.append(
                [name, what, percent(mean(layers[p]["reuse"] for p in chosen)),
                 f"{mean(layers[p]['usage_entropy_bits'] for p in chosen):.2f} of {most:.2f}",
                 percent(mean(hits[p] for p in chosen))]
            )  # fmt: skip
    header = ["trace", "layer", "kept from the last token", "entropy of use, bits", "LRU hit rate, a quarter cached"]
    return table(header, rows, align="llrrr")


def only(trace: Trace, position: int) -> Trace:
    """One layer of a trace, without look-ahead."""
    part = slice(position, position + 1)
    return replace(
        trace, layers=trace.layers[part], expert_bytes=trace.expert_bytes[part], experts=trace.experts[:, part],
        weights=trace.weights[:, part], scores=None if trace.scores is None else trace.scores[:, part],
        predicted=None, predicted_scores=None, token_scores=None, _routings={}, _predictions={},
    )  # fmt: skip


def look_ahead(found: dict[str, Trace]) -> str:
    rows = []
    for name, trace in found.items():
        if trace.predicted is None:
            continue
        for layer, shares in zip(trace.layers, recall_by_layer(trace), strict=True):
            rows.append([name, str(layer), *("-" if share is None else percent(share) for share in shares)])
        rows.append(
            [name, "all", *(percent(share or 0.0) for share in summarize(trace)["look_ahead_recall"]["stale_gate"])]
        )
    depth = max(trace.depth for trace in found.values())
    ahead = ["1 layer before", *(f"{number} layers before" for number in range(2, depth + 1))]
    return table(["trace", "layer predicted", *ahead], rows, align="ll" + "r" * depth)


def document(found: dict[str, Trace]) -> str:
    """The page."""
    facts = {name: summarize(trace) for name, trace in found.items()}
    return TEXT.format(
        overview=overview(found), reuse=reuse(found, facts), hits=hit_rates(found), first=first_layer(found, facts),
        look_ahead=look_ahead(found),
    )  # fmt: skip


TEXT = """# Locality of the embedded model's routing

How far the routing of the [embedded model](models.md#the-embedded-model), small but trained, behaves as that of large
models does, which decides what a policy tuned on it is worth elsewhere. Computed from recorded traces by
`make locality`; nothing here is synthetic, nothing depends on a machine's speed.

In short: it is routing of a trained model, better than chance at every lag, and **less local than that of the large
ones**: a token keeps a smaller share of its predecessor's experts, and the same share of slots hits less often. Order
of policies is alike; their rates are not to be carried over.

## Traces

The embedded model read held-out text token by token (`hybrimoe trace`): dialogues of its own kind, people's
chat, and a novel. They are in the package, `hybrimoe_kt/models/traces`. The large models' traces are
[somebody else's](https://github.com/Helldez/BigMoeOnEdge) (Apache-2.0), of one answer each.

{overview}

## Reuse

Share of a token's experts that the token so many places before it used, too, and share of all choices that fall on
the most used experts.

{reuse}

## Hit rates

Of cache policies alone, every miss fetched; decode steps, caches empty at first. `belady` knows the future.

{hits}

## The first layer

No earlier gate can foretell it, so prefetching never helps it; its router sees hardly more than the token itself.

{first}

## Look-ahead

Share of a layer's experts that its own gate, given the hidden state of a layer so many before it, names among as
many. The large models' traces hold no look-ahead.

{look_ahead}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="instead of printing")
    file = parser.parse_args().write
    text = document(traces())
    if file:
        file.write_text(text, encoding="utf-8")
        print(file)
    else:
        print(text)


if __name__ == "__main__":
    main()
