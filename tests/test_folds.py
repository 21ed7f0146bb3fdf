"""Cross-validation, and models tested at a site that none of them was trained at."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from statistics import fmean, stdev

import numpy as np
import pytest

from fedclient.data.cases import ALL
from fedclient.data.listing import list_cases
from fedclient.data.truths import has_truth
from fedclient.site import open_site
from fedclient.worth import CaseScores, FrocScores, joined, mean_scores, measure, part_of, ranked_scores
from fedclient.worth_page import sentence, texts
from shared_models.errors import StudyInvalid
from shared_models.files import read_json
from shared_models.study import Model, Preprocess, Rounds, Study, Train
from simulations.compare import Asked, compare, planned_runs
from simulations.compare_page import write_all
from simulations.compare_run import Request, carry_out_request
from simulations.compare_tables import summary, unseen
from simulations.folds import at_several, deal, folded
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, node_configs
from simulations.site_options import SiteOptions
from simulations.sources import pooled

pytestmark = pytest.mark.usefixtures("settings_of_torch")

HOW = Machine(device="cpu")
STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=1, batch_size=4, learning_rate=2e-2, deterministic=True),
    rounds=Rounds(count=1),
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    plan = PhantomPlan(sites=("north", "south", "west"), train=2, val=1, test=1, slices=2, size=32)
    return phantom(tmp_path_factory.mktemp("data"), plan, processes=1)


@pytest.mark.parametrize(("people", "folds"), [(10, 3), (20, 3), (52, 5), (3, 3), (4, 2)])
def test_over_all_folds_each_patient_is_tested_once_and_in_each_some_train_and_some_validate(people, folds):
    names = [f"p{n}" for n in range(people)]
    dealt = [deal([names], fold, folds) for fold in range(folds)]
    assert all(set(of) == set(names) for of in dealt)
    assert Counter(who for of in dealt for who, split in of.items() if split == "test") == Counter(names)
    sizes = [Counter(of.values()) for of in dealt]
    assert max(s["test"] for s in sizes) - min(s["test"] for s in sizes) <= 1
    assert all(s["train"] >= 1 and s["val"] >= 1 for s in sizes)
    assert len({frozenset(w for w, s in of.items() if s == "val") for of in dealt}) == folds, (
        "others validate each time"
    )


def test_sites_and_their_data_pooled_go_by_the_same_folds(tmp_path, drawn):
    nodes = node_configs(tmp_path, [drawn], HOW, None)
    folds = folded(STUDY, nodes, 2, tmp_path)
    for fold in folds:
        alone: dict[str, str] = {}
        for config in fold.values():
            site = open_site(config)
            alone |= {case.key: case.split for case in list_cases(site.where, site.salt).cases}
        together = open_site({**pooled([*fold.values()]), "site": "pooled"})
        assert {c.key: c.split for c in list_cases(together.where, together.salt).cases} == alone
    tested = [
        {case.key for config in fold.values() for case in list_cases(open_site(config).where, "simulation").cases
         if case.split == "test"} for fold in folds
    ]  # fmt: skip
    everybody = {c.key for config in nodes.values() for c in list_cases(open_site(config).where, "simulation").cases}
    assert tested[0] | tested[1] == everybody
    assert not tested[0] & tested[1]


def test_who_has_no_label_keeps_his_split(tmp_path, drawn):
    nodes = node_configs(tmp_path, [drawn], HOW, None)
    site = open_site(nodes["north"])
    first, *_ = list_cases(site.where, site.salt).cases
    folded(STUDY, nodes, 2, tmp_path)
    known = read_json(tmp_path / "folds" / "1-of-2.json")["splits"]
    assert has_truth(first, STUDY.task)
    assert first.key in known
    dealt = replace(site, dealt={key: split for key, split in known.items() if key != first.key})
    (found,) = [c for c in list_cases(dealt.where, site.salt).cases if c.key == first.key]
    assert found.split == first.split


def test_too_few_patients_for_the_folds_are_told_with_the_site(tmp_path, drawn):
    nodes = node_configs(tmp_path, [drawn], HOW, None)
    with pytest.raises(StudyInvalid, match="site north has 4 patients with a label, and 5 are needed"):
        folded(STUDY, nodes, 5, tmp_path)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"folds": 2, "seeds": 3}, "--seeds must be a multiple of the folds; it is 3. Say --seeds 4"),
        ({"folds": 2, "seeds": 2, "options": SiteOptions(labelled=0.5)}, "Leave one out"),
        ({"folds": 2, "seeds": 2, "options": SiteOptions(test_labels="truth")}, "Leave one out"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_drawn(tmp_path, asked, words):
    request = Request(["lung-ct-quick"], ["study"], tmp_path / "out", **asked)
    with pytest.raises(StudyInvalid, match=words):
        carry_out_request(request, HOW, tmp_path / "cache", print, lambda done, of: None)
    assert not (tmp_path / "cache").exists()


def test_seed_after_seed_takes_the_next_fold_for_every_model(tmp_path, drawn):
    nodes = node_configs(tmp_path, [drawn], HOW, None)
    folds = folded(STUDY, nodes, 2, tmp_path)
    runs = planned_runs(Asked(STUDY, nodes, folds), {"fedavg": {}}, 4, tmp_path, leave_one_out=True)
    assert {(run.model.seed, run.model.fold) for run in runs} == {(0, 0), (1, 1), (2, 0), (3, 1)}
    for run in runs:
        dealt = {config["dealt"] for config in run.job.nodes.values()}
        assert dealt == {folds[run.model.fold]["north"]["dealt"]}, run.job.name


def test_a_comparison_in_folds_tests_each_patient_once_and_strangers_on_all_patients(tmp_path, drawn):
    out = tmp_path / "out"
    nodes = node_configs(out / "tiny", [drawn], HOW, None)
    asked = Asked(STUDY, nodes, folded(STUDY, nodes, 2, out / "tiny"))
    results = compare([asked], {"fedavg": {}}, 2, out, HOW, lambda _: None, lambda *_: None, leave_one_out=True)
    study = results["studies"]["tiny"]
    cases = {(r["kind"], r["trained"], r["seed"], r["split"]): r["row"]["cases"] for r in study["rows"]
             if r["site"] == "north"}  # fmt: skip
    assert {cases["federated", "", seed, "test"] for seed in (0, 1)} == {2}
    assert cases["left out", "north", 0, ALL] == 4
    assert cases["local", "south", 0, ALL] == 4
    assert ("local", "north", 0, ALL) not in cases, "its own model has seen them"
    assert ("federated", "", 0, ALL) not in cases
    (line,) = [of for of in study["worth"]["north"] if of["kind"] == "federated"]
    assert line["patients"] == 4, "those of both folds"

    (north, *_) = unseen(study)
    dice = {(r["kind"], r["trained"], r["seed"]): r["row"]["dice"] for r in study["rows"]
            if (r["site"], r["split"]) == ("north", ALL)}  # fmt: skip
    assert north.without.mean == pytest.approx(fmean(dice["left out", "north", seed] for seed in (0, 1)))
    others = {site: fmean(dice["local", site, seed] for seed in (0, 1)) for site in ("south", "west")}
    assert north.others.mean == pytest.approx(fmean(others.values()))
    assert north.best == pytest.approx(max(others.values()))
    assert north.margin.mean == pytest.approx(north.without.mean - north.others.mean)

    files = write_all({**results, "folds": 2}, out)
    table, page = Path(files["table"]).read_text(), Path(files["report"]).read_text()
    for text in (table, page):
        assert "2 seed(s), each with the patients of another of 2 folds for test" in text
        assert "on all of its patients" in text
    numbers = read_json(Path(files["numbers"]))["summary"]["tiny"]["unseen"]
    assert [of["site"] for of in numbers] == ["north", "south", "west"]
    assert numbers[0]["margin"] == pytest.approx(north.margin.mean, abs=1e-6)


def test_joined_scores_are_those_of_all_cases_without_pairs_across_models():
    mean = joined([mean_scores([0.5, np.nan]), mean_scores([0.8])])
    assert measure(mean, np.ones((1, 3)))[0] == pytest.approx(0.65)
    first = ranked_scores(np.array([0.9, 0.1]), np.array([[False, True], [False, False]]))
    second = ranked_scores(np.array([0.2, 0.4]), np.array([[False, True], [False, False]]))
    assert measure(joined([first, second]), np.ones((1, 4)))[0] == 0.5, "one pair right, one wrong, none across"
    scans = [FrocScores(np.eye(2) * n, np.zeros((2, 2)), np.full(2, 2.0)) for n in (1, 2)]
    whole = joined(scans)
    assert isinstance(whole, FrocScores)
    assert whole.hits.tolist() == [[1, 0], [0, 1], [2, 0], [0, 2]]
    assert whole.lesions.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="several measures"):
        joined([scans[0], CaseScores(np.zeros(1), np.ones(1))])


def test_classes_are_dealt_out_to_all_folds_and_one_model_at_a_time_is_looked_at():
    strata = [[f"no{n}" for n in range(7)], [f"yes{n}" for n in range(3)]]
    for fold in range(3):
        tested = {who for who, split in deal(strata, fold, 3).items() if split == "test"}
        assert len(tested & {*strata[1]}) == 1
        assert len(tested & {*strata[0]}) in (2, 3)
    sizes = [Counter(deal(strata, fold, 3).values())["test"] for fold in range(3)]
    assert sorted(sizes) == [3, 3, 4]


def test_detectors_of_two_folds_share_no_threshold():
    def found_all(best: int, worst: int) -> FrocScores:
        hits, false = np.zeros((2, 10)), np.zeros((2, 10))
        hits[:, best], false[:, worst] = 1, 3
        return FrocScores(hits, false, np.ones(2))

    sure, shy = found_all(9, 8), found_all(5, 4)
    once = np.ones((1, 2))
    alone = [measure(each, once)[0] for each in (sure, shy)]
    assert measure(joined([sure, shy]), np.ones((1, 4)))[0] == pytest.approx(fmean(alone))
    first = part_of(joined([sure, shy]), np.array([2, 3]))
    assert measure(first, once)[0] == pytest.approx(alone[1])


def test_a_patient_at_two_sites_is_dealt_to_none_and_is_no_stranger_to_either(tmp_path, drawn):
    where = tmp_path / "shared"
    copytree(drawn, where)
    head, *rows = (where / "manifest.csv").read_text().splitlines()
    site = head.split(",").index("site")
    (one, *_) = [row.split(",") for row in rows if row.split(",")[site] == "north" and ",train" in row]
    one[site] = "south"
    (where / "manifest.csv").write_text("\n".join([head, *rows, ",".join(one)]) + "\n")
    nodes = node_configs(tmp_path / "out", [where], HOW, None)
    assert len(at_several(nodes)) == 1
    with pytest.raises(StudyInvalid, match="1 patients are at several sites"):
        folded(STUDY, nodes, 2, tmp_path / "out")
    asked = Asked(STUDY, nodes, (), at_several(nodes))
    results = compare([asked], {"fedavg": {}}, 1, tmp_path / "out", HOW, lambda _: None, lambda *_: None, True)
    cases = {(r["kind"], r["trained"]): r["row"]["cases"] for r in results["studies"]["tiny"]["rows"]
             if (r["site"], r["split"]) == ("north", ALL)}  # fmt: skip
    assert cases == {("left out", "north"): 3, ("local", "south"): 3, ("local", "west"): 3}


def test_repeats_of_the_same_folds_are_no_more_evidence():
    def study(repeats: int) -> dict[str, object]:
        rows = [
            {"kind": "federated", "setting": setting, "split": split, "seed": seed, "site": "a", "trained": "",
             "label": "lung", "row": {"measure": "dice", "dice": 0.8 + gain * (setting == "x")}}
            for seed, gain in enumerate([0.03, 0.02, -0.01] * repeats) for setting in ("fedavg", "x")
            for split in ("val", "test")
        ]  # fmt: skip
        return {"rows": rows, "sites": ["a"], "label": "lung", "measure": "dice", "folds": 3}

    once, often = (summary(study(repeats)) for repeats in (1, 5))
    (line,), (again,) = ([x for x in found.lines if x.setting == "x"] for found in (once, often))
    assert (again.p, again.error, again.margin) == pytest.approx((line.p, line.error, line.margin))
    assert line.error == pytest.approx(stdev([0.03, 0.02, -0.01]) * (1 / 3 + 1 / 2) ** 0.5)
    assert "n = 3" in often.test
    assert once.by_fold is not None
    assert once.by_fold.mean == pytest.approx(fmean([0.83, 0.82, 0.8])), "each fold's choice"


def test_a_site_without_a_model_of_its_own_is_not_told_that_there_is_no_difference():
    assert "It cannot be told: there is no model trained here alone" in sentence(texts({}), "fedavg")
