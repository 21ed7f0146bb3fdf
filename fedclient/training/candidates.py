"""What a run of a detection finds, as the tables of points that LUNA16's evaluation reads; they stay where the data is.

OUT/SITE/LABEL.csv     seriesuid,coordX,coordY,coordZ,probability; LPS mm, the most probable of a case first
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fedclient.data.cases import Case, Split, read_case
from fedclient.data.lesions import centres_lps_mm
from fedclient.gate.run import usable_cases
from fedclient.site import Site
from fedclient.training.explaining import Trained
from fedclient.training.windows import logits
from shared_models.errors import StudyInvalid
from shared_models.files import write_atomic
from shared_models.preprocess import preprocess
from shared_models.study import Study
from shared_models.tasks.chosen import functions_of

COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability")
Row = tuple[str, float, float, float, float]


def candidates(model: Trained, site: Site, split: Split, least: float, out: Path) -> dict[str, int]:
    """Writes a table for each label, of labelled cases and others; label -> rows.

    Args:
        least: probability below which nothing is listed.

    Raises:
        StudyInvalid: the model detects nothing.
    """
    study = model.study
    if study.task.kind != "detection":
        raise StudyInvalid(f"candidates are of a detection; the run's task is a {study.task.kind}")
    (net,) = model.nets(most=1)
    tables: dict[str, list[Row]] = {label: [] for label in study.task.labels}
    for case in sorted(usable_cases(site), key=series_of):
        if case.split == split and case.channels:
            for label, row in _found(net, case, study):
                if row[-1] >= least:
                    tables[label].append(row)
    for label, rows in tables.items():
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((uid, *(f"{mm:.4f}" for mm in place), f"{chance:.6g}") for uid, *place, chance in rows)
        write_atomic(out / f"{label}.csv", stream.getvalue().encode())
    return {label: len(rows) for label, rows in tables.items()}


def series_of(case: Case) -> str:
    """What a table calls an image: the UID of its DICOM series, or as LUNA16 and tables name it."""
    series = case.channels[0].series if case.channels else None
    return case.patient if series is None else series.uid


@torch.inference_mode()
def _found(net: nn.Module, case: Case, study: Study) -> Iterator[tuple[str, Row]]:
    volume, task = read_case(case, study.channels), functions_of(study.task)
    assert task.located is not None, "of a detection"
    examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
    answer = task.chances(logits(net, examples.images, study, torch.device("cpu"))).numpy()
    marks = task.located(answer, examples.geometry)
    for mark, (x, y, z) in zip(marks, centres_lps_mm(marks[:, 2:5], volume.affine_ras), strict=True):
        yield study.task.labels[int(mark[0]) - 1], (series_of(case), float(x), float(y), float(z), float(mark[1]))
