"""What the report says around its tables, for somebody who sees such numbers for the first time."""

from __future__ import annotations

__all__ = ["EMULATED", "STEPS", "WHAT_TO_DO"]

EMULATED = (
    "**Emulated: there was no card.** This run shows that the command works and what a report looks like. Shapes are "
    "tiny, experts are computed by plain torch on the CPU, and its times mean nothing."
)

WHAT_TO_DO = "\n".join(
    "| " + " | ".join(cells) + " |"
    for cells in (
        ("a step or a row says", "what happened", "what to do"),
        ("---", "---", "---"),
        (
            "failed",
            "the program raised an error; the note has its last line, the named file beside this report all of it",
            "where a test or a check of answers failed, do not trust times; report it, with this folder",
        ),
        (
            "cut",
            "the step ran past its time limit and was ended; what it had found is kept",
            "more `--minutes`, or fewer `--models`",
        ),
        (
            "not begun, left out",
            "there was no time, no room, or nothing to measure; the note says which",
            "more `--minutes`; a smaller model in `--models`; free memory",
        ),
        (
            "abandoned, failed, shrunk or fallback in place of times",
            "the accelerator failed or ran out of memory in that row and the CPU answered in its place",
            "the note counts and names the cause; out of memory: close what else uses the card",
        ),
    )
)

STEPS: dict[str, tuple[str, str]] = {
    "machine": (
        "The machine",
        "What was measured, and on what. Numbers of two reports compare only where these agree.",
    ),
    "tests": (
        "Is it right",
        """\
The project's own tests of everything that runs on a device: the device layer (slots, copies, order), the kernels
against plain arithmetic, whole models against the reference. **Good is: none failed.** Skipped ones need something
that this machine does not have. The first run compiles some 170 kernels, which takes a minute or two; where the
step was cut, what ran until then is counted.""",
    ),
    "link": (
        "The link",
        """\
What everything else takes for granted of the connection between RAM and card.

- *Large copies* bound how fast experts come to the card: good is 80 % of the bus (PCIe 3.0 x16: 12 of 16 GB/s, 4.0:
  25 of 32, 5.0: 50 of 64). Memory that is not page-locked is slower, which is why experts are page-locked where RAM
  allows.
- *A file's pages registered* is how experts are sent without a copy of them in RAM: good is that RAM grows by next
  to nothing. A *private* mapping may cost the file's size in RAM again; the engine uses whichever the driver
  grants, and staging buffers if none.
- *Small copies to the host* are the one wait of every layer: good is 10 to 25 us for four. *8 KiB beside a large
  copy*: near the idle link's time means that small copies pass large ones; as long as the large copy takes means
  that they queue.
- *Host's time* is paid by Python for each such call; a layer makes some dozens.
- *Attention at a new length*: with cuDNN allowed it may take milliseconds on Hopper, as it plans for every length
  anew. The engine switches cuDNN's off; the second line is what it gets, and should be tens of microseconds.""",
    ),
    "kernels": (
        "The kernels",
        """\
One layer's experts, all on the card, many launches with different routings in one CUDA graph. *Of copy* is the rate
at which the used experts' bytes are read over the rate of a large copy of random bytes: for few tokens, reading
weights is all there is to do. **Good is** 70 to 85 % for large experts (Mixtral) and 40 to 75 % for small ones at 1
to 8 tokens; from 64 tokens on arithmetic counts as well, and *of roofline* tells, 20 to 60 %. *Host* is what
enqueueing costs without a graph. *Over torch* is how many times faster than dequantising every used expert and
multiplying; below 1 the kernels are not worth having there.

*Linear layers* of DeepSeek-V3, outside its experts, in every type that kernels read: *us a layer* has the rounding of
its input in it, *of copy* is the matrix's bytes. **Good is** 70 % and more at 1 token.""",
    ),
    "model": (
        "{model}, whole",
        """\
A file with the released model's dimensions and random weights, made for this run. Its text means nothing and its
routing is spread evenly, while real models come back to the same experts: **hit rates, and with them times below
100 % cached, are pessimistic**.

*Answers*: three layers beside the same experts in float32, everything unwritten full of NaN. Good is below 0.03,
which is the rounding of activations to 8 bits; more is wrong, whatever the times say.

*Methods*: who computes which expert, with that share of the experts on the card. `hybrid` plans every layer anew
and moves experts when that pays; `hybrid, eager` the same without captured steps; `hybrid, no prefetch` moves none
ahead of need; `static` leaves the experts where they are, the CPU computing what is not on the card; `gpu_only` moves
everything to the card; `cpu_only` leaves experts to the CPU and is the same at every cache size.
**Good is** that `hybrid` is the fastest of its cache size, and that `all` is several times faster than 50 %.

- *ms* is one token, the median, and *p90* what nine in ten tokens stay below. 1000 / ms is tokens a second.
- *hits* is the share of routed experts that were on the card; *on CPU* is experts a layer that the CPU computed;
  *sent, ahead* are transfers a token, of experts needed at once, and prefetched.
- *prompt* columns are tokens a second of a prompt, from nothing to the first answer.

*Where a layer's time goes*: the parts of a layer's time on the host, microseconds: replaying what was captured of the
model (0 in an eager step, in which its code runs instead, and is not in any part), reading the routing (it
waits for the card's attention), planning, submitting the work, deciding prefetches, waiting for the CPU's share. A
card that is fast and a model that is small make `plan`, `submit` and `prefetch` the limit. Where all experts are on the
card nothing is read or planned, so these are near 0.

*Overlap* is the share of a decode step in which CPU, card and link were busy with experts, and at the same time
(the card's attention is not counted, so 100 % is not reached). *Predicted* and *step* are a layer's planned and
measured time; off by is their median ratio less one: within 20 % plans can be trusted.""",
    ),
    "llama": (
        "{model}, llama.cpp on the same file",
        """\
`llama-bench` on the same file. *All on the card* is beside our `all`, a share of the layers' experts on the CPU
beside our `static` with the rest cached. llama.cpp captures a token in CUDA graphs; we do by layers, as a whole where
everything fits.""",
    ),
    "clock": (
        "Plans on the clock",
        """\
Three layers of DeepSeek-V2-Lite's experts with that model's locality, no attention: does a layer take what its plan
said, and is `hybrid` the fastest? *Faster by* is hybrid's advantage over the row. Good is a prediction within 20 %.""",
    ),
}
