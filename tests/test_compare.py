"""A comparison: which runs it takes, what is done once, what its tables say, and what each site's page shows."""

import csv
import threading
import warnings
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

import simulations.compare as comparing
from fedserver.checkpoint import RunFolder
from fedserver.comparison import ModelRow, Spread
from fedserver.plots import matrix_png
from shared_models.dates import span_text
from shared_models.errors import StudyInvalid
from shared_models.figure_text import MINUS
from shared_models.files import read_json
from shared_models.metrics import as_row, counts
from shared_models.study import Evaluate, Model, Personal, Preprocess, Rounds, Study, Train
from simulations.compare import Asked, compare, planned_runs, time_left
from simulations.compare_page import _page, _study_page, harmed, site_page, write_all
from simulations.compare_run import data_of, machine_of
from simulations.compare_tables import WORDS, holm, latex, markdown, summary, verdict_of
from simulations.engine import NodeConfig
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, jobs, node_configs, score
from tests.toys import nodes

pytestmark = pytest.mark.usefixtures("settings_of_torch")

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), norm="batch"),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=1, batch_size=4, learning_rate=2e-2, deterministic=True),
    rounds=Rounds(count=1),
    personal=Personal(keep=("norm",)),
)
SETTINGS = {"fedavg": {}, "prox+uniform": {"train": {"proximal_mu": 0.1}, "strategy": {"weighting": "uniform"}}}


def sites_in(folder: Path) -> dict[str, NodeConfig]:
    return {site: {**config, "manifest-site": site} for site, config in nodes(["a", "b"], folder).items()}


def test_baselines_are_trained_once_for_all_settings_and_sites_left_out_for_each():
    sites = sites_in(Path("/nowhere"))
    runs = planned_runs(Asked(STUDY, sites), SETTINGS, 2, Path("out"), leave_one_out=True)
    names = [run.job.name for run in runs if run.model.seed == 0]
    assert names == [
        "pooled", "local-a", "local-b", "fedavg", "fedavg-without-01", "fedavg-without-02",
        "prox_uniform", "prox_uniform-without-01", "prox_uniform-without-02",
    ]  # fmt: skip
    assert len(runs) == 2 * len(names)
    assert {run.job.study.seed for run in runs} == {0, 1}
    assert [run.model.trained for run in runs if run.model.kind == "left out"] == ["a", "b"] * 4
    assert all(run.job.study.train.proximal_mu == 0.0 for run in runs if run.model.kind in ("pooled", "local"))


def test_norm_layers_of_pooled_training_which_stay_with_its_node_are_looked_for_there():
    runs = planned_runs(Asked(STUDY, sites_in(Path("/nowhere"))), {"fedavg": {}}, 1, Path("out"), False)
    (pooled,) = [run for run in runs if run.model.kind == "pooled"]
    assert pooled.job.study.personal.keep == ("norm",)
    assert pooled.model.config == pooled.job.nodes["pooled"]


def test_a_setting_that_no_study_can_have_is_told_before_anything_is_trained(tmp_path):
    sites = sites_in(tmp_path)
    with pytest.raises(StudyInvalid, match="with setting 'krum'"):
        planned_runs(Asked(STUDY, sites), {"krum": {"strategy": {"robust": "krum"}}}, 1, tmp_path, False)


def test_a_comparison_is_carried_out_once_and_its_files_hold_every_figure(tmp_path, monkeypatch):
    plan = PhantomPlan(sites=("north", "south"), train=2, val=1, test=1, slices=2, size=32)
    how, out = Machine(device="cpu"), tmp_path / "out"
    where = node_configs(out / "tiny", [phantom(tmp_path / "data", plan, processes=1)], how, None)
    said: list[str] = []
    results = compare([Asked(STUDY, where)], SETTINGS, 1, out, how, said.append, lambda done, of: None)
    files = write_all(results, out)
    assert said[0].startswith("1 of 5: tiny seed 0 pooled, about ")
    assert said[4] == "5 of 5: tiny seed 0 prox_uniform"
    rows = list(csv.DictReader(Path(files["tidy"]).read_text().splitlines()))
    dice = {(r["strategy"], r["model"], r["site"]): float(r["value"]) for r in rows
            if (r["split"], r["measure"]) == ("test", "dice")}  # fmt: skip
    assert len(dice) == 2 * (3 + 2 * 2), "at each site: pooled, two alone; each setting's, and the site's own"
    pool = jobs(STUDY, where, compare=True)[1]
    for site, found in score(RunFolder(out / "tiny" / "seed-0" / "pooled"), where, pool.nodes).items():
        assert dice["", "pooled", site] == pytest.approx(found.value, abs=1e-6), "with the norm layers that it trained"
    run = read_json(out / "tiny" / "seed-0" / "prox_uniform" / "report.json")
    for site, row in run["test"]["lung"]["sites"].items():
        assert dice["prox+uniform", "federated", site] == pytest.approx(row["value"], abs=1e-6)
    for site, row in run["test"]["lung"]["personalised"].items():
        assert dice["prox+uniform", "personalised", site] == pytest.approx(row["dice"], abs=1e-6)
    assert {r["measure"] for r in rows if r["site"] == ""} == {"bytes", "training_seconds"}
    assert results["studies"]["tiny"]["partial"] == sorted(SETTINGS), "their norm layers stay"
    page = Path(files["report"]).read_text()
    assert "Chosen on validation" in page
    assert page.count("data:image/png;base64,") == 3, "no curves of what the coordinator has by itself"
    south = (out / "sites" / "tiny" / "south.html").read_text()
    assert "south" in south
    assert "north" not in south

    stamps = {p: p.stat().st_mtime_ns for p in out.glob("tiny/seed-0/*/state.json")}
    monkeypatch.setattr(comparing, "write_report", lambda folder: None)
    again = compare([Asked(STUDY, where)], SETTINGS, 1, out, how, said.append, lambda done, of: None)
    assert again["studies"]["tiny"]["rows"] == results["studies"]["tiny"]["rows"]
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("tiny/seed-0/*/state.json")}, "done runs stay"


def test_several_runs_share_the_one_gpu_that_was_named_each_with_its_own_worker(monkeypatch):
    together, begun = threading.Barrier(3, timeout=20), []

    def carry_out(job, folder, how, stop):
        together.wait()  # all three at once, or it breaks
        begun.append((how.workers, {(c["device"], c["threads"]) for c in job.nodes.values()}))

    def scored(*_):
        raise StudyInvalid("far enough")

    monkeypatch.setattr(comparing, "carry_out", carry_out)
    monkeypatch.setattr(comparing, "check_cases", lambda *_: None)
    monkeypatch.setattr(comparing, "scored", scored)
    how = machine_of(3, None, "cuda:0")
    where = {site: {**config, "threads": how.threads} for site, config in sites_in(Path("/nowhere")).items()}
    with pytest.raises(StudyInvalid, match="far enough"):
        compare([Asked(STUDY, where)], SETTINGS, 3, Path("out"), how, lambda _: None, lambda done, of: None)
    assert begun == [(1, {("cuda:0", 1)})] * 15


def test_the_time_left_is_that_of_the_rounds_that_are_left():
    assert time_left(10, 30, 90, 60.0) == f", about {span_text(180.0)} left"
    assert time_left(10, 10, 90, 60.0) == "", "nothing is known yet"
    assert time_left(10, 90, 90, 60.0) == ""


def row(kind: str, setting: str, seed: int, site: str, split: str, dice: float, trained: str = "") -> dict[str, Any]:
    return {"kind": kind, "setting": setting, "seed": seed, "site": site, "split": split, "label": "lung",
            "trained": trained, "row": as_row(counts([dice]))}  # fmt: skip


def study_of(tests: dict[str, list[float]], validation: dict[str, float], **more: Any) -> dict[str, Any]:
    """Two sites, the second 0.1 worse; a setting's test scores by seed."""
    rows = []
    for setting, of in tests.items():
        for seed, dice in enumerate(of):
            for site, less in (("a", 0.0), ("b", 0.1)):
                rows.append(row("federated", setting, seed, site, "test", dice - less))
                rows.append(row("federated", setting, seed, site, "val", validation[setting] - less))
    return {"title": "Toy", "measure": "dice", "label": "lung", "sites": ["a", "b"], "rows": rows, "costs": [],
            "worth": {"a": [], "b": []}, "subgroups": {"a": [], "b": []}, "publish_sites": False, **more}  # fmt: skip


SCORES = {"fedavg": [0.7, 0.72, 0.71], "good": [0.8, 0.81, 0.79], "lucky": [0.9, 0.91, 0.92]}
VALIDATED = {"fedavg": 0.7, "good": 0.8, "lucky": 0.75}


def test_the_setting_is_chosen_on_validation_though_another_tests_better():
    found = summary(study_of(SCORES, VALIDATED))
    assert found.chosen is not None
    assert found.chosen.setting == "good"
    assert "good (validation Dice 0.750). Its test Dice: 0.750 ± 0.010, worst site 0.700" in verdict_of(found, "Dice")


def test_without_validation_patients_nothing_is_chosen():
    study = study_of(SCORES, VALIDATED)
    found = summary(study | {"rows": [r for r in study["rows"] if r["split"] == "test"]})
    assert found.chosen is None
    assert "test patients are not for choosing" in verdict_of(found, "Dice")


def test_settings_are_tested_in_pairs_over_seeds_against_plain_averaging():
    found = summary(study_of(SCORES, VALIDATED))
    lines = {line.setting: line for line in found.lines}
    expected = {s: ttest_rel(SCORES[s], SCORES["fedavg"]).pvalue for s in ("good", "lucky")}
    assert lines["good"].p == pytest.approx(expected["good"], rel=1e-6)
    assert lines["good"].margin == pytest.approx(0.09)
    gains = [0.1, 0.09, 0.08]
    assert lines["good"].error == pytest.approx((sum((g - 0.09) ** 2 for g in gains) / 2 / 3) ** 0.5)
    assert lines["lucky"].p_holm == pytest.approx(2 * expected["lucky"]), "the smaller of two"
    assert isnan(lines["fedavg"].p)
    assert "n = 3;" in found.test


def test_holms_adjustment_is_that_of_hand():
    adjusted = holm({("f", "a"): 0.01, ("f", "b"): 0.04, ("f", "c"): 0.03, ("f", "d"): nan})
    assert [adjusted["f", s] for s in "abc"] == pytest.approx([0.03, 0.06, 0.06])
    assert isnan(adjusted["f", "d"])


def test_one_seed_has_no_test():
    found = summary(study_of({"fedavg": [0.7], "x": [0.8]}, {"fedavg": 0.5, "x": 0.5}))
    assert all(isnan(line.p) for line in found.lines)


def test_the_tables_of_a_paper_have_a_row_for_each_model():
    results = {"studies": {"toy_x": study_of(SCORES, VALIDATED)}, "seeds": 3}
    assert "| good | 0.750 ± 0.000 | 0.750 ± 0.010 | 0.700 ± 0.010 | +0.0900 (SE 0.0058) |" in markdown(results)
    assert r"good & 0.750 $\pm$ 0.000 & 0.750 $\pm$ 0.010 & 0.700 $\pm$ 0.010 & +0.0900 (SE 0.0058) &" in latex(results)
    assert r"toy\_x" in latex(results)


def difference(verdict: str, setting: str = "good") -> dict[str, Any]:
    low, high = {"harmed": (-0.08, -0.02), "gains": (0.02, 0.08)}[verdict]
    value = (low + high) / 2
    return {"kind": "federated", "setting": setting, "value": value, "low": low, "high": high, "patients": 20,
            "verdict": verdict, "worst_tenth": 0.5}  # fmt: skip


def test_a_harmed_site_is_flagged_on_its_page_and_the_other_is_not():
    study = study_of(SCORES, VALIDATED, worth={"a": [difference("harmed")], "b": [difference("gains")]})
    pages = {site: site_page(site, study, summary(study), 3) for site in ("a", "b")}
    assert harmed(study) == [{"site": "a", "kind": "federated", "setting": "good"}]
    interval = f"{MINUS}0.080 to {MINUS}0.020"
    assert f"worse off ({MINUS}0.050 against training alone, 95 % interval {interval}, 20 patients)" in pages["a"]
    assert 'class="flag"' in pages["a"]
    assert 'class="flag"' not in pages["b"]


def test_a_model_whose_layers_stay_at_the_sites_is_none_that_harms_or_is_chosen_and_their_own_models_are():
    own = [{**r, "kind": "personalised"} for r in study_of(SCORES, VALIDATED)["rows"] if r["setting"] == "good"]
    study = study_of({**SCORES, "good": [0.1, 0.1, 0.1]}, {**VALIDATED, "good": 0.99}, partial=["good"])
    study["rows"] += own
    study["worth"]["a"] = [difference("harmed"), {**difference("gains"), "kind": "personalised"}]
    found = summary(study)
    assert found.chosen is not None
    assert (found.chosen.kind, found.chosen.setting) == ("personalised", "good")
    assert harmed(study) == []
    (partial,) = [line for line in found.lines if line.partial]
    assert partial.name == "good, shared layers alone"
    assert isnan(partial.p), "nobody would use it, and the other tests are not adjusted for it"
    assert summary({**study, "partial": [*SCORES]}).reference.kind == "personalised"


def test_the_heat_map_has_room_for_the_longest_name_of_a_setting():
    rows = [ModelRow(WORDS["left out"].format("s" * 40), None, {"a": Spread(0.5), "b": Spread(0.7)})]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns where the cells shrink to nothing
        assert matrix_png(rows, "lung", "Dice").startswith(b"\x89PNG")


def test_where_patients_are_too_few_for_an_interval_nobody_says_that_no_site_is_harmed():
    few = {**difference("gains"), "low": None, "high": None, "patients": 4, "verdict": "too few patients"}
    worth = {"a": [difference("gains")], "b": [few]}

    def page(study: dict[str, Any]) -> str:
        return _page({"settings": {}, "seeds": 3}, [_study_page("toy", study, summary(study), {})])

    told = page(study_of(SCORES, VALIDATED, worth=worth))
    assert "Whether a setting harms b cannot be told: too few test patients" in told
    assert "No setting harms a site" not in told
    assert "intervals were looked at" not in told, "there is one"
    judged = page(study_of(SCORES, VALIDATED, worth={**worth, "b": worth["a"]}))
    assert "No setting harms a site" in judged
    assert "2 intervals were looked at" in judged


def test_other_sites_are_named_only_where_the_study_publishes_sites():
    study = study_of(SCORES, VALIDATED, sites=["hill-clinic", "b"], worth={"hill-clinic": [], "b": []})
    hidden = site_page("b", study, summary(study), 3)
    assert "hill-clinic" not in hidden
    assert "hill-clinic" in site_page("b", study | {"publish_sites": True}, summary(study), 3)
    assert Evaluate().publish_sites is False


def test_data_are_for_every_study_or_for_the_one_that_is_named():
    assert data_of(["x=y", "b=c", "d"], ["a", "b"]) == {
        "a": [Path("x=y"), Path("d")],
        "b": [Path("x=y"), Path("c"), Path("d")],
    }
