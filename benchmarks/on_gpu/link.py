"""Step 2: what the device layer takes for granted of link, page-locking and waiting, on plain torch."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from hybrimoe_kt.errors import summary

from .plan import Plan
from .results import Results
from .timing import host_s, synchronize, whole_s

__all__ = ["run"]

STEP, TABLE = "link", "link"
_REGISTER_READ_ONLY = 8


def run(plan: Plan, results: Results, ends_s: float) -> None:
    """Every probe by itself: one that fails is a row, and the rest goes on."""
    device = torch.device("cpu") if plan.is_emulated else torch.device(plan.accelerator)
    link = Link(device, results, 1 << 16 if plan.is_emulated else 1 << 28 if plan.quick else 1 << 30)
    probes: dict[str, Callable[[], None]] = {
        "large copies": link.large_copies, "registered mappings": link.registered, "small copies": link.small_copies,
        "small beside large": link.beside_a_large_copy, "host's calls": link.calls, "attention": link.attention,
    }  # fmt: skip
    for name, probe in probes.items():
        if time.monotonic() > ends_s:
            results.leave_out(STEP, TABLE, name, "out of time")
            continue
        try:
            probe()
        except Exception as error:
            results.fail(STEP, TABLE, name, summary(error))


class Link:
    """The probes; `num_bytes` is what counts as a large copy."""

    def __init__(self, device: torch.device, results: Results, num_bytes: int) -> None:
        self.device, self.results, self.num_bytes = device, results, num_bytes
        self.is_cuda = device.type == "cuda"
        self.target = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def say(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.results.add(STEP, TABLE, name, {"value": value, "unit": unit}, note=note)

    def leave_out(self, name: str) -> None:
        self.results.leave_out(STEP, TABLE, name, "needs a card: there is no link here")

    def locked(self, num_bytes: int) -> torch.Tensor:
        """Page-locked memory of random bytes."""
        return (
            torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).pin_memory() if self.is_cuda else _random(num_bytes)
        )

    def rate(self, work: Callable[[], object], num_bytes: int, repeats: int = 5) -> float:
        return num_bytes / whole_s(work, self.device, repeats) / 1e9

    def large_copies(self) -> None:
        """Rates of large copies both ways, page-locked and not, of random bytes."""
        size = self.num_bytes // 2
        target, locked = self.target[:size], self.locked(size)
        self.say("to the device, page-locked", self.rate(lambda: target.copy_(locked, non_blocking=True), size), "GB/s")
        self.say("to the host, page-locked", self.rate(lambda: locked.copy_(target, non_blocking=True), size), "GB/s")
        pageable = locked.clone()
        self.say("to the device, not page-locked", self.rate(lambda: target.copy_(pageable), size, 2), "GB/s")
        for expert in (1 << 20, 3 << 20, 16 << 20):
            part = min(expert, size)
            rate = self.rate(lambda part=part: target[:part].copy_(locked[:part], non_blocking=True), part, 20)
            self.say(
                f"to the device, page-locked, one of {expert >> 20} MiB alone",
                rate,
                "GB/s",
                "host's call and wait included",
            )

    def registered(self) -> None:
        """Page-locking a file's pages in place: how fast, what it costs in RAM, what a copy from there does."""
        names = {kind: f"a file's pages registered, {kind} mapping" for kind in ("private", "shared read-only")}
        if not self.is_cuda or torch.version.hip is not None:
            for name in names.values():
                if not self.is_cuda:
                    self.leave_out(name)
                else:
                    self.results.leave_out(STEP, TABLE, name, "not used on ROCm")
            return
        places = [folder for folder in (Path("/dev/shm"), self.results.folder) if _has_room(folder, self.num_bytes)]
        if not places:
            why = f"no room for a file of {self.num_bytes >> 20} MiB"
            self.results.leave_out(STEP, TABLE, "a file's pages registered", why)
        for where in places:
            named = "RAM (tmpfs)" if where == Path("/dev/shm") else "the output folder"
            block = os.urandom(1 << 24)
            with tempfile.TemporaryFile(
                dir=where
            ) as file:  # without a name: gone with this process, also when it is cut
                for _ in range(self.num_bytes >> 24):
                    file.write(block)
                file.flush()
                for kind, name in names.items():
                    self._register(file.fileno(), f"{name}, in {named}", kind == "private")

    def _register(self, file: int, name: str, is_private: bool) -> None:
        flags = mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
        access = mmap.PROT_READ | (mmap.PROT_WRITE if is_private else 0)
        size = self.num_bytes
        mapped = mmap.mmap(file, size, flags=flags, prot=access)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the memory is read-only, and nobody writes to it
            source = torch.frombuffer(mapped, dtype=torch.uint8)
        runtime, before, began = torch.cuda.cudart(), _meminfo(), time.perf_counter()
        try:
            code = int(runtime.cudaHostRegister(source.data_ptr(), size, _REGISTER_READ_ONLY))
        except RuntimeError as error:
            code = -1
            print(error, flush=True)
        seconds, after = time.perf_counter() - began, _meminfo()
        if code != 0:
            self.results.leave_out(
                STEP, TABLE, name, f"refused by the driver (code {code}): transfers go through staging"
            )
            try:
                torch.zeros(1, device=self.device)  # the refusal stays pending until a launch reports it
            except RuntimeError as error:
                print(error, flush=True)
            return
        grown = after["AnonPages"] - before["AnonPages"]
        rate = self.rate(lambda: self.target.copy_(source, non_blocking=True), size, 2)
        runtime.cudaHostUnregister(source.data_ptr())
        self.say(
            name,
            size / seconds / 1e9,
            "GB/s",
            f"RAM grew by {grown} MiB for {size >> 20} MiB; copies from it run at {rate:.1f} GB/s",
        )

    def small_copies(self) -> None:
        """The wait of every layer: small copies to the host, a mark, polling until it is seen."""
        if not self.is_cuda:
            self.leave_out("small copies to the host, seen by polling")
            return
        sizes = (4096, 64, 32, 512)
        boxes, sources = [self.locked(size) for size in sizes], [self.target[:size].clone() for size in sizes]
        mark, stream = torch.Event(self.device), torch.accelerator.current_stream(self.device)
        for number in (1, 4):
            given, seen = [], []
            for _ in range(200):
                synchronize(self.device)
                began = time.perf_counter()
                for box, source in zip(boxes[:number], sources[:number], strict=True):
                    box.copy_(source, non_blocking=True)
                stream.record_event(mark)
                given.append(time.perf_counter() - began)
                while not mark.query():
                    pass
                seen.append(time.perf_counter() - began)
            note = f"{statistics.median(given) * 1e6:.1f} us of them to enqueue"
            self.say(f"small copies to the host, seen by polling: {number}", statistics.median(seen) * 1e6, "us", note)

    def beside_a_large_copy(self) -> None:
        """Whether 8 KiB to the device pass a large copy on another stream."""
        if not self.is_cuda:
            self.leave_out("8 KiB to the device beside a large copy")
            return
        large, small, on_device = self.locked(self.num_bytes // 4), self.locked(8192), self.target[:8192].clone()
        other, mark = torch.Stream(self.device, priority=0), torch.Event(self.device)
        stream = torch.accelerator.current_stream(self.device)
        for busy in (False, True):
            samples = []
            for _ in range(20):
                synchronize(self.device)
                if busy:
                    with other:
                        self.target[: large.numel()].copy_(large, non_blocking=True)
                began = time.perf_counter()
                on_device.copy_(small, non_blocking=True)
                stream.record_event(mark)
                while not mark.query():
                    pass
                samples.append(time.perf_counter() - began)
            name = f"8 KiB to the device, {'beside a large copy' if busy else 'link idle'}"
            self.say(
                name,
                statistics.median(samples) * 1e6,
                "us",
                f"the large copy takes {large.numel() / 2**20:.0f} MiB" if busy else "",
            )

    def calls(self) -> None:
        """What the host pays for calls that are made many times a layer."""
        small, on_device = self.locked(8192), self.target[:8192].clone()
        row = torch.zeros(1, 2048, dtype=torch.bfloat16, device=self.device)
        calls: dict[str, Callable[[], object]] = {
            "copy of 8 KiB to the host": lambda: small.copy_(on_device, non_blocking=True),
            "copy of 8 KiB to the device": lambda: on_device.copy_(small, non_blocking=True),
            "one small kernel, eager": lambda: row.add_(1.0),
            "sleep of 10 us": lambda: time.sleep(1e-5),
        }
        if self.is_cuda:
            mark, stream = torch.Event(self.device), torch.accelerator.current_stream(self.device)
            calls |= {"mark": lambda: stream.record_event(mark), "question whether a mark is reached": mark.query}
        for name, call in calls.items():
            self.say(f"host's time: {name}", host_s(call, self.device, 500) * 1e6, "us")

    def attention(self) -> None:
        """Attention of one new token at lengths never seen before, which every decode step is; cuDNN plans for each."""
        from torch.nn.functional import scaled_dot_product_attention as attend

        query = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16, device=self.device)
        for name, enabled in (("cuDNN allowed", True), ("cuDNN off, as the engine has it", False)):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            first, again = [], []
            for length in range(900, 912):
                keys = torch.randn(1, 4, length, 128, dtype=torch.bfloat16, device=self.device)
                for samples in (first, again):
                    samples.append(
                        whole_s(lambda keys=keys: attend(query, keys, keys, enable_gqa=True), self.device, 1)
                    )
            note = f"{statistics.median(again[2:]) * 1e6:.0f} us when the length is seen again"
            self.say(f"attention of one token at a new length, {name}", statistics.median(first[2:]) * 1e6, "us", note)


def _has_room(folder: Path, num_bytes: int) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * num_bytes


def _random(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in MiB."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
    return {name.rstrip(":"): int(number) // 1024 for name, number, *_ in lines}
