"""A study whose plan comes from its sites' data: what the plan must fit into, and the study with the plan in it."""

from typing import Any

from shared_models.files import canonical_json
from shared_models.model_table import OF_MODEL
from shared_models.parse import parse, plain
from shared_models.plan import Constraints, Plan
from shared_models.study import Study

PURPOSE = "plan"  # of the coordinator's signature


def statement(run: str, study_sha256: str, plan_sha256: str) -> bytes:
    """What the coordinator signs: this plan, for this run of this study and no other."""
    return canonical_json({"run": run, "study_sha256": study_sha256, "plan_sha256": plan_sha256})


def constraints(study: Study) -> Constraints:
    """What a plan for `study` must fit into."""
    return Constraints(
        memory_bytes=int(study.planning.memory_gib * 2**30),
        spatial_dims=study.model.spatial_dims,
        modality=study.modality,
        labels=len(study.task.labels),
        batch_most=study.planning.batch_most,
    )


def planned(study: Study, plan: Plan) -> Study:
    """The study that is trained: preprocessing, network and batch size are the plan's.

    Raises:
        StudyInvalid: a plan that does not fit the study or itself; it may come from another machine.
    """
    table: dict[str, Any] = plain(study)
    read = {key: value for key, value in table["model"].items() if "dynunet" in OF_MODEL.get(key, ("dynunet",))}
    table["plan"] = "given"
    table["train"]["batch_size"] = plan.batch_size
    table["model"] = read | {
        "name": "dynunet",
        "norm": "instance",
        "supervised": min(study.model.supervised, len(plan.features) - 2),
        "levels": [
            {"features": features, "stride": stride, "kernel": kernel}
            for features, stride, kernel in zip(plan.features, plan.strides, plan.kernels, strict=False)
        ],
    }
    table["preprocess"] |= {
        "size": plan.patch,
        "fit": "letterbox" if plan.spacing_mm is None else "patches",
        "intensity": "zscore",
        "window_hu": plan.clip_hu or study.preprocess.window_hu,
        "spacing_mm": plan.spacing_mm,
        "mean": plan.mean,
        "deviation": plan.deviation,
        "nonzero": plan.nonzero,
    }
    return parse(Study, table, f"plan of study {study.name!r}")
