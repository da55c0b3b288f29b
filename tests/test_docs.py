"""What the documentation says can be done: links lead somewhere, options exist, examples load, tables are computed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from benchmarks.model_memory import (
    CARDS_GIB,
    GIB,
    PLACES,
    Q4_K_M,
    RELEASES,
    TWO_BITS,
    Mixture,
    Release,
    memory,
    with_table,
)
from benchmarks.on_gpu.__main__ import parser as on_gpu_parser
from hybrimoe_kt.cli import main, options, tools
from hybrimoe_kt.cli.plot import PICTURES
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.policies import POLICIES
from hybrimoe_kt.core.prefetch.predictors import PREDICTORS
from hybrimoe_kt.core.schedule import SCHEDULERS
from hybrimoe_kt.host.hf.architectures import ARCHITECTURES
from hybrimoe_kt.host.rules.injection import check_operators, match_modules
from hybrimoe_kt.host.rules.rule_file import DEFAULT, list_packaged_rules, load_rules
from hybrimoe_kt.host.rules.skeletons import build_skeleton

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEAR = [ROOT / "hybrimoe_kt/models/README.md", ROOT / "tests/data/traces/README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+")


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


@functools.cache
def flags_of(command: str) -> set[str]:
    """The options that a command's own help lists; each may be written with hyphens or with underscores."""
    program, *words = command.split()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        {"ktransformers": main.main, "hybrimoe": tools.main}[program]([*words, "--help"])
    flags = set(_FLAG.findall(shown.getvalue()))
    assert flags, f"{command} --help says nothing"
    return flags | {"--" + flag[2:].replace("_", "-") for flag in flags}


def command_of(line: str) -> str | None:
    """The command that a line calls, with its subcommand."""
    match = re.match(r"(ktransformers|hybrimoe(?: [a-z][a-z-]*){1,2})(?= |$)", line)
    return match[1] if match else None


EVERY_COMMAND = (
    "ktransformers",
    *(f"hybrimoe {name}" for name in tools.COMMANDS),
    "hybrimoe rules check",
    *(f"hybrimoe plot {name}" for name in PICTURES),
)


def shell_lines(text: str) -> Iterator[str]:
    """The commands in a page's sh blocks, continued lines joined, comments left out."""
    for language, block in _FENCE.findall(text):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                yield " ".join(shlex.split(line, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_the_options_they_are_shown_with(page: Path) -> None:
    for line in shell_lines(page.read_text(encoding="utf-8")):
        command = command_of(line)
        if command is None:
            continue
        name = " ".join(command.split()[1:2])
        assert not name or name in tools.COMMANDS, f"{line}: there is no such command"
        for flag in _FLAG.findall(line):
            assert flag in flags_of(command), f"{line}: no option {flag}"


# Options of other programs that pages mention.
FOREIGN = {"--no-deps", "--index-url"}
WITHOUT_EFFECT = {f"--{flag}" for flag in options._WITHOUT_EFFECT}  # taken, and left out of the help


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_in_the_text_exist(page: Path) -> None:
    everything = FOREIGN.union(WITHOUT_EFFECT, *map(flags_of, EVERY_COMMAND))
    if page.name == "gpu.md":
        everything |= set(_FLAG.findall(on_gpu_parser().format_help()))
    text = prose(page.read_text(encoding="utf-8"))
    if page.name == "terms.md":  # whose tables begin with other programs' names
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    # an engine's options are looked for in tests/engines/vllm/test_arguments.py
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if quoted.startswith(("python -m benchmarks", "make ")):
            continue
        for flag in _FLAG.findall(quoted):
            assert flag in everything or page.name in ("kernels.md", "kernels-table.md", "engines.md"), (
                f"`{quoted}`: no option {flag}"
            )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    shown = [match[1] for line in shell_lines(text) if (match := re.match(r"make ([a-z-]+)", line))]
    assert {*re.findall(r"`make ([a-z-]+)", prose(text)), *shown} <= targets


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:benchmarks|hybrimoe_kt)[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, module
    roots = "hybrimoe_kt|tests|docs|kernels|optimize_rules|benchmarks"
    for name in re.findall(rf"`((?:{roots})/[\w./-]+)`", prose(text)):
        assert (ROOT / name).exists(), name


def anchors(page: Path) -> set[str]:
    """What headings of a page can be linked as, the way both the site and a repository's viewer make it."""
    titles = re.findall(r"^#+ +(.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *NEAR], ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def rule_examples() -> list[tuple[str, str]]:
    return [
        (f"{name}-{number}", block)
        for page, name in zip(PAGES, NAMES, strict=True)
        for number, (language, block) in enumerate(_FENCE.findall(page.read_text(encoding="utf-8")))
        if language == "yaml" and "match:" in block
    ]


@pytest.mark.parametrize("block", [block for _, block in rule_examples()], ids=[name for name, _ in rule_examples()])
def test_rules_shown_are_rules(block: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(block, encoding="utf-8")
    chosen = match_modules(build_skeleton("olmoe"), load_rules(file), default_device="cpu")
    assert len(check_operators(chosen)) == 16  # the experts of every layer


def rows_of(page: Path, heading: str) -> Iterator[list[str]]:
    """The table rows below a heading up to the next one, code marks taken off."""
    text = page.read_text(encoding="utf-8").split(f"\n{heading}\n")[1].split("\n## ")[0]
    for line in re.findall(r"^\| `(.*) \|$", text, re.MULTILINE):
        yield [cell.strip("`") for cell in re.split(r" *\| *", line)]


def test_every_architecture_is_among_the_models_with_its_rule_files() -> None:
    said = {cells[0].partition("`")[0]: cells for cells in rows_of(ROOT / "docs/models.md", "## What runs")}
    assert set(said) == set(ARCHITECTURES)
    files = list_packaged_rules()
    for name, (_, _, rules, several) in said.items():
        assert rules == ARCHITECTURES[name].rule_file
        assert set(re.findall(r"[\w-]+", several)) <= set(files)
    named = {file for _, _, rules, several in said.values() for file in re.findall(r"[\w-]+", f"{rules} {several}")}
    assert named == set(files) - {DEFAULT}


def test_every_option_of_the_experts_is_documented_with_its_default() -> None:
    said = {cells[0]: cells[2] for cells in rows_of(ROOT / "docs/tuning.md", "## Every option")}
    nested = {name: said.pop(name) for name in list(said) if name not in ExpertOptions.names()}
    assert list(said) == list(ExpertOptions.names())
    assert ExpertOptions.from_kwargs({name: yaml.safe_load(value) for name, value in said.items()}) == ExpertOptions()
    assert nested, "the table of policies' options follows"


def test_every_option_of_policies_schedulers_and_predictors_is_documented() -> None:
    rows = rows_of(ROOT / "docs/tuning.md", "## Every option")
    known = {**POLICIES, **SCHEDULERS, **PREDICTORS}
    said = {(of, option): yaml.safe_load(default) for of, option, default, _ in rows if of in known}
    assert said == {(name, key): value for name, cls in known.items() for key, value in cls.options.items()}


def test_there_are_rules_to_look_at() -> None:
    assert len(rule_examples()) >= 3


class _Resources(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href") or "")
        self.found = [url for url in self.found if url]  # scripts may be on the page itself


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    """Nor does a page lack a picture, a sheet or a script, or link to a page that is not there."""
    pytest.importorskip("zensical")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    pages = list(site.rglob("*.html"))
    assert {page.name for page in pages} >= {f"{page.stem}.html" for page in PAGES[1:]}
    for page in pages:
        reader = _Resources()
        reader.feed(page.read_text(encoding="utf-8"))
        assert not [url for url in reader.found if "//" in url], page.name
        if page.name != "404.html":  # which may stand for a page of any folder
            for url in reader.found:
                assert (page.parent / url.partition("?")[0]).is_file(), f"{page.name} wants {url}"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?https?:", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_dimensions_give_the_published_number_of_parameters(release: Release) -> None:
    assert memory(release).params == pytest.approx(release.published_params, rel=0.03)


@pytest.mark.parametrize("name", PLACES)
def test_tables_are_the_computed_ones(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert with_table(text, PLACES[name]()) == text, "python -m benchmarks.model_memory --write"


def test_computed_memory_of_known_cases() -> None:
    """By hand: Qwen3-30B-A3B has 48 layers of 128 experts of 2048 x 768 in Q4_K, Q4_K, and Q4_K or Q6_K."""
    by_name = {release.name: memory(release) for release in RELEASES}
    m = by_name["Qwen3-30B-A3B"]
    matrix = 2048 * 768
    experts = 48 * 128 * matrix * (2 * 144 / 256 + (144 + 210) / 512)
    assert m.host_beside_gpu == pytest.approx(experts)
    assert m.read_per_token == pytest.approx(experts * 8 / 128)
    assert m.kv_cache == 8192 * 48 * 2 * 4 * 128 * 2
    assert m.share(24 * GIB) == 1.0 and 0 < (m.share(16 * GIB) or 0) < 1
    assert m.share(2 * GIB) is None
    assert by_name["DeepSeek-V2-Lite"].kv_cache == 8192 * 27 * (512 + 64) * 2
    states = 36 * (8192 * 4 * 2 + 32 * 128 * 128 * 4)  # of a convolution in bfloat16, and of 32 heads in float32
    assert by_name["Qwen3-Next-80B-A3B"].kv_cache == 8192 * 12 * 2 * 2 * 256 * 2 + states  # every fourth layer attends
    lite = by_name["DeepSeek-V2-Lite"]  # 1408 wide, which ggml reads in place
    assert lite.host_beside_gpu == 64 / 6 * lite.read_per_token
    for m in by_name.values():  # on a CPU a model takes its file's size
        assert m.host_alone == m.file


def test_what_large_models_take_of_a_card() -> None:
    """DeepSeek-V3's dense part by hand: a layer's attention and its shared expert in blocks, and the head."""
    by_name = {release.name: release for release in RELEASES}
    m = memory(by_name["DeepSeek-V3, R1"])
    attention = (1536 * 7168 + 24576 * 1536 + 576 * 7168 + 7168 * 16384) * 144 / 256 + 2 * 128 * 128 * 512 * 34 / 32
    shared = 3 * 2048 * 7168 * 144 / 256 + 2048 * 7168 * (210 - 144) / 256 / 2
    dense = 3 * 3 * 18432 * 7168 * 144 / 256 + 18432 * 7168 * (210 - 144) / 256
    head = 129280 * 7168 * 210 / 256
    assert m.needs.packed_bytes == pytest.approx(61 * attention + 58 * shared + dense + head, rel=1e-4)
    assert m.needs.float_bytes == pytest.approx(2 * 58 * 256 * 7168, rel=0.01)  # routers, and little else
    assert m.dense + m.kv_cache <= 16 * GIB and m.plan(24 * GIB).slots_per_layer >= 7
    assert (memory(by_name["Qwen3-235B-A22B"]).share(24 * GIB) or 0) >= 0.12
    assert (memory(by_name["GLM-4.5-Air"]).share(16 * GIB) or 0) >= 0.12
    small = memory(by_name["DeepSeek-V3, R1"], TWO_BITS)
    assert small.file < 0.65 * m.file and 2 < 8 * small.file / small.params < 3.2


@pytest.mark.parametrize("mixture", [Q4_K_M, TWO_BITS], ids=["Q4_K_M", "2 bits"])
def test_a_card_of_the_table_is_used_up_by_its_lines_and_slots(mixture: Mixture) -> None:
    for release in RELEASES:
        plan = memory(release, mixture).plan(24 * GIB)
        used = sum(line.num_bytes for line in plan.lines) + plan.slots_bytes
        assert used <= 24 * GIB
        assert plan.expert_share == 1.0 or used + sum(plan.needs.slot_bytes.values()) > 24 * GIB


SAID = [
    ("Qwen3-30B-A3B", 16, "80 % of the experts fit beside them in 16 GiB"),
    ("Mixtral-8x7B", 24, "| 75 %, 64 % |"),
    ("Qwen2-57B-A14B", 24, "75 %, 64 % |"),
    ("Qwen3-Next-80B-A3B", 24, "| 48 % |"),
    ("Mixtral-8x22B", 24, "| 12 %, 27 % |"),
    ("Qwen3-235B-A22B", 24, "| 12 %, 14 % |"),
    ("MiniMax-M2", 24, "12 %, 14 % |"),
    ("GLM-4.5-Air", 24, "12 %, 27 % |"),
    ("DeepSeek-V3, R1", 80, "then 18 % of the experts\nin 80 GiB"),
]


@pytest.mark.parametrize(("model", "card", "words"), SAID, ids=[model for model, _, _ in SAID])
def test_the_quick_start_says_what_the_table_says(model: str, card: int, words: str) -> None:
    share = memory(next(release for release in RELEASES if release.name == model)).share(card * GIB)
    assert f"{share:.0%}".replace("%", " %") in words
    assert words in (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")


def test_cards_in_the_table_are_those_of_the_headings() -> None:
    assert CARDS_GIB == (16, 24)


def test_every_page_is_in_the_navigation() -> None:
    """Zensical builds the others, too, and says nothing."""

    def files(entries: object) -> Iterator[str]:
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict):
                for value in entry.values():
                    yield from files(value)
            else:
                yield str(entry)

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(files(yaml.safe_load(text)["nav"])) == sorted(page.name for page in PAGES[1:])
