"""Whatever is sent by the published schema or against it, the server answers, and never with a 5xx."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hybrimoe_kt.engine.engine import Engine

from .fuzz import WHOLE
from .scripted import ScriptedEngine
from .serving import ROOT, Serving, serving


@pytest.fixture(scope="module")
def short() -> Iterator[Serving]:
    with serving(ScriptedEngine(), max_new_tokens=3) as running:
        yield running


@pytest.fixture(scope="module")
def short_embedded(engine: Engine) -> Iterator[Serving]:
    with serving(engine, max_new_tokens=2) as running:
        yield running


def fuzz(running: Serving, what: str, count: int) -> dict[str, int]:
    """Statuses by endpoint, such as "/v1/models 200"."""
    command = [sys.executable, "-m", "tests.server.fuzz", running.url, running.service.model_name, what, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = json.loads(done.stdout)
    print(statuses)
    return dict(statuses)


def test_every_whole_request_is_answered(short: Serving) -> None:
    """Or else spoiling them would try nothing."""
    for path, body in WHOLE.items():
        answer = short.post(path, body | {"model": "scripted"})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("what", "count"), [("schema", 10), ("spoilt", 150)])
def test_a_few_requests(short: Serving, what: str, count: int) -> None:
    statuses = fuzz(short, what, count)
    assert all(statuses.get(f"{path} 400", 0) for path in WHOLE)
    assert sum(statuses.get(f"{path} 200", 0) for path in WHOLE) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count"), [("schema", 400), ("spoilt", 4000)])
def test_many_requests(short: Serving, what: str, count: int) -> None:
    statuses = fuzz(short, what, count)
    assert all(statuses.get(f"{path} {status}", 0) for path in WHOLE for status in (200, 400))


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count"), [("schema", 60), ("spoilt", 600)])
def test_a_real_model_behind_it(short_embedded: Serving, what: str, count: int) -> None:
    """The embedded model's template has no tools and no thoughts: most of what spoilt chats hold is refused."""
    statuses = fuzz(short_embedded, what, count)
    assert statuses["/v1/completions 200"] > 0
