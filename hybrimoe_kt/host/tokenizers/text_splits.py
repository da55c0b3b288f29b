"""How byte-level vocabularies cut a text into words before they merge bytes: what `tokenizer.ggml.pre` names.

The patterns mean what llama.cpp's mean, which is now and then less than the model's own tokenizer does: it counts every
letter beyond ASCII as both upper and lower case (`tekken`, `gpt-4o`, `minimax-m2`, `kimi-k2`), and combining marks of
these four as no part of a word; to `youtu`, `tiny_aya` and `cohere2moe` all letters are both, ASCII's too.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TEXT_SPLITS", "TextSplit"]


@dataclass(frozen=True, slots=True)
class TextSplit:
    """One way of cutting text, and what llama.cpp takes for granted of the vocabularies that use it."""

    patterns: tuple[str, ...]
    """Oniguruma's regular expressions. Each cuts what those before it left; what it does not match stays together."""
    ignore_merges: bool = False
    """A word that is a token is that token, whatever merges would make of it."""
    adds_bos: bool = False
    """Texts begin with the BOS token unless the file says otherwise."""
    merges_bytes: bool = True
    """What is merged are bytes; else characters, a space written U+2581, and bytes of characters that are no token."""


_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_LOWER_CONTRACTION = r"'(?:[stmd]|re|ve|ll)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(
    letters: str = r"\p{L}",
    *,
    digits: str,
    signs: str = r"\s\p{L}\p{N}",
    contraction: str = _CONTRACTION + "|",
    spaces: str = _SPACES,
) -> str:
    """Contractions, words with the sign before them, numbers, signs with the line ends after them, white space."""
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?{letters}+|\p{{N}}{digits}| ?[^{signs}]+[\r\n]*|{spaces}"


_GPT2 = rf"{_LOWER_CONTRACTION}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_OPTIONAL = f"(?:{_CONTRACTION})?"


def _cased(digits: str, contraction: str = "", letters: str = r"\p{L}") -> str:
    """Words cut where an upper case letter follows a lower case one."""
    not_lower, not_upper = f"[{letters}&&[^a-z]]", f"[{letters}&&[^A-Z]]"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{not_lower}*{not_upper}+{contraction}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{not_lower}+{not_upper}*{contraction}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _marked(digits: str) -> str:
    """Words with their combining marks, whatever their case."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_OPTIONAL}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _ranges(text: str) -> str:
    """A class of characters from hexadecimal code points and ranges of them."""
    ranges = (part.split("-") for part in text.split())
    return "[" + "".join("-".join(rf"\x{{{end}}}" for end in ends) for ends in ranges) + "]"


# DeepSeek's letters: those with an upper and a lower case, as of the Unicode version its tokenizer was made with.
_CASED_LETTERS = _ranges(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_SIGNS = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3001-3002")
_CJK = rf"[{_ranges('4E00-9FA5 800-4E00 AC00-D7FF')}&&\S]"
_HAN_AND_KANA = _ranges("4E00-9FA5 3040-309F 30A0-30FF")
_HAN = _ranges("3400-4DBF 4E00-9FFF 20000-2A6DF 2A700-2EBEF F900-FAFF 2F800-2FA1F").strip("[]")

_QWEN2 = TextSplit((_words(digits=""),))
_LLAMA3 = TextSplit((_words(digits="{1,3}"),))
_GLM4 = TextSplit(_LLAMA3.patterns, ignore_merges=True)
_LLAMA3_WHOLE = TextSplit(_LLAMA3.patterns, ignore_merges=True, adds_bos=True)
_GPT2_SPLIT = TextSplit((_GPT2,))
_GPT2_DIGITS = TextSplit((r"\p{N}", _GPT2))
_GPT4O = TextSplit((_cased("{1,3}", _OPTIONAL),))
_SIGNED_WORDS = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK_V3 = TextSplit((r"\p{N}{1,3}", _HAN_AND_KANA + "+", rf"{_SIGNED_WORDS}[\r\n]*|{_SPACES}"))
# Digits by three, counted from the right, together with what stands before them.
_THREES = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_ASIAN = _ranges(
    "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F "
    "AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
)
_YOUTU_SCRIPTS = "|".join(
    _ranges(text) + "+"
    for text in (
        "AC00-D7A3 3131-318E",
        "FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F",
        "3105-312F",
        "4E00-9FA5 3040-309F 30A0-30FF",
    )
)
_STOPS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
_TINY_AYA = TextSplit((_THREES, _marked("{1,3}")))
_LINES = r"[^\n]+|\n+"
_BAILING = TextSplit(
    (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)
_SEED_CODER = TextSplit(
    (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
)

TEXT_SPLITS: dict[str, TextSplit] = {
    "default": TextSplit((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "deepseek-llm": TextSplit(
        (r"[\r\n]", rf"\s?{_CASED_LETTERS}+", rf"\s?{_DEEPSEEK_SIGNS}+", r"\s+\z", _CJK + "+", r"\p{N}+")
    ),
    "deepseek-coder": TextSplit((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK + "+", r"\p{N}")),
    "falcon": TextSplit((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "qwen35": TextSplit((_words(r"[\p{L}\p{M}]", digits="", signs=r"\s\p{L}\p{M}\p{N}"),)),
    "tekken": TextSplit((_cased(""),), ignore_merges=True, adds_bos=True),
    "kimi-k2": TextSplit(
        (
            rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_CONTRACTION})?"
            rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "seed-coder": _SEED_CODER,
    "afmoe": TextSplit((_THREES, _ASIAN + "+", rf"{_SIGNED_WORDS}[\r\n]*|{_SPACES}")),
    "exaone-moe": TextSplit(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "laguna": TextSplit((_LINES, *_QWEN2.patterns)),
    "ufakzeka": TextSplit((_words(digits="", contraction=""),)),
    "youtu": TextSplit((_YOUTU_SCRIPTS, _marked("")), ignore_merges=True),
    "spark2_5": TextSplit(
        (
            r"\p{N}{1,3}",
            _HAN_AND_KANA + "+",
            rf"{_SIGNED_WORDS}|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "granite-embed-multi-97m": TextSplit(
        (_cased("{1,3}", _OPTIONAL, letters=r"\p{L}\p{M}"),), ignore_merges=True
    ),
    "jais-2": TextSplit(
        (
            _words(
                digits="{1,3}",
                spaces=r"\s*[\r\n]+|"
                + "|".join(rf"\s{{{size}}}(?!\S)" for size in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
                + r"|\s",
            ),
        )
    ),
    "superbpe": TextSplit((r"\p{N}+", r"[\s\S]+?(?=(?:[0-9]{3})+(?![0-9]))")),
    "chameleon": TextSplit(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
    "viking": TextSplit((_STOPS, r"\p{N}")),
    "sarvam-moe": TextSplit((_LINES,), merges_bytes=False),
    "gemma4": TextSplit((_LINES,), adds_bos=True, merges_bytes=False),
    "minicpm5": TextSplit((r"\p{N}{1,3}", _words(digits="+")), ignore_merges=True),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                     "jina-v5-nano"), _LLAMA3_WHOLE),
    **dict.fromkeys(("glm4", "glm5"), _GLM4),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), TextSplit((_STOPS,))),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _TINY_AYA),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open",
                     "grok-2"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK_V3),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
                    _GPT2_DIGITS),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais",
                     "trillion", "granite-docling", "exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de",
                     "jina-v1-en", "jina-v2-code", "roberta-bpe"), _GPT2_SPLIT),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
}  # fmt: skip
"""By the name a file gives: all that llama.cpp knows but `whitespace`, `mmbert` and `granite-embed-multi-311m`.

Those three are of models that write nothing.
"""
