"""A run's curves of the final test, from the counts that its sites sent: FROC of lesions, reliability of classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from pathlib import Path

import numpy as np
import pytest

from fedclient.site import Site
from fedserver.checkpoint import RunFolder
from fedserver.page import final_charts, render
from fedserver.plots import styles
from fedserver.report import curves, facts, write_report
from shared_models.class_counts import class_counts
from shared_models.detection_counts import RATES, as_row, detection_counts
from shared_models.errors import RoundPaused
from shared_models.scores import Score
from shared_models.study import Model, Preprocess, Rounds, Study, Task
from shared_models.weights import Arrays
from shared_models.wire import Split
from tests.test_detection_counts import drawn, worked
from tests.test_report import SITES, Page, Scripted, toy_run

ROUNDS = Rounds(count=2, quorum=2, deadline_s=100, pause_s=50, gather_s=5)
FOUND = Study("found", task=Task("detection", ("nodule",), "centre"), rounds=ROUNDS)
TOLD = Study("told", task=Task("classification", ("ill",), "bce"), model=Model("resnet18"), rounds=ROUNDS,
             preprocess=Preprocess((32, 32)))  # fmt: skip
SCANS = {"east": worked(), "north": drawn(1, 30), "south": drawn(2, 20)}


@dataclass(frozen=True)
class Finds(Scripted):
    """South shows no distribution of its scans."""

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        return {"nodule": detection_counts(SCANS[site.name], 99 if site.name == "south" else 1)}


@dataclass(frozen=True)
class Tells(Scripted):
    """Scores whose logits are twice as large as they should be: of ten cases at 0.9 seven and a half are ill."""

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        truth = np.array([True] * 30 + [False] * 10)
        return {"ill": class_counts(np.full(40, 0.9), truth, truth)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return toy_run(tmp_path_factory.mktemp("found"), FOUND, Finds())


def test_the_federations_cpm_is_that_of_the_scans_of_sites_that_tell_them(run: RunFolder) -> None:
    test = facts(run)["test"]["nodule"]
    together = detection_counts([*SCANS["east"], *SCANS["north"]])
    assert test["all_cases"]["value"] == pytest.approx(together.value, abs=1e-6)
    assert test["all_cases"]["cases"] == sum(map(len, SCANS.values()))
    assert test["sites"]["south"]["value"] is None


def test_the_page_shows_cpm_and_the_curves_of_sites_that_tell_them(run: RunFolder) -> None:
    write_report(run)
    page = Page((run.path / "report.html").read_text())
    assert "test CPM" in page.text
    assert "FROC: nodule" in page.text
    assert "LUNA16's rules" in page.text
    assert "at 1 false a scan" in page.text


def test_the_curve_stands_where_the_rates_are(run: RunFolder) -> None:
    row = as_row(detection_counts(worked()))
    ((chart, across),) = final_charts("nodule", {"east": row}, styles(SITES))
    (line,) = chart.lines
    ticks = [at for at, _ in chart.x_ticks]
    assert across == "false marks a scan"
    assert [x for x, _, _ in line.points] == ticks
    assert np.diff(ticks) == pytest.approx(np.full(6, (ticks[-1] - ticks[0]) / 6), abs=0.11)  # even in the logarithm
    assert line.points[0][2] == "east, 0.125 false a scan: 0.333"
    assert log2(RATES[-1]) - log2(RATES[0]) == 6


def test_the_page_shows_how_reliable_scores_are(tmp_path: Path) -> None:
    run = toy_run(tmp_path, TOLD, Tells())
    found = facts(run)
    page = Page(render(found, *curves(found)))
    assert "Reliability: ill" in page.text
    ((chart, _),) = final_charts("ill", found["test"]["ill"]["sites"], styles(SITES))
    assert [words for _, _, words in chart.lines[0].points] == ["east: 30 of 40 cases"]
    assert [line.site for line in chart.lines] == ["east", "north", "south"]


def test_scores_are_calibrated_by_the_validation_patients_of_all_sites(tmp_path: Path) -> None:
    run = toy_run(tmp_path, TOLD, Tells())
    found = facts(run)["calibration"]["ill"]
    assert found["temperature"] == pytest.approx(2.0, abs=0.02)  # logit of 0.9 is twice that of 0.75
    assert found["ece"] == pytest.approx(0.15, abs=0.002)
    assert found["ece_after"] == pytest.approx(0.0, abs=0.002)
    assert found["cases"] == 3 * 40
    write_report(run)
    assert f"a temperature of {found['temperature']:.3f}" in Page((run.path / "report.html").read_text()).text


def test_counts_of_another_task_than_the_studys_are_not_counted(tmp_path: Path) -> None:
    with pytest.raises(RoundPaused, match="OTHER_MEASURE"):
        toy_run(tmp_path, FOUND, Scripted())  # answers in Dice
