"""Drift: counts that add up, bets with few false alarms, a shifted phantom site that is told and one that is not."""

import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedclient import drift as log
from fedclient.cli import app
from fedclient.egress import sent
from fedclient.monitoring import exported, forget
from fedclient.policy import Policy
from fedclient.serving import worker
from fedclient.serving.commands import _tell
from fedclient.site import Data, SiteFile, site_toml
from fedserver.monitor import merged
from shared_models.betting import ALARM, WINDOW, watched
from shared_models.drift import (
    Observed,
    Profile,
    bounds_text,
    by_chance,
    cells_of,
    divergence,
    doubted,
    grids,
    lesions,
    merge,
    nearest,
    outlying,
    profile_of,
    read_reference,
    reference,
    released,
)
from shared_models.errors import OrderRefused, StateInvalid, UpdateRejected
from shared_models.files import write_atomic
from shared_models.identity import new_site_keys, save_secret
from shared_models.parse import parse_json
from shared_models.preprocess import preprocess
from shared_models.study import Study, load_study
from simulations.phantoms import grow
from simulations.scanner import SITES, Site, acquire

STUDY = load_study("lung-ct-quick")
NARROW = {"a": 8, "b": 20}


def toy(rows) -> Profile:
    """A profile of two features from rows of cells."""
    rows = np.asarray(rows).reshape(-1, 2)
    counted = zip(NARROW.items(), rows.T, strict=True)
    return Profile(len(rows), {n: tuple(np.bincount(r, minlength=size).tolist()) for (n, size), r in counted})


def drawn(rng, count, shift=0.0):
    """Cells of two features that hang together, as those of a case do."""
    x = rng.normal(shift, 1, count)
    a, b = np.clip(4 + 1.5 * x, 0, 7), np.clip(10 + 3 * x + rng.normal(0, 1, count), 0, 19)
    return np.stack([a, b], axis=1).astype(int)


def cells(rows):
    return [dict(zip(NARROW, map(int, row), strict=True)) for row in rows]


# ---- counts ----


def test_a_case_lies_in_the_cells_that_its_numbers_say():
    voxels = np.full((1, 10, 12, 4), -800, np.float32)
    voxels[0, :2] = 40  # a fifth of it
    marked = np.zeros((1, 10, 12, 4), bool)
    marked[0, 0, :6] = True  # 24 of 480 voxels, one piece
    marked[0, 9, 11, 3] = True  # and one of 1 mm3, too small for a lesion
    images = np.tile([0.0, 0.11, 0.65, 1.0, 0.5, 0.0], (1, 1, 8, 4)).astype(np.float32)
    found = cells_of(STUDY, voxels, (1, 1, 1), images, [0.97], marked)

    def says(name):
        return bounds_text(name, STUDY, found[name])

    assert says("spacing.rows") == "0.951 to 1.13"
    assert (says("size.rows"), says("size.planes")) == ("8 to 11.3", "4 to 5.66")
    assert (says("raw.p5"), says("raw.p50"), says("raw.p95")) == ("-800 to -784", "-800 to -784", "32 to 48")
    assert (says("input.p5"), says("input.p50"), says("input.p95")) == ("below 0.025", "0.3 to 0.325", "from 0.975")
    assert says("input.texture") == "0.5 to 0.595"  # of steps between neither darkest nor brightest: 0.11 to 0.65
    assert says("inside.lung") == "32 to 48"  # 24 of 25 voxels are of the fifth with 40 HU
    assert says("share.lung") == "0.0442 to 0.0625"  # 25 / 480 = 0.052
    assert says("lesions.lung") == "0.5 to 1.5"
    assert says("chance.lung") == "from 0.95"


def test_pieces_are_counted_by_their_volume():
    marked = np.zeros((9, 9, 9), bool)
    marked[0, 0, :4], marked[4, 4, :3], marked[8, 8, 8] = True, True, True
    assert lesions(marked, (1, 1, 1)) == 1  # 4, 3 and 1 mm3; 4 are enough
    assert lesions(marked, (2, 1, 1)) == 2
    assert lesions(marked, (2, 2, 2)) == 3
    assert lesions(np.zeros((3, 3, 3), bool), (1, 1, 1)) == 0


def test_the_profile_of_all_cases_is_the_sum_of_the_sites_profiles():
    rows = drawn(np.random.default_rng(0), 30)
    assert merge(toy(rows[:11]), toy(rows[11:])) == merge(toy(rows[11:]), toy(rows[:11])) == toy(rows)
    with pytest.raises(ValueError, match="do not add up"):
        merge(toy(rows), Profile(0, {"c": (0, 0)}))


def test_divergence_is_nothing_for_like_one_for_unlike_and_lins_in_between():
    assert divergence((3, 1), (6, 2)) == 0
    assert divergence((5, 0), (0, 7)) == 1
    # H(3/4, 1/4) - (H(1/2, 1/2) + H(1, 0)) / 2 = 0.811278 - 0.5
    assert divergence((2, 2), (4, 0)) == pytest.approx(0.311278, abs=1e-6)


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.lists(st.integers(0, 50), min_size=3, max_size=3))
def test_divergence_is_symmetric_and_between_nothing_and_one(a, b):
    assert 0 <= divergence(tuple(a), tuple(b)) <= 1 + 1e-12
    assert divergence(tuple(a), tuple(b)) == pytest.approx(divergence(tuple(b), tuple(a)), abs=1e-12)


def test_counts_that_no_cases_can_have_are_refused():
    for cases, counts in ((2, {"a": (1, 0)}), (1, {"a": (2, -1)}), (1, {"A b": (1, 0)}), (1, {"a": (1,)})):
        with pytest.raises(ValueError):
            Profile(cases, counts)
    profile = profile_of(STUDY, [dict.fromkeys(grids(STUDY), 0)])
    assert doubted(profile, STUDY, "north") is profile
    with pytest.raises(UpdateRejected, match="other grids than the study"):
        doubted(toy([[0, 0]]), STUDY, "north")
    with pytest.raises(OrderRefused, match="fewer than 11"):
        released(profile, 11)


def test_a_reference_names_no_site_and_its_order_tells_none():
    one, two = (profile_of(STUDY, [dict.fromkeys(grids(STUDY), at)] * 12) for at in (0, 1))
    assert reference([one, two]) == reference([two, one])
    assert sorted(read_reference(reference([one, two]), STUDY, "r"), key=lambda p: p.counts["input.p5"]) == [two, one]
    assert read_reference(None, STUDY, "r") == ()
    with pytest.raises(StateInvalid, match="of another study"):
        read_reference(reference([toy([[0, 0]])]), STUDY, "r")
    with pytest.raises(StateInvalid, match="`profiles` alone"):
        read_reference({"other": []}, STUDY, "r")


def test_a_case_beyond_all_that_was_seen_is_named_by_its_features():
    seen = [toy([[2, 5], [4, 9]]), toy([[3, 12]])]
    assert outlying({"a": 1, "b": 13}, seen) == ()  # a cell more is no news
    assert outlying({"a": 6, "b": 3}, seen) == ("a", "b")


# ---- bets ----


def test_of_windows_without_a_drift_at_most_one_in_a_hundred_is_an_alarm():
    rng = np.random.default_rng(7)
    alarms = [watched([toy(drawn(rng, 30))], cells(drawn(rng, WINDOW)), (n,)).alarm for n in range(60)]
    # 0.6 are expected at the most; 4 or more would come once in 290 times (Poisson)
    assert sum(alarm is not None for alarm in alarms) < 4


@pytest.mark.parametrize(("shift", "by"), [(3.0, 25), (1.5, 60)])
def test_a_drift_is_told_the_sooner_the_larger_it_is(shift, by):
    rng = np.random.default_rng(3)
    found = watched([toy(drawn(rng, 40))], cells(drawn(rng, WINDOW, shift)), ("x",))
    assert found.alarm is not None
    assert found.alarm <= by
    assert found.wealth >= ALARM


def test_a_drift_in_the_middle_of_a_window_is_told_soon():
    rng = np.random.default_rng(4)
    found = watched([toy(drawn(rng, 40))], cells([*drawn(rng, 100), *drawn(rng, 100, 3)]), ("x",))
    assert found.alarm is not None
    assert 100 < found.alarm <= 130


def test_to_be_like_one_of_the_sites_is_enough():
    rng = np.random.default_rng(5)
    sites = [toy(drawn(rng, 40, shift)) for shift in (-2, 0, 2)]
    like_the_last = cells(drawn(rng, WINDOW, 2))
    found = watched(sites, like_the_last, ("x",))
    assert found.alarm is None
    assert found.nearest == 2
    assert watched(sites[:2], like_the_last, ("x",)).alarm is not None
    assert nearest(toy(drawn(rng, 50, 2)), sites) == 2


def test_the_feature_that_moved_is_named_first():
    rng = np.random.default_rng(6)
    here = drawn(rng, WINDOW)
    here[:, 0] = 7
    assert watched([toy(drawn(rng, 40))], cells(here), ("x",)).features[0][0] == "a"


def test_the_same_cases_give_the_same_word():
    rng = np.random.default_rng(8)
    site, here = toy(drawn(rng, 40)), cells(drawn(rng, 50, 1))
    assert watched([site], here, ("x",)) == watched([site], here, ("x",))


# ---- a phantom site ----


def phantom_cells(site: Site, seed: int):
    """Cases of a hospital, endlessly, small and without vessels; a threshold stands for the network."""
    rng = np.random.default_rng([seed, 1])
    while True:
        body = grow(rng, site)
        scan = acquire(body, site, np.array([-20.0, 30.0]), 32, rng)
        voxels = np.clip(scan.hu[None].astype(np.float32), -1024, None)
        images = preprocess(voxels, (site.fov_mm / 32,) * 2 + (site.thickness_mm,), STUDY.preprocess).images
        chances = 1 / (1 + np.exp((voxels + 500) / 50))
        marked = (chances > 0.5) & (voxels > -970)
        chance = float(chances[marked].mean())
        yield cells_of(STUDY, voxels, (site.fov_mm / 32,) * 2 + (site.thickness_mm,), images, [chance], marked)


@cache
def phantom_reference():
    return tuple(profile_of(STUDY, islice(phantom_cells(SITES[name], 0), 40)) for name in ("north", "west"))


def test_a_phantom_site_that_is_as_it_was_raises_no_alarm_in_200_cases():
    found = watched(phantom_reference(), list(islice(phantom_cells(SITES["north"], 1), WINDOW)), ("north",))
    assert found.alarm is None
    assert found.cases == WINDOW


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"noise_hu": 60.0}, "input.texture"),
        ({"lung_hu": -700.0}, "p50"),
        ({"thickness_mm": 5.0}, "spacing.planes"),
    ],
)
def test_a_phantom_site_with_another_scanner_is_told_within_200_cases(change, feature):
    shifted = replace(SITES["north"], **change)
    found = watched(phantom_reference(), list(islice(phantom_cells(shifted, 2), 60)), ("north",))
    assert found.alarm is not None
    assert any(feature in name for name, _ in found.features[:4])


# ---- the site's log ----


def full(at: int) -> dict[str, int]:
    return {name: min(at, len(edges)) for name, edges in grids(STUDY).items()}


def spread(rng, low):
    return [{n: int(rng.integers(low, low + 3)) for n in grids(STUDY)} for _ in range(WINDOW + 40)]


def test_what_a_release_was_asked_is_kept_as_cells_alone(tmp_path):
    for at in (1, 2, 3):
        log.note(tmp_path, STUDY, "ab" * 32, full(at))
    assert log.noted(tmp_path, STUDY, "ab" * 32) == [full(1), full(2), full(3)]
    assert log.noted(tmp_path, STUDY, "cd" * 32) == []
    (line, *_) = log.log_path(tmp_path, "ab" * 32).read_text().splitlines()
    assert line == '{"cells":[' + ",".join(["1"] * len(grids(STUDY))) + "]}"
    with pytest.raises(StateInvalid, match="other grids"):
        log.note(tmp_path, STUDY, "ab" * 32, {"a": 1})


def test_the_log_is_compared_with_the_releases_reference(tmp_path):
    rng = np.random.default_rng(1)
    carried = reference([profile_of(STUDY, spread(rng, 2))])
    for cells_ in spread(rng, 2)[:60]:
        log.note(tmp_path, STUDY, "ab" * 32, cells_)
    calm = log.told(tmp_path, STUDY, "ab" * 32, carried)
    assert (calm.cases, calm.against, calm.alarm) == (60, "release", False)
    for cells_ in spread(rng, 5)[:60]:
        log.note(tmp_path, STUDY, "ab" * 32, cells_)
    moved = log.told(tmp_path, STUDY, "ab" * 32, carried)
    assert moved.alarm
    ((first, window),) = moved.windows
    assert first == 1
    assert 60 < (window.alarm or 0) < 90
    assert moved.differences[0].divergence > 0.2
    assert moved == log.told(tmp_path, STUDY, "ab" * 32, carried)


def test_without_a_reference_the_first_cases_are_the_reference(tmp_path):
    rng = np.random.default_rng(2)
    before = spread(rng, 2)
    for cells_ in before[: WINDOW - 1]:
        log.note(tmp_path, STUDY, "ab" * 32, cells_)
    early = log.told(tmp_path, STUDY, "ab" * 32, None)
    assert (early.against, early.windows, early.alarm) == ("nothing", (), False)
    for cells_ in [before[WINDOW], *spread(rng, 6)[:40]]:
        log.note(tmp_path, STUDY, "ab" * 32, cells_)
    late = log.told(tmp_path, STUDY, "ab" * 32, None)
    assert (late.against, late.alarm, late.windows[0][0]) == ("first cases", True, WINDOW + 1)


def test_an_alarm_of_the_window_before_is_told_however_few_are_shown(tmp_path, capsys):
    rng = np.random.default_rng(1)
    like = spread(rng, 2)
    carried = reference([profile_of(STUDY, like)])
    for cells_ in [*(spread(rng, 5) * 2)[:WINDOW], *like[:5]]:
        log.note(tmp_path, STUDY, "ab" * 32, cells_)
    full, one = (log.told(tmp_path, STUDY, "ab" * 32, carried, shown) for shown in (5, 1))
    assert [first for first, _ in full.windows] == [1, WINDOW + 1]
    assert one.windows == full.windows[-1:]
    assert one.windows[0][1].alarm is None
    assert (full.alarm, one.alarm) == (True, True)
    _tell(one, SimpleNamespace(name="n", version="1"))  # type: ignore[arg-type]
    assert "which --windows 2 shows" in capsys.readouterr().out


# ---- a monitoring round ----


@dataclass(frozen=True)
class Released:
    """What is needed of a release."""

    name: str
    version: str
    digest: str
    study: Study
    fingerprint: dict[str, Any] | None


def released_with(profiles) -> Any:
    return Released("lung", "1", "ab" * 32, STUDY, reference(profiles) if profiles else None)


def site_folder(folder, smallest_count=11):
    """A hospital that has joined, as far as its log goes."""
    file = SiteFile("north", "host:1", "f", Data(str(folder)), policy=Policy(smallest_count=smallest_count))
    write_atomic(folder / "site.toml", site_toml(file).encode())
    save_secret(folder / "keys" / "identity.key", new_site_keys().identity)
    return folder


def test_a_site_adds_its_counts_to_a_round_and_its_log_says_so(tmp_path):
    rng = np.random.default_rng(3)
    here, release = site_folder(tmp_path / "site"), released_with([profile_of(STUDY, spread(rng, 2))])
    for cells_ in spread(rng, 2)[:20]:
        log.note(here, STUDY, release.digest, cells_)
    assert exported(here, release, tmp_path / "north.json") == 20
    content = (tmp_path / "north.json").read_bytes()
    (line,) = sent(here)
    assert (line["kind"], line["bytes"], line["release"]) == ("histograms", len(content), release.digest)
    observed = parse_json(Observed, content, "north.json")
    assert (observed.site, observed.profile.cases) == ("north", 20)


@pytest.mark.parametrize("count", [True, False])
def test_the_predicting_process_counts_what_it_is_told_to_count(tmp_path, monkeypatch, count):
    counted: list[dict[str, int]] = []
    monkeypatch.setattr(worker, "list_inputs", lambda *_: SimpleNamespace(found=["an image"]))
    monkeypatch.setattr(worker, "_one", lambda *_: {"name": "image-1", "cells": {"a": 1}})
    monkeypatch.setattr(worker, "note", lambda site, study, digest, cells_: counted.append(cells_))
    said = worker.answered(SimpleNamespace(study=STUDY, digest="d" * 64), tmp_path, tmp_path, False, count)  # type: ignore[arg-type]
    assert said["images"] == [{"name": "image-1"}]
    assert counted == ([{"a": 1}] if count else [])


def test_for_machines_an_export_and_a_new_beginning_are_told_as_json(tmp_path, monkeypatch):
    here, release = site_folder(tmp_path / "site"), released_with([])
    for cells_ in spread(np.random.default_rng(3), 2)[:20]:
        log.note(here, STUDY, release.digest, cells_)
    monkeypatch.setattr("fedclient.serving.commands._opened", lambda *_: release)

    def told(*words: str) -> Any:
        ran = CliRunner().invoke(app, ["drift", "x", "--site", str(here), "--json", *words])
        assert ran.exit_code == 0, ran.output
        return json.loads(ran.output)

    to = str(tmp_path / "north.json")
    assert told("--export", to) == {"release": release.digest, "file": to, "cases": 20}
    assert told("--forget") == {"release": release.digest, "forgotten": True}


def test_counts_of_too_few_cases_do_not_leave(tmp_path):
    rng = np.random.default_rng(4)
    here, release = site_folder(tmp_path / "site"), released_with([])
    for cells_ in spread(rng, 2)[:10]:
        log.note(here, STUDY, release.digest, cells_)
    with pytest.raises(OrderRefused, match="fewer than 11"):
        exported(here, release, tmp_path / "north.json")
    assert not (tmp_path / "north.json").exists()
    assert sent(here) == []


def test_two_exports_are_as_many_cases_apart_as_a_distribution_needs_or_they_are_the_same(tmp_path):
    rng = np.random.default_rng(4)
    here, release = site_folder(tmp_path / "site", smallest_count=11), released_with([])
    came = iter(spread(rng, 2))

    def more(count: int) -> None:
        for cells_ in islice(came, count):
            log.note(here, STUDY, release.digest, cells_)

    more(20)
    assert exported(here, release, tmp_path / "first.json") == 20
    assert exported(here, release, tmp_path / "again.json") == 20
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    more(1)
    with pytest.raises(OrderRefused, match="1 cases since the last export"):
        exported(here, release, tmp_path / "second.json")
    more(9)
    with pytest.raises(OrderRefused, match="10 cases since the last export"):
        exported(here, release, tmp_path / "second.json")
    assert not (tmp_path / "second.json").exists()
    assert len(sent(here)) == 2
    more(1)
    assert exported(here, release, tmp_path / "second.json") == 31


def test_a_log_that_was_begun_anew_needs_as_many_cases_as_the_first_did(tmp_path):
    rng = np.random.default_rng(4)
    here, release = site_folder(tmp_path / "site"), released_with([])
    for cells_ in spread(rng, 2)[:20]:
        log.note(here, STUDY, release.digest, cells_)
    exported(here, release, tmp_path / "first.json")
    forget(here, release.digest)
    for cells_ in spread(rng, 2)[:10]:
        log.note(here, STUDY, release.digest, cells_)
    with pytest.raises(OrderRefused, match="fewer than 11"):
        exported(here, release, tmp_path / "second.json")
    log.note(here, STUDY, release.digest, spread(rng, 2)[0])
    assert exported(here, release, tmp_path / "second.json") == 11


def test_the_coordinator_merges_counts_and_sees_which_site_is_far(tmp_path):
    rng = np.random.default_rng(5)
    release = released_with([profile_of(STUDY, spread(rng, 2)), profile_of(STUDY, spread(rng, 12))])
    like = Observed("north", release.digest, profile_of(STUDY, spread(rng, 12)))
    unlike = Observed("south", release.digest, profile_of(STUDY, spread(rng, 6)))
    found = merged(release, [unlike, like])
    assert found.sites == {"north": 240, "south": 240}
    assert abs(found.of_sites["north"]) < 0.02
    assert found.of_sites["south"] > 0.5
    assert found.apart["input.p50"][0] > 5 * found.apart["input.p50"][1]
    other = replace(like, release="cd" * 32)
    for wrong, words in (([like, like], "one file of each"), ([other], "another release"), ([], "one file of each")):
        with pytest.raises(StateInvalid, match=words):
            merged(release, wrong)
    with pytest.raises(StateInvalid, match="no reference"):
        merged(released_with([]), [like])


def test_what_chance_alone_does_to_the_divergence_is_said():
    rng = np.random.default_rng(6)
    drawn_ = [rng.multinomial(60, np.ones(8) / 8) for _ in range(400)]
    pairs = [(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(drawn_[::2], drawn_[1::2], strict=True)]
    assert by_chance(*pairs[0]) == pytest.approx(7 * (2 / 60) / (8 * np.log(2)))
    assert np.mean([divergence(*pair) for pair in pairs]) == pytest.approx(by_chance(*pairs[0]), rel=0.1)
