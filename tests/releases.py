"""Small releases for tests: a tiny network with made-up weights, signed by an authority of the test's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedserver.publish.card import Words, card
from fedserver.publish.making import Recipe, make_release
from shared_models.identity import Credential, issue_signer, new_authority
from shared_models.nets import initial_weights
from shared_models.parse import parse
from shared_models.release import Origin, Trust
from shared_models.study import Study, sha256
from shared_models.weights import Arrays

TINY: dict[str, Any] = {
    "name": "tiny-lung",
    "title": "Lungs on CT, for tests",
    "model": {"name": "unet", "features": [8, 8, 8, 8, 8, 8], "groups": 4},
    "preprocess": {"size": [32, 32]},
}


def tiny_study(**tables: Any) -> Study:
    """The tiny segmentation of lungs; a keyword takes the place of one of its tables."""
    return parse(Study, TINY | tables, "tiny study")


def authority() -> tuple[Credential, Credential]:
    """A certificate authority and a coordinator's key that it vouches for."""
    ca = new_authority("test federation")
    return ca, issue_signer(ca)


def recipe(study: Study | None = None, weights: Arrays | None = None, **change: Any) -> Recipe:
    study = study or tiny_study()
    ca, signer = authority()
    origin = Origin(
        kind="federation", federation="test federation", run="tiny-1", round=2, made_at=1.8e9,
        study_sha256=sha256(study), weights_sha256="0" * 64, sites={"north": 2, "south": 1},
    )  # fmt: skip
    told = card(study, "1", facts(study), Words(), None, {}, "federation")
    made = Recipe(study, weights or initial_weights(study), "1", origin, signer, ca.certificate, ca.certificate, told)
    return replace(made, **change)


def facts(study: Study) -> dict[str, Any]:
    """Those of the report of a run of two rounds over two sites, tested on 20 patients of each."""
    rows = {
        "north": {"measure": "dice", "dice": 0.9, "value": 0.9, "deviation": 0.1, "cases": 20},
        "south": {"measure": "dice", "dice": 0.8, "value": 0.8, "deviation": 0.2, "cases": 20},
    }
    whole = {"measure": "dice", "dice": 0.85, "value": 0.85, "deviation": 0.166, "cases": 40}
    test = {"sites": rows, "all_cases": whole, "worst": "south", "gap": 0.1}
    return {
        "rounds": [{"sites": {"north": {}, "south": {}}}],
        "rounds_done": 2,
        "rounds_planned": 2,
        "finished": True,
        "sites": ["north", "south"],
        "test": {label: test for label in study.task.answers},
        "not_tested": {},
        "measure": {"key": "dice", "name": "Dice"},
    }


def made_release(
    folder: Path, study: Study | None = None, weights: Arrays | None = None, **change: Any
) -> tuple[Path, Trust]:
    """A release as a folder below `folder`, and the trust that opens it."""
    from_what = recipe(study, weights, **change)
    manifest = make_release(from_what, folder / "tiny-release")
    assert manifest.origin == from_what.origin
    return folder / "tiny-release", Trust((from_what.authority,))
