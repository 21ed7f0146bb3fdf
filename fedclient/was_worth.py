"""What a federation was worth at this hospital: its own model, trained here now, beside what the run has left here.

    site/worth/<study>/alone-<plan>/   the training of the site's own model, resumed where it was interrupted
    site/worth/<study>/worth.html, worth.json

All of it stays here: nothing is asked of the coordinator and nothing is sent. What the site tells itself holds no score
of a patient, and names no other site, of which it knows none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedclient.alone import Told, plain_study, train_alone
from fedclient.comparing import Kind, compared
from fedclient.consent import Asked
from fedclient.gate.run import usable_cases
from fedclient.memory import FINAL, final_study, memory_folder
from fedclient.site import Site
from fedclient.worth import AnyScores
from fedclient.worth_page import CALIBRATION, Page, sentence, texts, worth_page
from shared_models.errors import StateInvalid
from shared_models.figure_text import value_text
from shared_models.files import locked, private_folder, write_atomic, write_json
from shared_models.protect.privacy import Protect
from shared_models.scores import NAMES, measure_of, row_of, value_in
from shared_models.study import Study, sha256
from shared_models.weights import Arrays, load

NAMED = {
    "local": "alone, this hospital's own",
    "federated": "the federation's",
    "personalised": "this hospital's of it",
}


@dataclass(frozen=True, slots=True)
class Left:
    """What a run has left at the site.

    Attributes:
        study: as it was trained, its plan in it.
        personalised: the site's own model of the federation, where the study gives it one.
    """

    run: str
    study: Study
    federated: Arrays
    personalised: Arrays | None


def left_of(site: Site, asked: Asked, run: str = "") -> Left:
    """What the last finished run of a study has left here, or one by its name.

    Raises:
        StateInvalid: this site did not take part, or no run of it is finished.
    """
    if asked.decision is None or asked.decision.verdict == "refused":
        raise StateInvalid(f"study {asked.study.name!r}: this site has not taken part in it ({asked.state}).")
    names = (asked.sha256, asked.sha256[:16])  # and as an earlier version has named it
    found = [path for name in names for path in site.folder.glob(f"states/*-{name}/{site.name}/{FINAL}")]
    known = sorted(found, key=_time)
    runs = {path.parent.parent.name.rsplit("-", 1)[0]: path for path in known}
    if run and run not in runs:
        raise StateInvalid(f"run {run!r}: has left nothing here. Known: {', '.join(runs) or 'none'}.")
    if not runs:
        raise StateInvalid(
            f"study {asked.study.name!r}: no run of it was finished with this site. Its last weights come with the "
            f"test after the last round; wait for that."
        )
    name = run or list(runs)[-1]
    folder = memory_folder(site, name, asked.sha256)
    own = sorted(folder.glob("own-*.safetensors"), key=_time)
    return Left(name, final_study(folder), load(folder / FINAL), load(own[-1]) if own else None)


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def judge(site: Site, asked: Asked, run: str, weights: Path | None, told: Told) -> tuple[dict[str, Any], Path]:
    """Trains the site's own model where that is not done yet, scores all on the site's test patients, writes the page.

    Args:
        weights: the file that the study begins from, where it names one.

    Returns what worth.json holds, and the path of the page.

    Raises:
        StateInvalid: see `left_of`; no test patients.
        StudyInvalid: the study begins from a file that was not given, or from another.
        OrderRefused: no training cases, or training that diverges.
    """
    from fedclient.training.learner import ImageLearner
    from fedclient.training.scoring import score_cases
    from shared_models.pretrained import first_weights

    left = left_of(site, asked, run)
    folder = site.folder / "worth" / asked.sha256[:16]
    private_folder(folder)
    # noise protects what leaves, and nothing of this model does
    alone = replace(plain_study(left.study), protect=Protect())
    with locked(folder / ".lock"):
        first = first_weights(alone, weights)[0]
        mine = train_alone(site, alone, first, alone_folder(folder, alone), ImageLearner(), told)
        models = usable_models(left, alone, mine)
        rows, scores, order, label = {}, dict[tuple[Kind, str], list[AnyScores]](), list[str](), ""
        for kind, (study, tensors) in models.items():
            counts, of_cases, order = score_cases(site, study, tensors, "test")
            label = next(iter(counts))  # the first that this site can tell
            rows[kind] = row_of(counts[label])
            scores[kind, ""] = [of_cases]
        if not order:
            raise StateInvalid(f"{site.data}: no labelled case for test, so nothing can be told. Keep some aside.")
        cases = {case.key: case for case in usable_cases(site)}
        worth, groups = compared(site.name, scores, [cases[key] for key in order])
        found = {
            "study": left.study.name,
            "study_sha256": asked.sha256,
            "run": left.run,
            "measure": measure_of(left.study.task),
            "label": label,
            "models": {kind: {**rows[kind], **_told(worth, kind)} for kind in models},
            "groups": groups,
        }
        page = page_of(site.name, left.study, found)
        found["answer"] = sentence(page.row, page.shown)
        write_json(folder / "worth.json", found)
        write_atomic(folder / "worth.html", worth_page(page).encode())
    return found, folder / "worth.html"


def alone_folder(folder: Path, study: Study) -> Path:
    """Where a site's own model of a study is trained: another plan of it, of another run, is another model."""
    return folder / f"alone-{sha256(study)[:12]}"


def usable_models(left: Left, alone: Study, mine: Arrays) -> dict[Kind, tuple[Study, Arrays]]:
    """What this site could use: its own model, the federation's, and that of the federation which is its own.

    Not the federation's where layers of it stay at the sites and this one has them: without them it answers nothing.
    """
    models: dict[Kind, tuple[Study, Arrays]] = {"local": (alone, mine)}
    if left.personalised is None or not left.study.personal.keep:
        models["federated"] = left.study, left.federated
    if left.personalised is not None:
        models["personalised"] = left.study, left.personalised
    return models


def _told(worth: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    line = next(line for line in worth if line["kind"] == kind)
    return {key: value for key, value in line.items() if key not in ("kind", "setting")}


def page_of(name: str, study: Study, found: Mapping[str, Any]) -> Page:
    """The site's page: the answer is about its own model of the federation, where it has one."""
    shown = "personalised" if "personalised" in found["models"] else "federated"
    rows = [
        {
            "name": NAMED[kind],
            "here": value_text(value_in(of)),
            "everywhere": "",
            "calibration": {figure: value_text(of.get(figure)) for figure in CALIBRATION[found["measure"]]},
            **texts(of),
        }
        for kind, of in found["models"].items()
    ]
    groups = [{**texts(each), "group": each["group"], "name": NAMED[each["kind"]]} for each in found["groups"]]
    row = texts(found["models"][shown])
    title = study.title or study.name
    return Page(name, title, found["measure"], 1, row, NAMED[shown], rows, groups, label=found["label"])


def in_words(found: Mapping[str, Any]) -> str:
    """For the terminal."""
    what = f"{NAMES[found['measure']]} of {found['label']}"
    lines = [f"{found['study']}, run {found['run']}: {what} on this hospital's test patients."]
    for kind, of in found["models"].items():
        told = texts(of)
        less = f"{told['value']} ({told['interval']})  {told['verdict']}" if kind != "local" else ""
        lines.append(f"  {NAMED[kind]:28} {value_text(value_in(of))}  worst tenth {told['worst']}  {less}".rstrip())
    harmed = [f"{each['group']} by {NAMED[each['kind']]}" for each in found["groups"] if each["verdict"] == "harmed"]
    if harmed:
        lines.append(f"  Harmed groups of patients: {', '.join(harmed)}.")
    return "\n".join([*lines, found["answer"]])
