"""What one decode step launches on an accelerator in one layer: stock modules and this package's operators compared.

    python -m benchmarks.launches

Counted, not timed, and without a device: tensors of a CPU stand for it, Triton's kernels run in its interpreter. Every
operation that torch's dispatcher sees and that is no view is one kernel, top-k two; memory is allocated for nothing;
Triton's launches count as they happen; copies over the link apart. The models are narrow ones of the architecture, in
bfloat16; half of their experts are resident, and prefetched ahead. "Stock" is an ordinary step with the same packed
products: attention is SDPA's one kernel, or what absorbed latent attention takes. "Ours" is the step that a GPU
captures, which reads its length on the device, with Triton's attention.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybrimoe_kt.engine.memory.growing_cache import growing_cache
from hybrimoe_kt.host.hf.fixed_steps import attention_of, sums_may_wait
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.host.rules.rule_file import packaged_rules
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.runtime import runtime as runtime_module
from tests.support import interpreter
from tests.support.generated_model import Shape, Type, generate

PARTS = ("norms", "attention", "residuals", "router", "shared experts", "experts", "look-ahead")
LAYER, LAYERS = 1, 3
"""The layer that is counted, of so many. How many gates it looks ahead to makes no difference: they are one product."""
_NARROW: dict[str, Any] = {
    "layers": LAYERS, "hidden": 256, "heads": 8, "experts": 8, "top_k": 4, "inter": 256, "dense_type": Type.Q8_0,
}  # fmt: skip
MODELS = {
    "Qwen3-30B-A3B": Shape(**_NARROW),
    "DeepSeek-V2-Lite": Shape(architecture="deepseek2", shared_experts=2, **_NARROW),
}
FUSED = ("FusedRMSNorm", "FusedRouter", "FusedRotary", "FusedMLP", "MoEBlock")
ATTENTION = ("DecodeAttention", "AbsorbedMLA")
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "resize_", "alias"}
_KERNELS = {"topk": 2}
_TRANSFERS = ("expert copy", "take blocks apart")
"""Of weights, which are not a layer's own."""


class Launches(TorchDispatchMode):
    """Counts by part and name while it is on, see `of`; what Triton's interpreter does itself is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[str] = Counter()
        self._parts: list[str | None] = [None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            self.note(name, _KERNELS.get(name, 1))
        return func(*args, **(kwargs or {}))

    def note(self, name: str, number: int = 1) -> None:
        """A kernel of the part under way."""
        if (part := self._parts[-1]) is not None:
            self.kernels[part, name] += number

    @contextlib.contextmanager
    def of(self, part: str | None) -> Iterator[None]:
        """What is launched meanwhile is of this part; None: of none."""
        self._parts.append(part)
        try:
            yield
        finally:
            self._parts.pop()

    def enter(self, part: str | None) -> None:
        """The same, left by `leave`."""
        self._parts.append(part)

    def leave(self) -> None:
        """End what `enter` began."""
        self._parts.pop()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count, Triton's launches too."""
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.note(executor.fn.__name__)
            with self.of(None):
                return launch(executor, *args, **kwargs)

        GridExecutor.__call__ = launched
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch

    @property
    def by_part(self) -> dict[str, int]:
        """Kernels of each part that has any."""
        parts: Counter[str] = Counter()
        for (part, _), number in self.kernels.items():
            parts[part] += number
        return dict(parts)


def rules_with(name: str, kernel: str, folder: Path) -> Path:
    """The packaged rules of that name, with the operators that are counted computed by `kernel`: triton, or torch."""
    rules = yaml.safe_load(packaged_rules(name).read_text(encoding="utf-8"))
    for rule in rules:
        if rule["replace"].get("class", "").endswith(FUSED + ATTENTION * (kernel == "triton")):
            rule["replace"]["kwargs"] = {"kernel": kernel}
    file = folder / f"{kernel}.yaml"
    file.write_text(yaml.safe_dump(rules), encoding="utf-8")
    return file


@torch.no_grad()  # not inference mode, in which casts look like views
def count(model: Path, rules: Path, *, is_fixed: bool) -> Launches:
    """What one layer launches in a later step of a conversation; the first asks what modules do.

    `is_fixed`: as `CapturedLoop` has it asked of the modules, else as anyone asks them.
    """
    options = {"accelerator": "emulated", "gpu_backend": "triton"}
    options |= {"cache_size": "50%", "scheduler": "static", "prefetch_size": 2}
    loaded = load_model(
        model, rules_path=rules, device="emulated:0", dtype=torch.bfloat16, option_overrides=options, progress=False
    )
    body: Any = loaded.model
    token, launches = torch.tensor([[3]]), Launches()
    step = {"input_ids": token, "use_cache": True}
    step["past_key_values"] = body(**step, past_key_values=growing_cache(body.config)).past_key_values
    with sums_may_wait() if is_fixed else contextlib.nullcontext():
        if is_fixed:
            _fix(step, loaded)
            body(**step)  # the first asks who attends
            _fix(step, loaded)
        with _watching(loaded, launches), launches.counting():
            body(**step)
    assert loaded.runtime.health().is_clean, "the CPU answered in the kernels' place"
    return launches


def _fix(step: dict[str, Any], loaded: LoadedModel) -> None:
    """Let the next step be one whose length stands in a tensor, and add all that it is given to `step`."""
    cache = step["past_key_values"]
    cache.unfix("position_ids" in step)
    held = cache.get_seq_length()
    position = torch.tensor([held])
    cache.fix(position, position + 1)
    for attention in attention_of(loaded.model):
        attention.plan(held + 1)
    step |= {"position_ids": position[None], "attention_mask": (torch.arange(cache.room) <= position)[None, None, None]}


@contextlib.contextmanager
def _watching(loaded: LoadedModel, launches: Launches) -> Iterator[None]:
    """Tell `launches` which part is under way."""
    body: Any = loaded.model
    layer = body.model.layers[LAYER]
    hooks = []
    for path, module in layer.named_modules():
        part = _part_of(path, module)
        if part is not None:
            begin, end = _hooks(launches, part)
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    with contextlib.ExitStack() as stack:
        _watch_runtime(loaded, launches, stack)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _hooks(launches: Launches, part: str | None) -> tuple[Any, Any]:
    return (lambda *_: launches.enter(part)), (lambda *_: launches.leave())


def _part_of(path: str, module: nn.Module) -> str | None:
    """None for what belongs to the module around it."""
    name = path.rpartition(".")[2]
    if not path:
        return "residuals"
    named = {"self_attn": "attention", "gate": "router", "shared_experts": "shared experts"}
    return "norms" if path.endswith("_layernorm") and "." not in path else named.get(name)


def _watch_runtime(loaded: LoadedModel, launches: Launches, stack: contextlib.ExitStack) -> None:
    """Within the experts only what their accelerator is given counts, and the router's scores."""
    (lane,) = loaded.runtime.lanes
    accelerator, own = lane.accelerator, _of_layer(loaded, launches)
    launch, copy, averaged = accelerator.launch, accelerator.copy, runtime_module.mean_probabilities

    def launched(stream: Any, work: Any, *, site: str, **kwargs: Any) -> None:
        part = "look-ahead" if site == "gates" else "experts"
        with launches.of(part if own() and site not in _TRANSFERS else None):
            launch(stream, work, site=site, **kwargs)

    def copied(stream: Any, target: Any, source: Any, site: str) -> None:
        if own() and site not in _TRANSFERS:
            launches.copies[site] += 1
        with launches.of(None):
            copy(stream, target, source, site)

    def scores(*args: Any) -> Any:
        with launches.of("experts" if own() else None):
            return averaged(*args)

    accelerator.launch, accelerator.copy = launched, copied
    runtime_module.mean_probabilities = scores
    stack.callback(lambda: setattr(runtime_module, "mean_probabilities", averaged))
    stack.callback(lambda: vars(accelerator).update(launch=launch, copy=copy))


def _of_layer(loaded: LoadedModel, launches: Launches) -> Any:
    """Whether the experts of the layer that is counted are under way; what they call counts as nobody's."""
    body: Any = loaded.model
    under_way = [False]
    experts = next(m for m in body.model.layers[LAYER].modules() if isinstance(m, HybriMoEExperts))

    def watched(door: Any) -> Any:
        def through(*args: Any) -> Any:
            under_way[0] = True
            try:
                with launches.of(None):
                    return door(*args)
            finally:
                under_way[0] = False

        return through

    experts.begin, experts.finish = watched(experts.begin), watched(experts.finish)
    return lambda: under_way[0]


def table(found: Mapping[str, tuple[Launches, Launches]]) -> str:
    """As Markdown, a column for each model before and after."""
    lines = ["| a layer's | " + " | ".join(f"{name}, stock | ours" for name in found) + " |"]
    lines.append("|---" * (1 + 2 * len(found)) + "|")
    columns = [launches for pair in found.values() for launches in pair]
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(str(column.by_part.get(part, 0)) for column in columns) + " |")
    lines.append("| **kernels** | " + " | ".join(f"**{sum(c.kernels.values())}**" for c in columns) + " |")
    lines.append("| copies | " + " | ".join(str(sum(column.copies.values())) for column in columns) + " |")
    return "\n".join(lines)


def compared(shape: Shape) -> tuple[Launches, Launches]:
    """A model's layer by the stock modules' arithmetic, and by this package's kernels as they are captured."""
    interpreter.mend()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = generate(shape, folder / "model.gguf", keep_state=False).path
        name = "deepseek2" if shape.architecture == "deepseek2" else "qwen3moe"
        before = count(model, rules_with(name, "torch", folder), is_fixed=False)
        return before, count(model, rules_with(name, "triton", folder), is_fixed=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="also every kernel by name")
    arguments = parser.parse_args()
    found = {name: compared(shape) for name, shape in MODELS.items()}
    print(table(found))
    for name, pair in found.items() if arguments.names else ():
        for title, launches in zip(("stock", "ours"), pair, strict=True):
            print(f"\n{name}, {title}: copies {dict(launches.copies)}")
            for part in PARTS:
                named = (f"{n} {kernel}" for (of, kernel), n in launches.kernels.items() if of == part)
                print(f"  {part}: {', '.join(named)}")


if __name__ == "__main__":
    main()
