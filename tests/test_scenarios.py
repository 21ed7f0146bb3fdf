"""Published benchmarks: budgets by FLamby's rule, tables by hand, messages, and one carried out on a fixture."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared_models.errors import StudyInvalid
from shared_models.files import read_json
from shared_models.study import load_study
from simulations.cli import app
from simulations.fixtures import write_flamby
from simulations.run import Machine
from simulations.scenarios import BALANCED, DICE, SCENARIOS, budget, carry_out, in_words, named, table, value_of

pytestmark = pytest.mark.usefixtures("settings_of_torch")


@pytest.mark.parametrize(
    ("name", "cases", "sites", "epochs"),  # as FLamby's common.py of each data set has them
    [
        ("fed-ixi", 450, 3, 10),
        ("fed-kits19", 72, 6, 500),
        ("fed-isic2019", 18413, 6, 20),
        ("fed-camelyon16", 270, 2, 45),
    ],
)
def test_rounds_and_updates_of_the_study_files_are_flambys(name, cases, sites, epochs):
    study = load_study(SCENARIOS[name].study)
    assert study.train.local_steps == 100
    assert study.rounds.count == budget(cases, sites, study.train.batch_size, epochs)
    assert study.rounds.count == {"fed-ixi": 7, "fed-kits19": 30, "fed-isic2019": 9, "fed-camelyon16": 3}[name]


def test_a_budget_of_less_than_a_round_is_one():
    assert budget(10, 3, 8, 1) == 1


def test_every_scenario_is_of_a_ready_study_and_says_how_published_figures_differ():
    for scenario in SCENARIOS.values():
        load_study(scenario.study)
        assert scenario.wants
        assert bool(scenario.published) == bool(scenario.differs)
    with pytest.raises(StudyInvalid, match="'fed-heart' is not known"):
        named("fed-heart")


def row(
    kind: str, site: str, trained: str = "", setting: str = "", label: str = "a", split: str = "test", **of: object
):
    return {"kind": kind, "setting": setting, "trained": trained, "seed": 0, "site": site, "split": split,
            "label": label, "row": of}  # fmt: skip


def test_the_table_has_pooled_first_then_each_site_alone_and_the_settings():
    rows = [
        row("local", "x", "x", dice=0.5), row("local", "y", "x", dice=0.25),
        row("pooled", "x", dice=0.75), row("pooled", "x", label="b", dice=0.25), row("pooled", "y", dice=1.0),
        row("federated", "x", setting="fedavg", dice=0.5), row("federated", "y", setting="fedavg", dice=None),
        row("personalised", "x", setting="ditto", dice=0.5), row("personalised", "y", setting="ditto", dice=0.5),
        row("left out", "x", "x", "fedavg", dice=0.0), row("pooled", "x", split="val", dice=0.0),
    ]  # fmt: skip
    found = table({"rows": rows, "sites": ["x", "y"]}, DICE)
    assert [line["model"] for line in found] == ["pooled", "x alone", "fedavg", "ditto, each site's own"]
    assert found[0] == {"model": "pooled", "sites": {"x": [0.5], "y": [1.0]}, "mean": [0.75]}
    assert found[2] == {"model": "fedavg", "sites": {"x": [0.5], "y": [None]}, "mean": [None]}
    told = in_words("fed-ixi", named("fed-ixi"), load_study("fed-ixi"), found, ["x", "y"], 1)
    assert "| pooled | 0.500 | 1.000 | 0.750 |" in told
    assert "FedAvg 0.773 ± 0.019" in told
    assert "soft Dice, mean of brain and background" in told


def test_balanced_accuracy_is_the_mean_sensitivity_of_the_labels_that_are_there():
    rows: list[dict[str, float | None]] = [
        {"sensitivity": 0.5, "auroc": 0.9},
        {"sensitivity": 1.0, "auroc": 0.1},
        {"sensitivity": None, "auroc": None},
    ]
    assert value_of(rows, BALANCED) == 0.75
    assert value_of(rows, "AUROC") == 0.9


def test_data_that_are_not_there_are_answered_with_the_layout_that_is_wanted(tmp_path):
    for arguments in (["fed-kits19"], ["fed-kits19", "--data", str(tmp_path)]):
        result = CliRunner().invoke(app, ["scenario", *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 1
        told = " ".join(result.output.split())
        assert "Wanted in --data DIR: thresholded_sites.csv of FLamby (columns case_ids, site_ids" in told
        assert "case_00000/imaging.nii.gz" in told
    listed = CliRunner().invoke(app, ["scenarios"]).output
    assert all(name in listed for name in SCENARIOS)


def test_a_benchmark_of_bags_is_carried_out_and_its_table_written(tmp_path: Path):
    data = write_flamby(tmp_path / "data", "fed-camelyon16", 4, 4, width=2048)
    said: list[str] = []
    few = ["train.local_steps=8", "rounds.count=2", "train.deterministic=true"]
    told = carry_out(
        "fed-camelyon16", [data], ["fedavg"], few, 1, tmp_path / "out", Machine(device="cpu"), said.append,
        lambda done, of: None,
    )  # fmt: skip
    assert said[0] == "2 sites, 2 rounds of 8 updates"
    assert [line["model"] for line in told["rows"]] == ["pooled", "rumc alone", "umcu alone", "fedavg"]
    assert all(0 <= value <= 1 for line in told["rows"] for values in line["sites"].values() for value in values)
    assert told["rows"][0]["mean"][0] > 0.9, "a raised feature in two tiles of a bag is found"
    assert read_json(tmp_path / "out" / "scenario.json")["rows"] == told["rows"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "bags of tiles, 2048 features each"
        in (tmp_path / "out" / "fed-camelyon16" / "seed-0" / "fedavg" / "report.html").read_text()
    )
    assert "test patients are not for choosing" in page, "FLamby has no validation patients"
