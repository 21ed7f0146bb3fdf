"""Room on the coordinator's disk: a round that would fill it is not begun, and its run goes on when there is room."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclient.policy import Policy
from fedserver.checkpoint import RunFolder, read_state
from fedserver.room import check_room
from shared_models.errors import RoundPaused
from shared_models.study import Evaluate, Rounds, Study
from tests.edge import Edge, running_edge
from tests.hospitals import Hospitals

MIB = 1 << 20
STUDY = Study(
    name="toy", rounds=Rounds(count=2, quorum=2, deadline_s=300, gather_s=0, pause_s=300), evaluate=Evaluate(every=0)
)


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    with running_edge(tmp_path / "federation") as running:
        yield running


def with_free(monkeypatch: pytest.MonkeyPatch, folder: Path, free_bytes: int) -> None:
    found = shutil.disk_usage(folder)._replace(free=free_bytes)
    monkeypatch.setattr("fedserver.room.shutil.disk_usage", lambda _: found)


def test_a_round_wants_a_model_for_each_site_four_more_and_what_is_spared(tmp_path, monkeypatch):
    with_free(monkeypatch, tmp_path, (8 + 4) * 100 * MIB + 256 * MIB)
    check_room(tmp_path, 100 * MIB, sites=8, round_number=3)
    with pytest.raises(RoundPaused, match=r"round 3: 1456 MiB are free .* of 9 sites .* wants 1556 MiB\. Make room"):
        check_room(tmp_path, 100 * MIB, sites=9, round_number=3)


def test_a_run_on_a_full_disk_pauses_before_anybody_is_asked_and_goes_on_when_there_is_room(
    edge, tmp_path, monkeypatch
):
    hospitals = Hospitals(edge, tmp_path / "sites")
    for name in ("north", "south"):
        hospitals.join(name, Policy(approval="inside-policy"))
    with monkeypatch.context() as patched:
        with_free(patched, tmp_path, 200 * MIB)
        with pytest.raises(RoundPaused, match="200 MiB are free on the coordinator's disk"):
            hospitals.run(STUDY)
    assert not list((hospitals.sites["north"] / "studies").glob("*"))
    assert read_state(RunFolder(edge.federation.runs / "toy")).round == 0
    state, _ = hospitals.run(STUDY)
    assert state.round == 2
