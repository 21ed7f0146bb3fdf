"""Made-up sites: every patient at one, every case kept, the same for the same seed, less alike as alpha falls."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.data.listing import list_cases
from fedclient.site import open_site
from shared_models.errors import StudyInvalid
from shared_models.study import Model, Study
from shared_models.task_table import Task
from simulations.engine import NodeConfig
from simulations.partition import Partition, Person, partition_named, partitioned, people_of, split_people
from simulations.sources import pooled
from tests.toys import nodes

HOW = st.one_of(
    st.just(Partition("iid")),
    st.builds(Partition, st.sampled_from(["dirichlet", "quantity"]), st.floats(0.01, 100)),
)


def crowd(train: int, val: int, test: int, labels: int = 3) -> list[Person]:
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    return [Person(f"p{n:03d}", split, f"class {n % labels}", (f"{n}a", f"{n}b")) for n, split in enumerate(splits)]


@given(HOW, st.integers(1, 6), st.integers(6, 40), st.integers(0, 12), st.integers(6, 20), st.integers(0, 99))
def test_every_patient_is_at_one_site_and_every_site_trains_and_tests(how, sites, train, val, test, seed):
    people = crowd(train, val, test)
    parts = split_people(people, how, sites, seed)
    assert sorted(p.who for part in parts for p in part) == [p.who for p in people]
    for part in parts:
        assert {"train", "test"} <= {p.split for p in part}
        assert val < sites or any(p.split == "val" for p in part)


@given(HOW, st.integers(0, 99), st.randoms())
def test_the_order_in_which_patients_are_listed_says_nothing(how, seed, random):
    people = crowd(20, 5, 10)
    shuffled = random.sample(people, k=len(people))
    assert split_people(people, how, 4, seed) == split_people(shuffled, how, 4, seed)


def test_another_seed_is_another_partition():
    people = crowd(40, 10, 20)
    assert split_people(people, Partition("iid"), 4, 0) != split_people(people, Partition("iid"), 4, 1)


def unevenness(how: Partition, seed: int) -> float:
    """Mean distance in variation between the classes of a site's training patients and those of all."""
    parts = split_people(crowd(300, 30, 60), how, 5, seed)
    mixes = []
    for part in parts:
        count = Counter(p.label for p in part if p.split == "train")
        mixes.append([count[f"class {k}"] / sum(count.values()) for k in range(3)])
    return float(np.abs(np.array(mixes) - 1 / 3).sum(axis=1).mean() / 2)


def test_label_skew_grows_as_alpha_falls():
    skew = [np.mean([unevenness(Partition("dirichlet", a), seed) for seed in range(10)]) for a in (100, 1, 0.1)]
    assert skew[0] < 0.1 < skew[1] < skew[2]


def test_quantity_skew_grows_as_alpha_falls_and_iid_has_none():
    def largest(how: Partition) -> float:
        sizes = [[len(part) for part in split_people(crowd(300, 30, 60), how, 5, seed)] for seed in range(10)]
        return float(np.mean([max(of) / sum(of) for of in sizes]))

    shares = [largest(how) for how in (Partition("iid"), Partition("quantity", 10), Partition("quantity", 0.2))]
    assert shares[0] == pytest.approx(0.2, abs=0.01)
    assert shares[0] < shares[1] < shares[2]


def test_too_few_patients_are_told_with_how_many_sites_they_make():
    with pytest.raises(StudyInvalid, match=r"there are 3 patients of split test, .* at most 3 sites"):
        split_people(crowd(9, 1, 3), Partition("iid"), 4, 0)


@pytest.mark.parametrize("text", ["dirichlet", "dirichlet:0", "dirichlet:-1", "iid:2", "label:1", "quantity:x"])
def test_an_unknown_partition_is_refused_with_what_is_allowed(text):
    with pytest.raises(StudyInvalid, match="allowed are natural, iid, dirichlet:ALPHA and quantity:ALPHA"):
        partition_named(text)


def test_a_partition_is_read_from_its_name():
    assert partition_named("dirichlet:0.1") == Partition("dirichlet", 0.1)


STUDY = Study(name="toy", task=Task(kind="classification", labels=("nodule",)), model=Model(name="resnet18"), seed=3)


def table(folder: Path) -> None:
    """Three hospitals' patients with classes, two images each."""
    rows = ["site,patient_id,image,mask,split,label"]
    for n in range(24):
        for image in "ab":
            (folder / f"{n}{image}.png").write_bytes(b"\x89PNG")
            split = ("train", "train", "val", "test")[n % 4]
            rows.append(f"s{n % 3},p{n:02d},{n}{image}.png,,{split},{'nodule' if n % 2 else 'none'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def test_made_up_sites_share_the_cases_of_a_table_and_pooled_training_has_them_all(tmp_path):
    table(tmp_path)
    real = {s: {**c, "manifest-site": s} for s, c in nodes(["s0", "s1", "s2"], tmp_path).items()}
    said: list[str] = []
    made = partitioned(STUDY, real, partition_named("dirichlet:0.5"), 4, tmp_path / "out", said.append)

    def keys(config: NodeConfig) -> list[str]:
        site = open_site(config)
        return [case.key for case in list_cases(site.where, site.salt).cases]

    of_all = sorted(key for config in real.values() for key in keys(config))
    assert sorted(key for config in made.values() for key in keys(config)) == of_all
    assert len(of_all) == 48
    assert sorted(keys(pooled([*made.values()]))) == of_all
    assert [line.partition(":")[0] for line in said] == ["part-01", "part-02", "part-03", "part-04"]
    [written] = (tmp_path / "out").glob("partition-*.json")
    assert "p00" not in written.read_text()
    partitioned(STUDY, real, partition_named("dirichlet:0.1"), 4, tmp_path / "out", said.append)
    assert sorted(key for config in made.values() for key in keys(config)) == of_all
    assert len({*(tmp_path / "out").glob("partition-*.json")}) == 2, "the sites of a run that goes on stay as they were"


def test_classes_of_a_patient_are_those_of_all_its_images(tmp_path):
    table(tmp_path)
    people = people_of(STUDY, {"all": {**nodes(["all"], tmp_path)["all"], "manifest-site": "s0"}}, labelled=True)
    assert Counter(p.label for p in people) == {"": 4, "nodule": 4}
