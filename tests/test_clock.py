"""A site's clock beside the coordinator's, over the real gateway."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclient.clock import check_clock
from shared_models.errors import ProcessFailed
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
    check_clock(edge.address, site_context(keys), now=lambda: time.time() + off_s)


@pytest.mark.parametrize(("off_s", "words"), [(60.0, "s ahead of"), (-600.0, "s behind")])
def test_a_clock_that_is_off_is_told_with_its_difference_and_how_to_mend_it(edge, keys, off_s, words):
    with pytest.raises(ProcessFailed, match=rf"clock: is \d+ {words} the coordinator's at .*timedatectl") as told:
        check_clock(edge.address, site_context(keys), now=lambda: time.time() + off_s)
    assert abs(int(str(told.value).split()[4]) - abs(off_s)) <= 5


def test_a_coordinator_that_is_away_is_no_matter_of_clocks(keys):
    check_clock("127.0.0.1:9", site_context(keys), now=lambda: 0.0)
