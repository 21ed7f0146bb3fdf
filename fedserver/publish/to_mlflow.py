"""A release in MLflow: its folder, the figures of its card, its study and its standing as one run of a tracking server.

MLflow is an optional extra (`pip install fedimaging[mlflow]`), and what it gets is a copy: nothing here is read back,
and no hospital trusts it. Its telemetry, which is on by default from 3.2, is switched off before it is imported.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from fedserver.enrol import Federation
from fedserver.registry import Entry, folder_of, manifest_of, trust_of
from shared_models.errors import FederationError, StateInvalid
from shared_models.files import read_json
from shared_models.release import Release, open_release, read_approvals

EXPERIMENT = "federated releases"
TOGETHER = 100  # parameters in one call, the most that MLflow takes
LONGEST = 500  # characters of a parameter or tag that every version takes


def to_mlflow(federation: Federation, entry: Entry, uri: str, experiment: str = EXPERIMENT) -> str:
    """Writes a release as a run of `experiment` to the tracking server (or folder) at `uri`; the run's id.

    Raises:
        StateInvalid: MLflow is not installed, a release that waits for approvals, or a server that does not take it.
        ReleaseInvalid: the registry's copy is not as it was signed.
    """
    source, manifest = folder_of(federation, entry.digest) / "release", manifest_of(federation, entry)
    if len(read_approvals(source)) < manifest.approvals:
        raise StateInvalid(f"release {entry.label}: waits for its approvers. Export it when they have signed it.")
    release = open_release(source, trust_of(federation))
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    if uri.startswith("file:"):  # which MLflow 3 takes only from those who know that it is for one machine
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    try:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise StateInvalid("MLflow is not installed here: pip install 'mlflow-skinny>=2.14,<4'.") from None
    at_ms = int(entry.history[0].at * 1000)
    figures, tags, params = list(metrics_of(source)), tags_of(release, entry), iter(sorted(params_of(release).items()))
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else client.create_experiment(experiment)
        run: str = client.create_run(number, start_time=at_ms, run_name=entry.label).info.run_id
        try:
            while part := [Param(name, value) for name, value in islice(params, TOGETHER)]:
                client.log_batch(run, params=part)
            client.log_batch(
                run,
                metrics=[Metric(name, value, at_ms, entry.round) for name, value in figures],
                tags=[RunTag(name, value) for name, value in tags.items()],
            )
            client.log_artifacts(run, str(source), "release")
        except BaseException:
            with suppress(MlflowException, OSError):  # the server may be gone
                client.set_terminated(run, "FAILED")
            raise
        client.set_terminated(run)
    except (MlflowException, OSError) as error:
        raise StateInvalid(
            f"{uri}: MLflow does not take the release ({str(error)[:300]}). Is it a tracking server that this machine "
            "may write to, or a folder as file:///PATH?"
        ) from error
    return run


def params_of(release: Release) -> dict[str, str]:
    """What was trained and how: every value of the study by its path, `train.learning_rate`; lists in one piece."""
    return {name: str(value)[:LONGEST] for name, value in _flat(read_json(release.folder / "study.json"), "")}


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif value not in (None, "", [], {}):
        yield path, value


def metrics_of(folder: Path) -> Iterator[tuple[str, float]]:
    """Figures of the card: of all test cases, of each site under the card's name for it, and the gap between them."""
    told = read_json(folder / "card.json")["performance"]
    measure = str(told["measure"]).lower().replace(" ", "_")
    for label, part in told["labels"].items():
        rows = {"all": part["all_cases"], **{str(k).replace(" ", "_"): row for k, row in part["sites"].items()}}
        for who, row in rows.items():
            if row is not None and row.get("value") is not None:
                yield f"{measure}/{label}/{who}", float(row["value"])
        if part["gap"] is not None:
            yield f"{measure}/{label}/gap", float(part["gap"])
    for name, figure in read_json(folder / "parity.json")["forms"].items():
        yield f"parity/{name}", float(figure["probability"])


def tags_of(release: Release, entry: Entry) -> dict[str, str]:
    """Where it comes from and what has become of it."""
    origin = release.manifest.origin
    tags = {
        "release.digest": entry.digest, "release.version": entry.version, "release.stage": entry.stage,
        "federation": origin.federation, "run": entry.run, "round": str(entry.round),
        "sites": str(len(entry.sites)), "study_sha256": origin.study_sha256, "weights_sha256": origin.weights_sha256,
        "code_sha256": origin.code_sha256 or "not known", "notice": "not for diagnosis",
    }  # fmt: skip
    if release.manifest.privacy is not None:
        tags["privacy"] = str(release.manifest.privacy.get("words", ""))
    if not all(tags.values()):
        raise FederationError(f"release {entry.label}: its manifest leaves out where it comes from. Make it anew.")
    return {name: value[:LONGEST] for name, value in tags.items()}
