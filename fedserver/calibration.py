"""Of a classification: the temperature of each label by validation patients, and what it does for test patients."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from shared_models.class_counts import ClassCounts, calibrated_error, temperature
from shared_models.scores import Score
from shared_models.study import Study


def calibration(
    study: Study, test: Mapping[str, Score | None], validation: Mapping[str, Score | None]
) -> dict[str, Any]:
    """The temperature of each label by the validation patients of all sites together, and the calibration error of
    their test patients without and with it; None where sites tell too little."""
    found = dict[str, Any]()
    for label in study.task.labels if study.task.kind == "classification" else ():
        told, scored = validation.get(label), test.get(label)
        if not isinstance(told, ClassCounts) or not isinstance(scored, ClassCounts):
            continue
        by = temperature(told)
        figures = {"temperature": by, "ece": calibrated_error(scored, 1.0), "ece_after": calibrated_error(scored, by)}
        found[label] = {name: round(v, 6) if isfinite(v) else None for name, v in figures.items()}
        found[label]["cases"] = told.cases
    return {"calibration": found} if found else {}
