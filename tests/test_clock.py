"""A site's clock beside the coordinator's, over the real gateway."""

import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fedclient.clock import await_clock, clock_words
from fedclient.welcome import refused_words
from shared_models.transfer import site_context
from tests.edge import Edge, joined_site, running_edge


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge") / "federation") as edge:
        yield edge


@pytest.fixture(scope="module")
def keys(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joined_site(edge, tmp_path_factory.mktemp("site"), "north").keys


@pytest.mark.parametrize("off_s", [0.0, 2.0, -290.0])
def test_a_clock_that_flower_bears_with_passes(edge, keys, off_s):
    assert clock_words(edge.address, site_context(keys), now=lambda: time.time() + off_s) is None


@pytest.mark.parametrize(("off_s", "words"), [(60.0, "s ahead of"), (-600.0, "s behind")])
def test_a_clock_that_is_off_is_told_with_its_difference_and_how_to_mend_it(edge, keys, off_s, words):
    told = clock_words(edge.address, site_context(keys), now=lambda: time.time() + off_s)
    assert told is not None
    assert re.search(rf"clock: is \d+ {words} the coordinator's at .*timedatectl", told)
    assert abs(int(told.split()[4]) - abs(off_s)) <= 5


def test_a_coordinator_that_is_away_is_no_matter_of_clocks(keys):
    assert clock_words("127.0.0.1:9", site_context(keys), now=lambda: 0.0) is None


def test_a_node_whose_clock_is_off_waits_until_it_is_right(edge, keys, caplog):
    off_s, slept, shown, noted = [600.0], list[float](), list[str | None](), list[str]()

    def sleep(pause_s: float) -> None:
        slept.append(pause_s)
        shown.append(refused_words(keys.parent))
        if sum(slept) >= 120.0:
            off_s[0] = 0.0

    off = partial(noted.append, "off")
    await_clock(keys.parent, edge.address, site_context(keys), off, sleep, lambda: time.time() + off_s[0])
    assert noted == ["off"]
    assert sum(slept) == 120.0
    assert {words is not None and "s ahead of the coordinator's" in words for words in shown} == {True}
    assert refused_words(keys.parent) is None
    assert len(caplog.records) == 2, "once a minute"
