"""What is told of a run: the numbers are the hand-computed ones, and the page is safe and whole."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.site import Site
from fedclient.work import Holding, Learned
from fedserver import plots
from fedserver.checkpoint import RunFolder
from fedserver.cohort import Presence
from fedserver.comparison import Spread, as_json, matrix, mean_over_sites, results, verdict
from fedserver.courier import Inline
from fedserver.page import parts_in_words, ranges, render
from fedserver.report import Comparison, curves, facts, write_report
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models.errors import OrderRefused
from shared_models.figure_text import duration_text, size_text
from shared_models.files import append_json, read_json, read_lines
from shared_models.metrics import DiceCounts, counts
from shared_models.scores import Score
from shared_models.study import Rounds, Study, Task, sha256
from shared_models.weights import Arrays
from shared_models.wire import Split
from tests.toys import Clock, ScriptedGrid, new_run, nodes, toy_app

SITES = ("east", "north", "south")
STUDY = Study(name="toy", rounds=Rounds(count=3, quorum=2, deadline_s=100, pause_s=50, gather_s=5))
SCORES: Mapping[str, Sequence[float | None]] = {"east": [0.9, 0.8], "north": [0.6, 0.7, 0.65, None], "south": [0.5]}
ROUND_BYTES = 12 * 4 + 4 * 4 + 8  # of tests.toys.WEIGHTS
VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass(frozen=True)
class Scripted:
    """Learns nothing, and scores what it is told to; south shows no histogram below two cases."""

    scores: Mapping[str, Sequence[float | None]] = field(default_factory=lambda: SCORES)
    losses: tuple[float | None, ...] = (1.0, 0.5)
    refuses: frozenset[tuple[str, int]] = frozenset()

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        if (site.name, round_number) in self.refuses:
            raise OrderRefused("NOT_APPROVED", "stays at the site")
        return Learned({n: a + 1 for n, a in weights.items()}, 10, steps=3, losses=self.losses, device="cpu")

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        return {label: counts(self.scores[site.name], smallest_count=2) for label in study.task.labels}

    def holding(self, site: Site, study: Study) -> Holding:
        return Holding(8, 2)


def toy_run(
    folder: Path,
    study: Study = STUDY,
    learner: Scripted | None = None,
    away: Mapping[str, str] | None = None,
    delays: Mapping[str, float] | None = None,
) -> RunFolder:
    """A real run over SITES; raises RoundPaused as the script says."""
    clock = Clock()
    numbers = {site: i for i, site in enumerate(SITES, start=1)}
    configs = {numbers[s]: c for s, c in nodes(SITES, folder).items()}
    grid = ScriptedGrid(toy_app(learner or Scripted()), configs, clock, delays)
    here = Presence({s: i for s, i in numbers.items() if s not in (away or {})}, away or {})
    run = RunFolder(folder / "toy") if (folder / "toy").exists() else new_run(folder, study)
    carry_out(Setting(grid, run, lambda: here, Inline(), clock, clock.sleep, poll_s=0.5, reask_s=1000.0))
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = toy_run(tmp_path_factory.mktemp("finished"))
    write_report(run, COMPARISON)
    return run


def dice_of(**sites: float) -> dict[str, DiceCounts]:
    return {site: counts([value, value]) for site, value in sites.items()}


COMPARISON = Comparison(
    local={
        "east": dice_of(east=0.80, north=0.40, south=0.60),
        "north": dice_of(east=0.30, north=0.90, south=0.50),
        "south": dice_of(east=0.20, north=0.10, south=0.95),
    },
    pooled=dice_of(east=0.91, north=0.92, south=0.93),
    federated=dice_of(east=0.85, north=0.90, south=0.94),
)
SECOND = replace(COMPARISON, federated=dice_of(east=0.87, north=0.92, south=0.90))


class Page(HTMLParser):
    """Tags in their order, what attributes hold, and whether every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run: RunFolder) -> Page:
    return Page((run.path / "report.html").read_text())


def told(run: RunFolder, *comparisons: Comparison) -> tuple[dict[str, Any], Page]:
    """What report.json and report.html hold, without the pictures, which take their time."""
    found = facts(run, comparisons)
    return found, Page(render(found, *curves(found)))


def test_the_final_test_has_the_numbers_computed_by_hand(finished: RunFolder) -> None:
    found = read_json(finished.path / "report.json")
    test = found["test"]["lung"]
    assert {s: row["dice"] for s, row in test["sites"].items()} == {"east": 0.85, "north": 0.65, "south": 0.5}
    assert test["sites"]["east"]["deviation"] == pytest.approx(statistics.pstdev([0.9, 0.8]), abs=1e-6)
    assert (test["sites"]["north"]["cases"], test["sites"]["north"]["empty"]) == (3, 1)
    assert test["sites"]["east"]["histogram"] == [0] * 16 + [1, 0, 1, 0]
    assert test["sites"]["south"]["histogram"] == []
    assert test["mean_over_sites"] == pytest.approx((0.85 + 0.65 + 0.5) / 3, abs=1e-6)
    assert test["all_cases"]["dice"] == pytest.approx((0.9 + 0.8 + 0.6 + 0.7 + 0.65 + 0.5) / 6, abs=1e-6)
    assert (test["worst"], test["best"], test["gap"]) == ("south", "east", 0.35)


def test_rounds_bytes_and_curves_are_those_of_the_run(finished: RunFolder) -> None:
    found = read_json(finished.path / "report.json")
    assert found["study"]["sha256"] == sha256(STUDY)
    assert (found["rounds_done"], found["rounds_planned"], found["finished"]) == (3, 3, True)
    assert found["totals"]["bytes_down"] == found["totals"]["bytes_up"] == 3 * 3 * ROUND_BYTES
    assert [r["sites"]["east"]["updates"][0]["loss"] for r in found["rounds"]] == [0.75] * 3
    measured = [r["sites"]["north"]["updates"][0]["validation"] for r in found["rounds"]]
    assert [v["lung"]["dice"] if v else None for v in measured] == [None, 0.65, 0.65]


def test_no_histogram_of_a_validation_and_no_row_of_a_case_is_told(finished: RunFolder) -> None:
    text = (finished.path / "report.json").read_text()
    found = json.loads(text)
    assert all("histogram" not in u["validation"].get("lung", {}) for r in found["rounds"] for p in r["sites"].values()
               for u in p["updates"])  # fmt: skip
    for word in ("patient", "case_id", str(finished.path)):
        assert word not in text


def test_the_comparison_has_the_numbers_computed_by_hand(finished: RunFolder) -> None:
    compared = read_json(finished.path / "report.json")["comparison"]
    east = compared["sites"]["east"]
    assert [east[k]["mean"] for k in ("own", "elsewhere", "pooled", "federated")] == [0.8, 0.5, 0.91, 0.85]
    assert east["gain_points"] == {"mean": 5.0, "deviation": None}
    assert compared["sites"]["south"]["gain_points"]["mean"] == -1.0
    assert compared["mean"]["federated"]["mean"] == pytest.approx((0.85 + 0.90 + 0.94) / 3, abs=1e-6)
    assert compared["mean"]["own"]["mean"] == pytest.approx((0.80 + 0.90 + 0.95) / 3, abs=1e-6)
    assert compared["worst_federated"] == {"site": "east", "value": 0.85}
    assert compared["worst_local"] == {"trained": "south", "tested": "north", "value": 0.1}
    assert compared["by_seed"] == [
        {
            "local": {
                "east": {"east": 0.8, "north": 0.4, "south": 0.6},
                "north": {"east": 0.3, "north": 0.9, "south": 0.5},
                "south": {"east": 0.2, "north": 0.1, "south": 0.95},
            },
            "pooled": {"east": 0.91, "north": 0.92, "south": 0.93},
            "federated": {"east": 0.85, "north": 0.9, "south": 0.94},
        }
    ]
    text = page_of(finished).text
    assert "Federation helped east: 0.850 with the federated model, 0.800 alone (+5.0 Dice points)." in text
    assert "Federation made no difference to north: 0.900 with the federated model, 0.900 alone (0.0" in text
    assert "Federation did not help south: 0.940 with the federated model, 0.950 alone (\u22121.0 Dice points)." in text


def test_several_seeds_give_mean_and_deviation_and_a_gain_within_it_is_not_called_one(tmp_path: Path) -> None:
    east, north, south = results([COMPARISON, SECOND])
    assert east.federated.mean == pytest.approx(0.86)
    assert east.federated.deviation == pytest.approx(statistics.stdev([0.85, 0.87]))
    assert east.gain_points.mean == pytest.approx(6.0)
    assert north.gain_points.deviation == pytest.approx(statistics.stdev([0.0, 2.0]))
    means = [(0.85 + 0.90 + 0.94) / 3, (0.87 + 0.92 + 0.90) / 3]
    assert mean_over_sites([COMPARISON, SECOND]).federated.deviation == pytest.approx(statistics.stdev(means))
    assert verdict(east, 2, "Dice").startswith("Federation helped east")
    assert verdict(north, 2, "Dice").startswith("Federation made no clear difference to north")
    assert verdict(south, 2, "Dice").endswith("(\u22123.0 ± 2.8 Dice points, 2 seeds).")
    run = toy_run(tmp_path)
    text = told(run, COMPARISON, SECOND)[1].text
    assert "Over 2 seeds" in text
    assert "0.860 ± 0.014" in text


def test_a_site_without_a_score_is_a_dash_and_takes_part_in_no_mean() -> None:
    lacking = replace(COMPARISON, federated=dice_of(east=0.85, north=0.90) | {"south": counts([None])})
    south = results([lacking])[-1]
    assert math.isnan(south.federated.mean)
    assert "cannot be compared" in verdict(south, 1, "Dice")
    assert mean_over_sites([lacking]).federated.mean == pytest.approx(0.875)
    assert [row.name for row in matrix([lacking])] == [
        "east alone",
        "north alone",
        "south alone",
        "pooled",
        "federated",
    ]
    assert math.isnan(matrix([lacking])[-1].values["south"].mean)


def test_where_layers_stay_at_the_sites_each_is_judged_by_its_own_model():
    kept = replace(
        COMPARISON, federated=dice_of(east=0.1, north=0.1, south=0.1),
        personalised=dice_of(east=0.84, north=0.88, south=0.95), partial=True,
    )  # fmt: skip
    east, north, south = results([kept])
    assert [round(r.gain_points.mean, 6) for r in (east, north, south)] == [4.0, -2.0, 0.0]
    assert verdict(east, 1, "Dice") == (
        "Federation helped east: 0.840 with its own model of the federation, 0.800 alone (+4.0 Dice points)."
    )
    compared = as_json([kept], "Dice")
    assert compared["worst_federated"] is None
    assert "federated, shared layers alone" in [row["model"] for row in compared["matrix"]]


def test_what_was_not_trained_for_comparison_has_no_column(tmp_path: Path) -> None:
    run, alone = toy_run(tmp_path), Comparison({}, {}, COMPARISON.federated)
    assert "What federation was worth" not in told(run, alone)[1].text
    seeds = told(run, alone, replace(alone, federated=SECOND.federated))[1].text
    assert "0.860 ± 0.014" in seeds
    assert "pooled" not in seeds
    assert "gain," not in seeds
    pooled = told(run, replace(COMPARISON, local={}))[1].text
    assert "pooled" in pooled
    assert "alone" not in pooled
    write_report(run, alone)
    assert not (run.path / "matrix.png").exists()


def test_the_part_of_every_site_is_told_with_its_reason(tmp_path: Path) -> None:
    study = replace(STUDY, rounds=replace(STUDY.rounds, quorum=1, late="next"))
    run = toy_run(tmp_path, study, Scripted(refuses=frozenset({("north", 2)})), delays={"south": 130.0})
    found, page = told(run)
    rounds, text = found["rounds"], page.text
    assert rounds[1]["sites"]["north"] == {"part": "refused", "reason": "NOT_APPROVED", "updates": []}
    assert rounds[1]["sites"]["south"]["part"] == "late"
    assert [u["round"] for u in rounds[1]["sites"]["south"]["updates"]] == [1]
    assert "counted in 2 of 3 rounds; refused in round 2 (NOT_APPROVED)." in text
    assert "late in rounds 1\u20133 (did not answer within 100 s)" in text
    assert "its late work of round" in text
    assert "Not in the final test: south , late (did not answer within 100 s)" in text


def test_the_page_needs_no_script_and_no_network(finished: RunFolder) -> None:
    page = page_of(finished)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object", "a", "form"} == set()
    for _, attributes in page.tags:
        assert not {"href", "src", "xlink:href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    text = (finished.path / "report.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert len(text) < 100_000


def test_text_of_a_study_or_a_site_stays_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>$x$ ../../out'
    run = toy_run(tmp_path, replace(STUDY, title=evil))
    lines = [json.dumps(line).replace("north", json.dumps(evil)[1:-1]) for line in read_lines(run.metrics)]
    run.metrics.write_text("".join(line + "\n" for line in lines))
    renamed = {evil if s == "north" else s: d for s, d in COMPARISON.federated.items()}
    write_report(run, Comparison(COMPARISON.local, COMPARISON.pooled, renamed))
    page = page_of(run)
    assert {tag for tag, _ in page.tags} & {"script", "img"} == set()
    assert "<script>alert(1)</script>" in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(p.is_relative_to(run.path / "tensorboard") for p in tmp_path.rglob("*tfevents*"))
    assert len(list((run.path / "tensorboard").iterdir())) == 3


def test_an_unfinished_run_and_one_without_a_round_get_a_report(tmp_path: Path) -> None:
    fresh = new_run(tmp_path, STUDY)
    write_report(fresh)
    assert "No round is finished yet" in page_of(fresh).text
    run = toy_run(tmp_path / "other")
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in read_lines(run.metrics) if "final" not in line))
    found, page = told(run)
    assert found["finished"] is False
    assert "Not finished" in page.text


def test_a_loss_that_was_not_finite_is_a_gap_and_a_label_nobody_has_is_a_dash(tmp_path: Path) -> None:
    nobody: dict[str, list[float | None]] = {s: [None] for s in SITES}
    run = toy_run(tmp_path, learner=Scripted(scores=nobody, losses=(1.0, None)))
    found, page = told(run)
    text = page.text
    assert found["rounds"][0]["sites"]["east"]["updates"][0]["loss"] is None
    assert (found["test"]["lung"]["worst"], found["test"]["lung"]["gap"]) == (None, None)
    assert "No site has a test case with the label lung" in text
    assert "nan" not in text.lower()


def test_every_label_has_its_own_curves_and_table(tmp_path: Path) -> None:
    run = toy_run(tmp_path, replace(STUDY, task=Task(labels=("lung", "heart"))))
    found, page = told(run)
    assert set(found["test"]) == {"lung", "heart"}
    labels = [a.get("aria-label") for tag, a in page.tags if tag == "svg" and a.get("class") == "chart"]
    assert "Validation Dice: heart by site over rounds" in labels


def test_tensorboard_reads_the_events_back(finished: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted((finished.path / "tensorboard").iterdir())
    assert [f.name for f in folders] == list(SITES)
    events = EventAccumulator(str(folders[1]))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "train/examples", "train/loss", "train/seconds", "validation_dice/lung"]  # fmt: skip
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.75), (2, 0.75), (3, 0.75)]
    measured = [(e.step, e.value) for e in events.Scalars("validation_dice/lung")]
    assert measured == [(1, pytest.approx(0.65)), (2, pytest.approx(0.65))]
    write_report(finished, COMPARISON)
    assert len(list(folders[1].iterdir())) == 1


def test_the_pictures_are_png_files_and_everything_is_the_owners_alone(finished: RunFolder) -> None:
    from PIL import Image

    for name in ("curves.png", "matrix.png"):
        with Image.open(finished.path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5
    made = [finished.path / name for name in ("report.html", "report.json", "curves.png", "matrix.png")]
    made += (finished.path / "tensorboard").rglob("*tfevents*")
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}


def test_a_thousand_rounds_are_still_a_page(tmp_path: Path) -> None:
    run = toy_run(tmp_path)
    lines = read_lines(run.metrics)
    run.metrics.unlink()
    many = [json.dumps(lines[1] | {"round": n}) for n in range(1, 1001)]
    run.metrics.write_text("\n".join(many) + "\n")
    append_json(run.metrics, lines[-1])
    found = facts(run)
    text = render(found, *curves(found))
    page = Page(text)
    assert len(text) < 400_000
    assert "counted in 1000 of 1000 rounds" in page.text
    assert sum(tag == "rect" for tag, _ in page.tags) < 50


def test_a_site_has_one_look_everywhere_and_no_two_of_24_share_it() -> None:
    names = [f"site-{i:02d}" for i in range(24)]
    styles = plots.styles(names)
    assert len(set(styles.values())) == 24
    assert plots.styles(names[::-1]) == styles


def test_every_colour_of_a_line_can_be_seen_on_the_paper_of_its_theme() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert all((luminance("#f5f6f8") + 0.05) / (luminance(c) + 0.05) >= 3 for c in plots.LIGHT)
    assert all((luminance(c) + 0.05) / (luminance("#1d2128") + 0.05) >= 3 for c in plots.DARK)
    for value in np.linspace(0, 1, 21):
        paper, ink = (luminance(c) + 0.05 for c in plots.heat(float(value), 0, 1))
        assert max(paper, ink) / min(paper, ink) >= 4.5


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_and_hold_the_range(low: float, span: float) -> None:
    at = plots.ticks(low, low + span)
    assert at[0] <= low + 1e-6 * max(1, abs(low), span)
    assert at[-1] >= low + span - 1e-6 * max(1, abs(low), span)
    assert 1 <= len(at) <= 7
    chart = plots.line_chart("t", "u", {"a": [(1, low), (2, low + span)]}, plots.styles(["a"]), (low, low))
    assert all(0 <= y <= chart.height for line in chart.lines for _, y, _ in line.points)


def test_words_for_numbers() -> None:
    assert ranges([3]) == "round 3"
    assert ranges([3, 5, 6, 7, 9]) == "rounds 3, 5\u20137, 9"
    assert [size_text(n) for n in (0, 216, 999, 1234, 999_600, 124e6)] == [
        "0 B", "216 B", "999 B", "1.23 kB", "1 MB", "124 MB"]  # fmt: skip
    assert [duration_text(s) for s in (0.04, 9.96, 59.7, 60, 125, 7260)] == [
        "0.0 s", "10 s", "1 min", "1 min", "2 min 5 s", "2 h 1 min"]  # fmt: skip
    assert verdict(results([COMPARISON])[0], 1, "Dice").count("0.85") == 1
    assert Spread().mean != Spread().mean


def test_many_kinds_of_absence_are_cut_short() -> None:
    rounds: list[dict[str, Any]] = [
        {"round": n, "sites": {"east": {"part": "rejected", "reason": f"CODE_{n}: {'x' * 1000}", "updates": []}}}
        for n in range(1, 20)
    ]
    said = parts_in_words(rounds, "east")
    assert said[0] == "counted in 0 of 19 rounds"
    assert said[-1] == "and 13 more kinds of absence, see report.json"
    assert all(len(words) < 300 for words in said)


def test_facts_of_a_run_are_the_same_when_told_twice(finished: RunFolder) -> None:
    assert facts(finished, [COMPARISON]) == facts(finished, [COMPARISON])
    assert json.loads(json.dumps(facts(finished, [COMPARISON]))) == read_json(finished.path / "report.json")
