"""Which sites a simulation has: one data set, a table's sites, folders in a folder, or folders that are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedclient.data.listing import list_cases
from fedclient.gate.run import cheap_findings
from fedclient.site import open_site
from shared_models.errors import ManifestInvalid, StateInvalid, StudyInvalid
from shared_models.files import write_atomic
from shared_models.study import Evaluate, Model, Preprocess, Rounds, Study, Train
from simulations.fixtures import brain, png, write_brats
from simulations.phantoms import PhantomPlan
from simulations.run import Machine, carry_out, jobs, node_configs, simulate
from simulations.site_options import SiteOptions, sites_of
from simulations.sources import pooled, sites_at, write_sites


def table(folder: Path, *sites: str, name: str = "labels.csv") -> Path:
    """An image and a mask for each site, or one of no site."""
    write_atomic(folder / "a.png", png(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    write_atomic(folder / "m.png", png(np.eye(8, dtype=np.uint8)))
    rows = [f"p{n},a.png,m.png,{site},train" for n, site in enumerate(sites)] or ["p,a.png,m.png,,train"]
    (folder / name).write_text("patient_id,image,mask," + ("site" if sites else "ward") + ",split\n" + "\n".join(rows))
    return folder


def brats(folder: Path) -> Path:
    return write_brats(folder, "2021", [brain(n, shape=(8, 8, 2)) for n in range(2)])


def test_a_data_set_is_one_site_or_those_that_its_table_names(tmp_path: Path) -> None:
    assert list(sites_at([brats(tmp_path / "b")], "auto", None)) == ["site"]
    assert list(sites_at([table(tmp_path / "t")], "auto", None)) == ["site"]
    named = sites_at([table(tmp_path / "s", "North Hospital", "south")], "auto", None)
    assert {site: where.sites for site, where in named.items()} == {
        "north-hospital": ("North Hospital",), "south": ("south",),
    }  # fmt: skip
    assert list(sites_at([table(tmp_path / "m", "x", "y", name="manifest.csv")], "auto", 1)) == ["x"]


def test_folders_in_a_folder_are_sites_each_in_its_own_layout(tmp_path: Path) -> None:
    brats(tmp_path / "East Clinic")
    table(tmp_path / "west")
    found = sites_at([tmp_path], "auto", None)
    assert {site: (where.folder.name, where.name) for site, where in found.items()} == {
        "east-clinic": ("East Clinic", "East Clinic"), "west": ("west", "west"),
    }  # fmt: skip
    (tmp_path / "notes").mkdir()
    with pytest.raises(ManifestInvalid, match="2 folders in it are data sets, and notes not"):
        sites_at([tmp_path], "auto", None)
    assert list(sites_at([tmp_path / "west", tmp_path / "East Clinic"], "auto", None)) == ["west", "east-clinic"]


def test_folders_of_a_layout_that_is_found_at_any_depth_are_one_data_set_unless_they_differ(tmp_path: Path) -> None:
    for name in ("HGG", "LGG"):
        brats(tmp_path / name)
    assert list(sites_at([tmp_path], "auto", None)) == ["site"]
    write_brats(tmp_path / "old", "2020", [brain(0, shape=(8, 8, 2))])
    assert list(sites_at([tmp_path], "auto", None)) == ["hgg", "lgg", "old"]
    table(tmp_path, name="manifest.csv")
    assert list(sites_at([tmp_path], "manifest", None)) == ["site"]


def test_a_data_toml_makes_a_folder_a_site_and_says_what_is_in_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        brats(tmp_path / name)  # together they would be one data set
    assert list(sites_at([tmp_path], "auto", None)) == ["site"]
    (tmp_path / "one" / "data.toml").write_text('layout = "brats-2021"\n[structures]\ncavity = "background"\n')
    (tmp_path / "two" / "data.toml").write_text("")
    found = sites_at([tmp_path], "auto", None)
    assert (found["one"].layout, found["one"].structures) == ("brats-2021", {"cavity": "background"})
    assert (found["two"].layout, found["two"].structures) == ("auto", {})
    assert sites_at([tmp_path], "brats-2020", None)["two"].layout == "brats-2020"
    (tmp_path / "two" / "data.toml").write_text('layuot = "pacs"\n')
    with pytest.raises(StudyInvalid, match="Did you mean `layout`"):
        sites_at([tmp_path], "auto", None)


def test_what_is_no_data_set_or_has_too_few_sites_or_names_alike_is_told(tmp_path: Path) -> None:
    for folder in ("a/x", "b/x"):
        table(tmp_path / folder)
    with pytest.raises(StudyInvalid, match="two folders have one name"):
        sites_at([tmp_path / "a/x", tmp_path / "b/x"], "auto", None)
    with pytest.raises(StudyInvalid, match="has 1 sites"):
        sites_at([tmp_path / "a/x"], "auto", 2)
    with pytest.raises(StudyInvalid, match="too alike"):
        sites_at([table(tmp_path / "s", "a b", "a-b")], "auto", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestInvalid, match="Make a manifest"):
        sites_at([tmp_path / "empty"], "auto", None)


@pytest.mark.parametrize("several", [False, True])
def test_pooled_data_is_that_of_all_sites_with_their_splits(tmp_path: Path, several: bool) -> None:
    if several:
        brats(tmp_path / "data" / "one")
        table(tmp_path / "data" / "two")
    else:
        table(tmp_path / "data", "one", "two")
    nodes = node_configs(tmp_path, [tmp_path / "data"], Machine(), None)
    pool = next(job for job in jobs(Study(name="s"), nodes, compare=True) if job.name == "pooled")
    assert json.loads(json.dumps(pool.nodes)) == pool.nodes  # it travels to worker processes

    def cases(config: object) -> set[tuple[str, str]]:
        site = open_site(config)  # type: ignore[arg-type]
        return {(case.key, case.split) for case in list_cases(site.where, site.salt).cases}

    assert cases(pool.nodes["pooled"]) == cases(nodes["one"]) | cases(nodes["two"])
    assert open_site(pool.nodes["pooled"]).name == "pooled"


def test_a_run_goes_on_with_the_same_data_and_not_with_other(tmp_path: Path) -> None:
    study = Study(
        name="s",
        modality="xray",
        model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
        preprocess=Preprocess(size=(32, 32), intensity="percentile"),
        train=Train(local_steps=1, batch_size=2),
        rounds=Rounds(count=1, quorum=1),
        evaluate=Evaluate(every=0),
    )
    how = Machine(device="cpu")
    (job,) = jobs(study, node_configs(tmp_path, [table(tmp_path / "data")], how, None), compare=False)
    carry_out(job, tmp_path, how)
    carry_out(job, tmp_path, how)
    write_atomic(tmp_path / "data" / "m.png", png(np.ones((8, 8), np.uint8)))
    with pytest.raises(StateInvalid, match="other data"):
        carry_out(job, tmp_path, how)


def test_a_site_without_labelled_test_patients_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    how = Machine(device="cpu")
    nodes = node_configs(tmp_path, [table(tmp_path / "data")], how, None)
    with pytest.raises(ManifestInvalid, match=r"site site \(labels.csv, 1 images\) has no labelled case to test on"):
        simulate(Study(name="s"), nodes, tmp_path / "out", how, 1, compare=False, say=lambda news: None)
    assert not (tmp_path / "out").exists()


def test_what_is_written_for_several_sites_is_read_as_several_sites(tmp_path: Path) -> None:
    plan = PhantomPlan(sites=2, train=1, val=1, test=1, slices=2, size=16)
    told: list[tuple[int, int]] = []
    write_sites(tmp_path / "out", "brats-2024", plan, lambda done, of: told.append((done, of)))
    assert told == [(n, 6) for n in (0, 1, 2, 3, 3, 4, 5, 6)]
    found = sites_at([tmp_path / "out"], "auto", None)
    assert [(site, where.structures) for site, where in found.items()] == [
        ("north", {"cavity": "background"}),
        ("south", {"cavity": "background"}),
    ]
    assert len(list_cases(found["south"], "salt").cases) == 3
    with pytest.raises(StateInvalid, match="is not empty"):
        write_sites(tmp_path / "out", "pacs", plan, lambda done, of: None)
    with pytest.raises(StudyInvalid, match="--layout 'nothing': allowed are manifest, table, luna16"):
        write_sites(tmp_path / "new", "nothing", plan, lambda done, of: None)


def hospital(folder: Path, *rows: str) -> Path:
    """A manifest of `site,patient,split`, an image for each row."""
    for n, _ in enumerate(rows):
        write_atomic(folder / f"{n}.png", png(np.full((8, 8), n, dtype=np.uint8)))
    lines = [f"{row},{n}.png," for n, row in enumerate(rows)]
    (folder / "manifest.csv").write_text("site,patient_id,split,image,mask\n" + "\n".join(lines) + "\n")
    return folder


def test_hospitals_that_number_their_own_patients_are_pooled_as_different_people(tmp_path: Path) -> None:
    one = hospital(tmp_path / "one", "a,p1,train", "a,p2,test")
    two = hospital(tmp_path / "two", "b,p1,test", "b,p2,train")
    nodes = node_configs(tmp_path, [one, two], Machine(), None)
    site = open_site({**pooled([*nodes.values()]), "site": "pooled"})
    assert len({case.patient for case in list_cases(site.where, site.salt).cases}) == 4
    assert [found.code for found in cheap_findings(site)] == [], "nobody trains on whom somebody tests on"


def test_a_patient_whom_one_site_trains_on_and_another_tests_on_is_told_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    data = hospital(tmp_path / "data", "a,p1,train", "a,p2,test", "b,p1,test", "b,p3,train")
    for options in (SiteOptions([data]), SiteOptions([data], sites=2, partition="iid")):
        with pytest.raises(ManifestInvalid, match="1 patients are at several sites, in more than one split") as refused:
            sites_of(Study(name="s"), tmp_path / "out", options, Machine(), tmp_path, lambda news: None)
        assert refused.value.code == "LEAKAGE_PATIENT"
    mended = hospital(tmp_path / "mended", "a,p1,train", "a,p2,test", "b,p1,train", "b,p3,test")
    nodes = sites_of(Study(name="s"), tmp_path / "out", SiteOptions([mended]), Machine(), tmp_path, lambda news: None)
    assert [*nodes] == ["a", "b"]
