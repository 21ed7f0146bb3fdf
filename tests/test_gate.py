"""The readiness gate: what each fault is called, what is kept between two looks, and who may pass it."""

import json
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedclient.data.cases import Case, Channel
from fedclient.data.findings import CATALOGUE
from fedclient.data.identifiers import identifying_path
from fedclient.gate import ready as gate
from fedclient.gate import run
from fedclient.gate.across import together, torn_patients
from fedclient.gate.facts import Looked, Needs, Seen, needs_of
from fedclient.gate.inspect import look_at
from fedclient.gate.page import render
from fedclient.gate.pixels import bands, shrunk
from fedclient.gate.pool import Setting, looks
from fedclient.gate.run import Checked, check, standing
from fedclient.gate.waivers import excluded, read_waivers, waive, withdraw
from fedclient.site import Site
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import read_lines, write_atomic
from shared_models.study import Study, canonical, sha256
from shared_models.wire import Order, pack, read_reply, write_order
from simulations.bench.gate import site_of, tried
from simulations.fixtures.faults import FAULTS
from simulations.fixtures.sown import LUNG, Fault, Set, person
from simulations.phantoms import nifti
from tests.toys import Clock

REASON = "looked at by two radiologists"
SLOW = ("front and back exchanged", "film on its side", "film upside down")  # they need ten cases
SEEN = (
    "mask mirrored in its header", "qform mirrored beside the sform", "letters in a film", "letters in a CT series",
)  # fmt: skip
FAST = [fault for fault in FAULTS if fault.name not in (*SLOW, *SEEN)][::6] + [f for f in FAULTS if f.name in SEEN]
NEEDS = needs_of(LUNG)


def healthy(root: Path, train: int = 3, test: int = 1) -> Set:
    made = Set(root / "data")
    for n in range(train + test):
        made.nifti(n, split="train" if n < train else "test")
    return made


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A deployed site with four sound patients."""
    healthy(tmp_path).finish()
    return replace(site_of(tmp_path / "data", tmp_path / "site"), deployed=True, salt="secret", smallest_count=11)


def spoil(site: Site, row: int = 2) -> None:
    """Blanks the image of one row."""
    number = row - 2
    blank = np.full(person(0).volume.voxels[0].shape, -1000, np.int16)
    write_atomic(site.data / f"images/{number}.nii.gz", nifti(blank, person(number).volume.affine_ras))


def order(kind: str = "train", round_number: int = 1) -> Order:
    study = canonical(LUNG).decode()
    return Order(kind, "lung-1", round_number, 1, study, sha256(LUNG), "b" * 64)  # type: ignore[arg-type]


def ready(of: Order, site: Site, study: Study) -> None:
    gate.ready(of, site, study, processes=0)


def codes(found: Checked) -> set[str]:
    return {f.code for f in found.findings}


# Faults


@pytest.mark.parametrize("fault", FAST, ids=lambda fault: fault.name)
def test_a_fault_gets_its_code_and_no_other_case_is_blocked(fault: Fault, tmp_path: Path) -> None:
    row = tried(fault, tmp_path)
    assert fault.code in row.found
    assert row.silent_on_the_rest


def test_the_corpus_has_sixty_faults_of_codes_that_the_catalogue_knows() -> None:
    assert len(FAULTS) >= 60
    assert {fault.code for fault in FAULTS} <= CATALOGUE.keys()
    of_a_layout = {"SERIES_LEFT_OUT", "SERIES_SEVERAL", "LABEL_ORPHAN", "PATIENT_UNKNOWN", "CHANNELS_APART"}
    in_time = {"IO_TIMEOUT", "DATASET_CHANGED"}
    assert CATALOGUE.keys() - {fault.code for fault in FAULTS} == of_a_layout | in_time


def test_sound_data_are_ready_and_only_their_small_number_is_told(site: Site) -> None:
    found = check(site, NEEDS)
    assert found.ready
    assert [(f.code, f.severity) for f in found.findings] == [("DATASET_TOO_SMALL", "warn")]
    assert found.plain()["splits"]["train"] == {"cases": 3, "patients": 3, "labelled": 3}


def test_without_a_study_no_label_is_asked_for(tmp_path: Path) -> None:
    made = healthy(tmp_path)
    made.nifti(5, lung=person(5).lung * 9)
    made.rows[0]["mask"] = ""
    here = site_of(made.finish(), tmp_path / "site")
    assert not codes(check(here, Needs())) & {"LABEL_MISSING", "LABEL_VALUES", "MODALITY_MISMATCH"}
    assert codes(check(here, NEEDS)) >= {"LABEL_MISSING", "LABEL_VALUES"}


def test_a_case_without_labels_stops_nobody(tmp_path: Path) -> None:
    made = healthy(tmp_path)
    made.nifti(5, hu=np.full(person(5).volume.voxels[0].shape, -1000, np.int16))
    made.rows[-1]["mask"] = ""
    found = check(site_of(made.finish(), tmp_path / "site"), NEEDS)
    assert found.ready
    assert ("INTENSITY_INVALID", "warn") in {(f.code, f.severity) for f in found.findings}


@pytest.mark.parametrize("same_patient", [False, True])
def test_one_mask_copied_for_the_image_of_another_patient_is_told(tmp_path: Path, same_patient: bool) -> None:
    made = Set(tmp_path / "data")
    made.nifti(0, patient="p")
    made.nifti(1, patient="p" if same_patient else "q", lung=person(0).lung)
    for n in (2, 3):  # nothing drawn is no copy
        made.nifti(n, lung=person(n).lung * 0)
    found = check(site_of(made.finish(), tmp_path / "site"), NEEDS)
    told = [(f.row, f.severity) for f in found.findings if f.code == "DUPLICATE"]
    assert told in ([[]] if same_patient else [[(2, "warn")], [(3, "warn")]])


def test_a_patient_of_two_splits_is_told_for_the_case_that_is_not_trained_on() -> None:
    cases = [Case(f"{n:016x}", "same", (Channel(),), None, split) for n, split in enumerate(("train", "val", "test"))]  # type: ignore[arg-type]
    assert [(f.case[-1], f.severity) for f in torn_patients(cases)] == [("1", "block"), ("2", "block")]
    assert not list(torn_patients(cases[:1] * 3))


@pytest.mark.parametrize(
    ("trained", "tested", "told"),
    [("P001", "p001", True), ("P001", "P-001", True), ("P-007", "p 7", True), ("Müller", "MÜLLER", True),
     ("Müller", "Möller", False), ("1-11", "11-1", False), ("P1", "P10", False), ("王伟", "李娜", False)],
)  # fmt: skip
def test_patients_of_two_splits_who_may_be_one_are_told_and_stop_nobody(trained: str, tested: str, told: bool) -> None:
    pair = zip("01", (trained, tested), ("train", "test"), strict=True)
    cases = [Case(n * 16, patient, (Channel(),), None, split) for n, patient, split in pair]  # type: ignore[arg-type]
    seen = [Seen(case, Looked("", None, ())) for case in cases]
    found = [each for each in together(seen, Needs()) if each.code == "LEAKAGE_PATIENT"]
    assert [(each.case, each.severity) for each in found] == [("1" * 16, "warn")] * told
    assert not any(name in each.what for each in found for name in (trained, tested))


@pytest.mark.parametrize(
    ("path", "words", "told"),
    [
        ("images/case-07.nii.gz", (), ""),
        ("1.3.6.1.4.1.14519.5.2.1.19600229/1.2.840.10008.20200101/7.dcm", (), ""),
        ("subset0/1-001.dcm", (), ""),
        ("Doe^Jane/1.dcm", (), "a person's name"),
        ("Doe, Jane/1.dcm", (), "a person's name"),
        ("scan_19600229/1.dcm", (), "a date"),
        ("29.02.1960/1.dcm", (), "a date"),
        ("a/jane_2.dcm", ("jane",), "from the header"),
        ("a/MRN-4711-b.dcm", ("mrn4711",), "from the header"),
        ("a/june_2.dcm", ("jane",), ""),
    ],
)
def test_a_path_that_names_somebody_is_told_without_the_name(path: str, words: tuple[str, ...], told: str) -> None:
    assert told in identifying_path(path, words)
    assert bool(identifying_path(path, words)) == bool(told)


def test_boxes_may_cut_through_voxels() -> None:
    values = np.arange(5, dtype=np.float32)
    assert shrunk(values, (2,)).tolist() == pytest.approx([(0 + 1 + 0.5 * 2) / 2.5, (0.5 * 2 + 3 + 4) / 2.5])
    assert shrunk(values, (5,)).tolist() == values.tolist()
    assert shrunk(np.arange(64, dtype=np.float32), (2,)).tolist() == [15.5, 47.5]


def test_a_perceptual_hash_is_kept_under_the_secret_and_a_flat_image_has_none() -> None:
    image = np.random.default_rng(0).random((40, 40, 1), np.float32)
    assert bands(image, "one") == bands(image, "one")
    assert not set(bands(image, "one")) & set(bands(image, "two"))
    assert set(bands(image * 0, "one")) == {None}


# What is kept


def test_a_second_run_looks_at_what_changed_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check(site, NEEDS)
    again = check(site, NEEDS)
    assert (first.anew, again.anew) == (4, 0)
    assert again.findings == first.findings
    spoil(site)
    changed = check(site, NEEDS)
    assert changed.anew == 1
    assert [f.row for f in changed.blocking] == [2]
    assert check(site, replace(NEEDS, labels=("lung", "nodule"))).anew == 4  # another study needs other checks
    monkeypatch.setattr("fedclient.gate.facts.VERSION", 99)
    assert check(site, NEEDS).anew == 4


def test_a_result_that_is_spoilt_is_looked_at_again(site: Site) -> None:
    check(site, NEEDS)
    kept = sorted((site.folder / "gate" / "cases").rglob("*.json"))
    kept[0].write_bytes(b"{}")
    kept[1].write_bytes(kept[1].read_bytes()[:50])
    assert check(site, NEEDS).anew == 2


def test_what_is_kept_is_its_owners_alone(site: Site) -> None:
    waive(site.folder, "SERIES_GAP", "", REASON, exclude=False)
    check(site, NEEDS)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (site.folder / "gate").rglob("*") if path.is_file()}
    assert modes == {0o600}


def test_rows_that_moved_are_told_as_they_are_now(site: Site) -> None:
    spoil(site)
    check(site, NEEDS)
    table = (site.data / "manifest.csv").read_text().splitlines()
    (site.data / "manifest.csv").write_text("\n".join([table[0], table[2], table[1], *table[3:]]) + "\n")
    found = check(site, NEEDS)
    assert (found.anew, [f.row for f in found.blocking]) == (0, [3])


def test_a_file_that_hangs_costs_one_case_and_not_the_check(site: Site, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    sound = run.listed(site).cases[0]
    hanging = replace(sound, key="f" * 16, channels=(Channel(files=(tmp_path / "pipe",)),))
    setting = Setting(site.data, NEEDS, "secret")
    seen = {case.key: looked for case, looked in looks([hanging, sound], setting, 2, site.go_on, patience_s=2.0)}
    assert [f.code for f in seen["f" * 16].findings] == ["IO_TIMEOUT"]
    assert seen[sound.key] == look_at(sound, site.data.resolve(), NEEDS, "secret")


def out_of_time() -> None:
    raise OrderRefused("TRAIN_TIMEOUT", "the order has taken more than 60 s")


def test_a_check_that_outlives_its_order_is_refused_and_what_it_has_seen_is_kept(site: Site) -> None:
    limit = Clock()

    def go_on() -> None:
        if limit() > 1060.0:
            out_of_time()

    with pytest.raises(OrderRefused) as refused:
        check(replace(site, go_on=go_on), NEEDS, progress=lambda done, _of: limit.sleep(35.0))
    assert refused.value.code == "TRAIN_TIMEOUT"
    assert check(site, NEEDS).anew == 2, "35 s a case: two of four were seen"


def test_an_order_whose_time_is_over_waits_for_no_file_that_hangs(site: Site, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    hanging = replace(run.listed(site).cases[0], channels=(Channel(files=(tmp_path / "pipe",)),))
    began = time.monotonic()

    def go_on() -> None:
        if time.monotonic() > began + 2.0:
            out_of_time()

    with pytest.raises(OrderRefused, match="more than 60 s"):
        list(looks([hanging], Setting(site.data, NEEDS, "secret"), 1, go_on))
    assert time.monotonic() - began < 60.0, "a case has two minutes by itself"


def test_a_reader_that_fails_in_a_way_that_nobody_foresaw_is_a_finding(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("Jane_Doe")

    monkeypatch.setattr("fedclient.gate.inspect.read_case", fail)
    (found,) = look_at(run.listed(site).cases[0], site.data, NEEDS, "secret").findings
    assert found.code == "IMAGE_UNREADABLE"
    assert "ZeroDivisionError" in found.what
    assert "Jane" not in found.what


# Waivers


def test_a_waiver_lets_a_finding_pass_and_is_taken_back(site: Site) -> None:
    spoil(site)
    (blocking,) = check(site, NEEDS).blocking
    waive(site.folder, blocking.code, blocking.case, REASON, exclude=False)
    assert check(site, NEEDS).ready
    spoil(site, row=3)
    assert [f.row for f in check(site, NEEDS).blocking] == [3]  # of one case only
    waive(site.folder, blocking.code, "", REASON, exclude=False)
    assert check(site, NEEDS).ready
    withdraw(site.folder, blocking.code, "")
    withdraw(site.folder, blocking.code, blocking.case)
    assert len(check(site, NEEDS).blocking) == 2
    events = [line["event"] for line in read_lines(site.folder / "gate" / "log.jsonl")]
    assert events == ["waived", "waived", "withdrawn", "withdrawn"]


def test_a_case_that_is_left_out_takes_no_part(site: Site) -> None:
    spoil(site)
    (blocking,) = check(site, NEEDS).blocking
    waive(site.folder, blocking.code, blocking.case, REASON, exclude=True)
    found = check(site, NEEDS)
    assert found.ready
    assert (found.left_out, len(found.seen)) == (1, 3)
    assert excluded(read_waivers(site.folder)) == {blocking.case}
    assert blocking.case not in {case.key for case in run.usable_cases(site)}


def test_of_two_stewards_who_decide_at_once_neither_loses_a_decision(site: Site) -> None:
    codes = ("SERIES_GAP", "LABEL_EMPTY")
    with ThreadPoolExecutor(2) as stewards:
        for case in (f"{n:016x}" for n in range(20)):
            list(stewards.map(lambda code, case=case: waive(site.folder, code, case, REASON, exclude=False), codes))
    assert len(read_waivers(site.folder)) == 40
    assert len((site.folder / "gate" / "log.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("SERIES_GONE", "", REASON, False), "no code of a finding"),
        (("SERIES_GAP", "", "because", False), "needs a reason of 10"),
        (("SERIES_GAP", "", " " * 40, False), "needs a reason of 10"),
        (("SERIES_GAP", "row 2", REASON, False), "16 hexadecimal digits"),
        (("SERIES_GAP", "", REASON, True), "takes single cases out"),
    ],
)
def test_a_waiver_that_says_too_little_is_refused(site: Site, words: tuple[str, str, str, bool], told: str) -> None:
    with pytest.raises(StateInvalid, match=told):
        waive(site.folder, *words)
    assert read_waivers(site.folder) == ()


HEAD = "patient_id,image,mask,split\n"
ONE = "p0,images/0.nii.gz,masks/0.nii.gz"
NO_LISTING = {
    "MANIFEST_INVALID": "patient_id;image;mask\n",
    "PATH_ESCAPE": f"{HEAD}p0,../0.nii.gz,,train\n",
    "FILE_MISSING": f"{HEAD}p0,images/gone.nii.gz,,train\n",
    "LEAKAGE_PATIENT": f"{HEAD}{ONE},train\np0,images/1.nii.gz,,test\n",
}


@pytest.mark.parametrize("code", NO_LISTING)
def test_what_leaves_no_case_to_read_cannot_be_waived(site: Site, code: str) -> None:
    (site.data / "manifest.csv").write_text(NO_LISTING[code])
    with pytest.raises(StateInvalid, match=f"{code} cannot be waived"):
        run.check_waivable(site, code)
    waive(site.folder, code, "", REASON, exclude=False)  # decided when the table was another one
    found = check(site, NEEDS)
    assert (found.ready, found.used, {f.code for f in found.blocking}) == (False, (), {code})
    assert "waived with a reason" not in render(found, "north", (), "lung", "2026-01-01T00:00:00Z")
    assert standing(site, NEEDS).blocking == {code: 1}
    with pytest.raises(OrderRefused, match=rf"{code} \(1\)"):
        ready(order(), site, LUNG)


def test_a_site_that_has_left_out_or_cannot_read_every_case_is_not_ready(site: Site) -> None:
    waive(site.folder, "DATASET_TOO_SMALL", "", REASON, exclude=False)
    waive(site.folder, "IMAGE_UNREADABLE", "", REASON, exclude=False)
    for number in range(4):
        (site.data / f"images/{number}.nii.gz").write_bytes(b"no image")
    found = check(site, NEEDS)
    assert (found.readable, found.ready, standing(site, NEEDS).blocking) == (0, False, {"IMAGE_UNREADABLE": 4})
    for seen in found.seen:
        waive(site.folder, "IMAGE_UNREADABLE", seen.case.key, REASON, exclude=True)
    found = check(site, NEEDS)
    assert (found.left_out, found.ready, codes(found)) == (4, False, {"DATASET_TOO_SMALL"})


def test_a_waiver_that_is_not_there_cannot_be_taken_back(site: Site) -> None:
    with pytest.raises(StateInvalid, match="there is no waiver of SERIES_GAP"):
        withdraw(site.folder, "SERIES_GAP", "")


# Orders


@pytest.mark.parametrize("kind", ["train", "statistics", "evaluate"])
def test_a_node_that_never_checked_refuses_to_work_on_bad_data(site: Site, kind: str) -> None:
    spoil(site)
    with pytest.raises(OrderRefused, match=r"INTENSITY_INVALID \(1\)") as refused:
        ready(order(kind), site, LUNG)
    assert refused.value.code == "DATA_NOT_READY"
    (line,) = read_lines(site.folder / "gate" / "log.jsonl")
    assert (line["event"], line["codes"]) == ("refused", {"INTENSITY_INVALID": 1})


def test_data_that_went_bad_after_the_check_are_seen_by_the_next_order(site: Site) -> None:
    ready(order(), site, LUNG)
    spoil(site, row=4)
    with pytest.raises(OrderRefused, match="INTENSITY_INVALID"):
        ready(order(round_number=2), site, LUNG)


def test_files_that_change_during_a_run_stop_it_until_that_is_waived(site: Site) -> None:
    ready(order(), site, LUNG)
    write_atomic(
        site.data / "images/0.nii.gz", nifti(person(7).volume.voxels[0].astype(np.int16), person(0).volume.affine_ras)
    )
    for _ in range(2):
        with pytest.raises(OrderRefused, match=r"DATASET_CHANGED \(1\)"):
            ready(order(round_number=2), site, LUNG)
    waive(site.folder, "DATASET_CHANGED", "", REASON, exclude=False)
    ready(order(round_number=2), site, LUNG)
    used = [line for line in read_lines(site.folder / "gate" / "log.jsonl") if line["event"] == "used"]
    assert [(u["run"], u["round"], u["waivers"][0]["code"]) for u in used] == [("lung-1", 2, "DATASET_CHANGED")]
    ready(order(round_number=3), site, LUNG)  # the run goes on with the files as they are now
    assert len(read_lines(site.folder / "gate" / "log.jsonl")) == 4


def test_a_case_that_comes_during_a_run_does_not_stop_it_and_one_that_goes_does(site: Site) -> None:
    ready(order(), site, LUNG)
    table = (site.data / "manifest.csv").read_text()
    made = Set(site.data, rows=[{}] * 8)
    made.nifti(8)
    (site.data / "manifest.csv").write_text(table + "p90,images/8.nii.gz,masks/8.nii.gz,train\n")
    ready(order(round_number=2), site, LUNG)
    (site.data / "manifest.csv").write_text("\n".join(table.splitlines()[:-2] + table.splitlines()[-1:]) + "\n")
    with pytest.raises(OrderRefused, match=r"DATASET_CHANGED \(1\)"):
        ready(order(round_number=3), site, LUNG)


def test_a_table_that_does_not_describe_the_data_refuses_the_order_by_its_code(site: Site) -> None:
    (site.data / "manifest.csv").write_text("patient_id\nDoe\n")
    with pytest.raises(OrderRefused, match=r"MANIFEST_INVALID \(1\)"):
        ready(order(), site, LUNG)


def test_a_simulation_checks_patients_and_opens_no_image(tmp_path: Path) -> None:
    made = healthy(tmp_path)
    here = site_of(made.finish(), tmp_path / "site")
    spoil(here)
    ready(order(), here, LUNG)
    assert not (tmp_path / "site" / "gate").exists()
    table = (tmp_path / "data" / "manifest.csv").read_text()
    (tmp_path / "data" / "manifest.csv").write_text(table + "p01,masks/0.nii.gz,,test\n")
    with pytest.raises(OrderRefused, match=r"LEAKAGE_PATIENT \(1\)"):
        ready(order(), here, LUNG)


def test_the_app_that_a_hospital_runs_has_the_gate(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    import fedclient.app
    from simulations.engine import identify

    identify()
    (site.data / "manifest.csv").write_text("patient_id\nDoe\n")
    config: dict[str, bool | float | int | str] = {"site": "bench", "data": str(site.data), "work": str(site.folder)}
    sent = write_order(order(), 1, pack({}))
    reply = read_reply(fedclient.app.app(sent, Context(1, 1, config, RecordDict(), {})), "north")
    assert (reply.kind, reply.refusal) == ("refusal", "DATA_NOT_READY")
    assert "MANIFEST_INVALID" in caplog.text


def test_the_page_shows_each_finding_with_its_case_and_runs_nothing(site: Site) -> None:
    spoil(site)
    found = check(site, NEEDS)
    waiver = waive(site.folder, "LABEL_EMPTY", "", "<script>alert(1)</script>", exclude=False)
    page = render(found, "north", [waiver], "lung", "2026-01-01T00:00:00Z")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert found.blocking[0].case in page
    assert "waived with a reason" in page
    assert page.count("data:image/png;base64,") == 4  # the one with a finding, and three without
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_findings_are_told_gravest_first_as_json(site: Site) -> None:
    spoil(site)
    facts = json.loads(json.dumps(check(site, NEEDS).plain()))
    assert [f["severity"] for f in facts["findings"]] == ["block", "warn"]
    assert facts["findings"][0]["blocks"] is True
    assert (facts["ready"], facts["codes"]["INTENSITY_INVALID"], facts["looked_at"]) == (False, 1, 4)
