"""Prediction from a table of patients, for networks that see no image: one row, one case."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedclient.data.cases import Case
from fedclient.data.tables import csv_rows
from fedclient.data.truths import covariates_of
from fedclient.predict.model import Model
from shared_models.errors import ImageUnreadable
from shared_models.tasks.decide import chances_of

MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Risk:
    """The probability that the event has come by each day, for one row of a table (the heading is row 1)."""

    name: str
    row: int
    by_day: dict[float, float]


def risks(model: Model, table: Path) -> Iterator[Risk | tuple[str, int, ImageUnreadable]]:
    """Row by row; for one that lacks a number its name, row and why.

    Raises:
        ImageUnreadable: no table that can be read, or one without the covariates of the study.
    """
    task = model.study.task
    if table.stat().st_size > MOST_BYTES:
        raise ImageUnreadable(f"the table is larger than {MOST_BYTES} bytes. Split it.", "INPUT_TOO_LARGE")
    named = sha256(table.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    try:
        lines = csv_rows(table.read_bytes())
    except csv.Error as e:
        raise ImageUnreadable(f"the table: {e}", "IMAGE_UNREADABLE") from None
    heading = [column.strip() for column in lines[0]] if lines else []
    wanted = [covariate.column for covariate in task.covariates]
    lacking = [column for column in wanted if column not in heading]
    if lacking:
        raise ImageUnreadable(
            f"the table has no column {lacking[0]!r}, which the network sees. It wants: {', '.join(wanted)}.",
            "LABEL_MISSING",
        )
    if twice := [column for column in wanted if heading.count(column) > 1]:
        raise ImageUnreadable(f"the table has the column {twice[0]!r} twice. Remove one.", "LABEL_UNREADABLE")
    for row, values in enumerate(lines[1:], start=2):
        if not any(value.strip() for value in values):
            continue
        name, line = f"row-{named}-{row}", dict(zip(heading, values, strict=False))
        if len(values) != len(heading):  # its numbers may stand below other columns
            what = f"it has {len(values)} fields, the heading {len(heading)}. Quote fields with commas."
            yield name, row, ImageUnreadable(what, "LABEL_UNREADABLE")
            continue
        facts = {column: line[column] for column in wanted if line.get(column)}
        case = replace(Case(name, "", (), None, "test"), facts=facts, row=row)
        try:
            seen = covariates_of(case, task)[None]
        except ImageUnreadable as e:
            yield name, row, e
            continue
        logits = model.through(seen)
        if model.temperatures is not None:
            logits = logits / model.temperatures
        came = 1 - np.cumprod(1 - chances_of(task, logits).astype(np.float64), axis=1)[0]
        yield Risk(name, row, dict(zip(map(float, task.intervals_days), came.tolist(), strict=True)))
