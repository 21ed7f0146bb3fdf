"""The predicting process: opens a release, and answers one folder of received files after the other.

    python -m fedclient.serving.worker RELEASE --site FOLDER [--authority FILE]... [--research] [--device cpu]

JSON lines on standard input and output. Whatever is wrong with a file is told by its code; a fault of this package is
told by where it happened, because words of other packages may quote a header.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fedclient.device_errors import DEVICE_FAILED
from fedclient.drift import note
from fedclient.predict.case import Prediction, predict_case
from fedclient.predict.heap import give_back
from fedclient.predict.inputs import Source, Unread, list_inputs
from fedclient.predict.model import Model, load_model
from fedclient.predict.outputs import write_case
from fedclient.serving.logs import own_lines_only, where
from fedclient.serving.view import colours, write_view
from fedclient.trust import Watch, groups_of, trust_in
from shared_models.errors import DeviceFailed, FederationError, ImageUnreadable, ReleaseInvalid, ReleaseRetired
from shared_models.release import open_release

FORMATS = ("seg", "sr", "sc", "nifti", "json")
MOST_IMAGES = 64  # of one case
KIND = {".dcm": "dicom", ".png": "picture", ".json": "facts"}

log = logging.getLogger("fedclient.serving")


def answered(model: Model, folder: Path, site: Path, view: bool, count: bool) -> dict[str, Any]:
    """What the files in `folder`/in come to; results lie in `folder`/out.

    Args:
        view: a person looks at it on the page; else it is a series from PACS, withheld where a part cannot be read.
        count: what was seen counts for drift, unless it is withheld.

    Raises:
        DeviceFailed: no other case would fare better in this process.
    """
    images: list[dict[str, Any]] = []
    unread: list[dict[str, str]] = []
    try:
        found = list_inputs([folder / "in"], model.study).found
    except ImageUnreadable as error:
        found = []
        unread.append({"code": error.code, "why": str(error)})
    for n, each in enumerate(found[:MOST_IMAGES]):
        if isinstance(each, Unread):
            unread.append({"code": each.code, "why": each.why})
            continue
        try:
            images.append(_one(model, each, f"image-{n + 1}", folder / "out", view))
        except DeviceFailed:
            raise
        except FederationError as error:
            unread.append({"code": getattr(error, "code", "CASE_UNREADABLE"), "why": str(error)})
            continue
    if len(found) > MOST_IMAGES:
        unread.append({"code": "INPUT_TOO_LARGE", "why": f"more than {MOST_IMAGES} images were sent at once."})
    for image in images:
        cells = image.pop("cells")
        if count and (view or not unread):
            note(site, model.study, model.digest, cells)
    return {"images": images, "unread": unread}


def _one(model: Model, source: Source, name: str, out: Path, view: bool) -> dict[str, Any]:
    prediction = predict_case(model, source)
    written, missing = write_case(prediction, name, out, FORMATS, overwrite=True)
    planes = write_view(prediction, source, out / name) if view else []
    return {
        "name": name,
        "answers": [_told(each) for each in _facts(prediction)],
        "doubts": [asdict(doubt) for doubt in prediction.doubts],
        "seconds": round(prediction.seconds, 3),
        "files": [{"file": f"{name}/{file}", "kind": KIND.get(Path(file).suffix, "mask")} for file in written],
        "missing": missing,
        "planes": planes,
        "cells": dict(prediction.cells),
    }


def _facts(prediction: Prediction) -> list[dict[str, Any]]:
    from fedclient.predict.results import facts

    found: list[dict[str, Any]] = facts(prediction)["answers"]
    return found


def _told(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without the list of its parts, which is in result.json."""
    return {key: value for key, value in answer.items() if key != "largest"}


def rss_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(model: Model, site: Path, watch: Watch, orders: TextIO, answers: TextIO) -> None:
    """Answers orders until there are no more or the GPU has failed, none once the release is retired: a list may be
    handed in meanwhile. What a list gives cause to say is logged once."""
    told: list[str] = []
    ends = False
    for line in orders:
        order = json.loads(line)
        try:
            if (warnings := watch.warnings()) != told:
                told = warnings
                for words in warnings:
                    log.warning("%s", words)
            said = answered(model, Path(order["folder"]), site, bool(order.get("view")), bool(order.get("count")))
        except ReleaseInvalid as error:
            log.error("the release is not used any more: %s", error)
            code = "RELEASE_RETIRED" if isinstance(error, ReleaseRetired) else "RELEASE_NOT_CLEARED"
            said = {"images": [], "unread": [{"code": code, "why": str(error)}]}
        except DeviceFailed as error:
            log.error("the predicting process ends: %s", error)
            ends, said = True, {"images": [], "unread": [{"code": DEVICE_FAILED, "why": str(error)}]}
        except Exception as error:  # a fault of ours, or of a library over a hostile file: the next case may be sound
            log.error("a case failed: %s", where(error))
            said = {"images": [], "unread": [{"code": "INTERNAL", "why": f"a fault over this case ({where(error)})."}]}
        answers.write(json.dumps(said | {"rss_bytes": rss_bytes(), "ends": ends}) + "\n")
        answers.flush()
        if ends:
            return


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fedclient.serving.worker", description=__doc__)
    parser.add_argument("release", type=Path)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--authority", type=Path, action="append", default=[])
    parser.add_argument("--status", type=Path)
    parser.add_argument("--research", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args(arguments)
    own_lines_only()
    give_back()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        trust = trust_in(asked.site, asked.authority, asked.research)
        release = open_release(asked.release, trust)
        watch = Watch(asked.site, release, groups_of(asked.site, asked.authority), asked.status)
        warnings = watch.warnings()
        model = load_model(release, asked.device, asked.threads)
    except FederationError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()
        sys.exit(1)
    facts = {
        "name": model.name, "version": model.version, "sha256": model.digest, "engine": model.engine,
        "study": model.study.name, "title": model.study.title, "task": model.study.task.kind,
        "answers": list(model.study.task.answers), "modality": model.study.modality,
        "warnings": warnings, "channels": list(model.study.channels), "reference": bool(model.fingerprint),
        "colours": colours(len(model.study.task.answers)),
    }  # fmt: skip
    answers.write(json.dumps({"model": facts}) + "\n")
    answers.flush()
    own_lines_only(silent=True)
    serve(model, asked.site, watch.later(), sys.stdin, answers)


if __name__ == "__main__":
    main()
