"""The legacy host where there is no legacy framework: a sentence, no traceback of somebody else's imports."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from hybrimoe_kt.errors import HostCompatibilityError


@pytest.mark.skipif(importlib.util.find_spec("ktransformers") is not None, reason="the framework is installed here")
def test_importing_an_operator_says_what_is_missing() -> None:
    sys.modules.pop("hybrimoe_kt.host.kt.experts", None)
    with pytest.raises(HostCompatibilityError, match=r"needs the legacy framework.*found no ktransformers"):
        importlib.import_module("hybrimoe_kt.host.kt.experts")
