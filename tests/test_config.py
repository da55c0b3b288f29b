"""Options are validated once, and say what is valid."""

from __future__ import annotations

import pytest

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sizes import CacheSize, parse_bytes


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (8, CacheSize(per_layer=8)),
        ("8", CacheSize(per_layer=8)),
        (0, CacheSize(per_layer=0)),
        (0.25, CacheSize(fraction=0.25)),
        ("0.25", CacheSize(fraction=0.25)),
        ("25%", CacheSize(fraction=0.25)),
        ("all", CacheSize(fraction=1.0)),
        ("12GiB", CacheSize(num_bytes=12 * 2**30)),
        ("1.5 GB", CacheSize(num_bytes=1_500_000_000)),
        ("auto", CacheSize()),
    ],
)
def test_cache_sizes(given: object, wanted: CacheSize) -> None:
    assert CacheSize.parse(given) == wanted
    assert CacheSize.parse(wanted) is wanted


@pytest.mark.parametrize("given", ["much", -1, 1.5, "120%", True, "12 parsecs", "", None, "²", "9" * 5000])
def test_cache_sizes_not_understood(given: object) -> None:
    with pytest.raises(ConfigError, match="is not understood: give experts per layer"):
        CacheSize.parse(given)


def test_bytes() -> None:
    assert parse_bytes("500mb") == 500_000_000
    assert parse_bytes("500") is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cach_size": 1}, "unknown option 'cach_size', did you mean 'cache_size'"),
        ({"cpu_backend": "llama"}, "unknown cpu_backend 'llama', did you mean 'llamafile'"),
        ({"prefetch_depth": 4}, "prefetch_depth is 4, valid: a whole number from 1 to 3"),
        ({"prefetch_size": True}, "prefetch_size is True"),
        ({"policy_options": 3}, "policy_options must be a mapping"),
        ({"accelerator": "cudda:0"}, "did you mean 'cuda'"),
        ({"accelerator": "cuda:abc"}, "unknown accelerator 'cuda:abc'"),
        ({"accelerator": "none:1"}, "unknown accelerator 'none:1'"),
        ({"accelerator": 3}, "accelerator is 3, valid: a name"),
        ({"policy": ["lru"]}, "policy is ['lru'], valid: a name".replace("[", "\\[").replace("]", "\\]")),
        ({"policy_options": {1: 2}}, "an option that is not a name"),
    ],
)
def test_bad_options_name_the_fix(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertOptions.from_kwargs(kwargs)
    with pytest.raises(ConfigError, match=message):
        ExpertOptions().replace(kwargs)


def test_overrides_win() -> None:
    options = ExpertOptions.from_kwargs({"cache_size": 4, "policy": "lru"}).replace({"cache_size": "25%"})
    assert options.cache_size == CacheSize(fraction=0.25)
    assert options.policy == "lru"
