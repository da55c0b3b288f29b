"""What memory and tensor cores of a GPU allow for one MoE layer: arithmetic, no GPU needed.

    python -m benchmarks.gpu_roofline        the tables of docs/kernels.md

Bytes are those of the weights of every expert that is used, read once; activations are a thousandth of them and left
out. Operations are multiply-adds. Both over the published rates in `hybrimoe_kt.kernels.targets`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_kt.kernels.targets import TARGETS, Target
from hybrimoe_kt.quants import TYPES
from hybrimoe_kt.sim.models import MODELS, ModelSpec

Q4_K, Q5_0, Q6_K, Q8_0 = 12, 6, 14, 8
MIXES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "deepseek-v2-lite": ((Q4_K, Q4_K, Q5_0), (Q4_K, Q4_K, Q8_0)),
}
"""Types of gate, up and down in a Q4_K_M file, half of the layers each; 1408 columns are no multiple of 256."""
DEFAULT_MIX = ((Q4_K, Q4_K, Q4_K), (Q4_K, Q4_K, Q6_K))
SHOWN = ("sm_86", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100")


def mixes_of(model: str) -> tuple[tuple[int, int, int], ...]:
    return MIXES.get(model, DEFAULT_MIX)


def expert_bytes(spec: ModelSpec, kinds: tuple[int, int, int]) -> float:
    """Bytes of one expert whose gate, up and down have these types."""
    return sum(spec.hidden * spec.expert_width * TYPES[kind].bytes_per_value for kind in kinds)


def expert_macs(spec: ModelSpec) -> int:
    """Multiply-adds of one token in one expert."""
    return 3 * spec.hidden * spec.expert_width


def experts_used(spec: ModelSpec, num_tokens: int) -> float:
    """How many experts a layer reads on average when every token chooses evenly and by itself."""
    return spec.num_experts * (1 - (1 - spec.top_k / spec.num_experts) ** num_tokens)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds one layer takes at least, by memory and by tensor cores."""

    memory_s: float
    tensor_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.tensor_s)


def roofline(spec: ModelSpec, kinds: tuple[int, int, int], target: Target, num_tokens: int) -> Roofline:
    """The bounds of one layer's experts; all of them in slots."""
    num_bytes = experts_used(spec, num_tokens) * expert_bytes(spec, kinds)
    macs_per_s = target.tensor_macs * target.num_cores * target.clock_hz
    tensor_s = num_tokens * spec.top_k * expert_macs(spec) / macs_per_s
    return Roofline(num_bytes / target.dram_bytes_per_s, tensor_s)


def mean_roofline(spec: ModelSpec, target: Target, num_tokens: int) -> Roofline:
    """The mean over the file's mixes."""
    both = [roofline(spec, kinds, target, num_tokens) for kinds in mixes_of(spec.name)]
    return Roofline(sum(bound.memory_s for bound in both) / len(both), both[0].tensor_s)


def table(num_tokens: int) -> str:
    """Microseconds a layer for every model and GPU, as Markdown; `t` marks what tensor cores bound."""
    names = [f"{TARGETS[name].product}" for name in SHOWN]
    lines = ["| model | MB an expert | " + " | ".join(names) + " |", "|---|--:|" + "--:|" * len(SHOWN)]
    for spec in MODELS.values():
        megabytes = sum(expert_bytes(spec, kinds) for kinds in mixes_of(spec.name)) / len(mixes_of(spec.name)) / 1e6
        cells = [_cell(mean_roofline(spec, TARGETS[name], num_tokens)) for name in SHOWN]
        lines.append(f"| {spec.name} | {megabytes:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(bound: Roofline) -> str:
    return f"{bound.seconds * 1e6:.0f}" + (" t" if bound.tensor_s > bound.memory_s else "")


def main() -> None:
    for num_tokens in (1, 8, 512, 2048):
        print(f"{num_tokens} tokens, us a layer\n\n{table(num_tokens)}\n")


if __name__ == "__main__":
    main()
