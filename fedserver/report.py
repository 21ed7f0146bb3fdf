"""What a run has come to: `report.html` for people, `report.json`, curves as PNG, and events for TensorBoard.

All of it is sums and counts that sites chose to send: no case, no patient, no path of a hospital.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from fedserver import comparison as compared
from fedserver import plots
from fedserver.checkpoint import RunFolder, read_state, read_study, trained_study
from fedserver.comparison import ALL, Comparison
from fedserver.page import render
from fedserver.privacy import Before, spent
from fedserver.publish.lineage import Earlier, earlier
from shared_models.files import read_lines, replacing, write_atomic, write_json
from shared_models.scores import NAMES, measure_of, value_in
from shared_models.study import MODALITIES, Study

__all__ = ["Comparison", "facts", "write_events", "write_report"]

BINS = ("histogram", "hd95_histogram", "reliability", "froc")  # of a row, too long for every round
_LATE = re.compile(r"(?P<site>.+) \(round (?P<round>\d+)\)")  # an update of an earlier round, counted in this one

_PROPER = {
    "unet": "U-Net", "dynunet": "DynUNet", "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "fedavg": "FedAvg",
    "fedavgm": "FedAvgM", "fedadam": "FedAdam", "fedyogi": "FedYogi", "fedadagrad": "FedAdagrad",
    "median": "the coordinate-wise median", "trimmed_mean": "the trimmed mean", "krum": "Krum",
    "multi_krum": "Multi-Krum", "bulyan": "Bulyan", "norm_bound": "the mean of updates of bounded length",
    "centred_clip": "centred clipping",
    "residual-unet": "Residual U-Net", "segresnet": "SegResNet", "resnet18": "ResNet-18",
    "resnet34": "ResNet-34", "resnet50": "ResNet-50", "vgg11": "VGG-11", "vgg13": "VGG-13", "vgg16": "VGG-16",
    "vgg19": "VGG-19", "densenet121": "DenseNet-121", "efficientnet-b0": "EfficientNet-B0", "mlp": "Perceptron",
    "attention-mil": "Attention MIL",
}  # fmt: skip
_LOSSES = {
    "bce": "binary cross-entropy", "dice_bce": "soft Dice and binary cross-entropy", "ce": "cross-entropy",
    "dice_ce": "soft Dice and cross-entropy", "focal": "the focal loss", "tversky": "the Tversky index",
    "hazard": "the likelihood of discrete time", "centre": "the focal loss of centres and the extents of lesions",
    "masked_l1": "the absolute error where it is hidden",
}  # fmt: skip


def write_report(run: RunFolder, comparison: Comparison | Sequence[Comparison] | None = None) -> Path:
    """Writes report.html, report.json, curves.png, matrix.png (with a comparison) and tensorboard/ into the run folder.

    A run that has not finished gets a report of what there is. Several comparisons are those of several seeds, the
    first of them this run's. Returns the path of report.html.
    """
    seeds = [comparison] if isinstance(comparison, Comparison) else list(comparison or ())
    found = facts(run, seeds)
    write_json(run.path / "report.json", found)
    loss, scores = curves(found)
    write_atomic(run.path / "curves.png", plots.curves_png(loss, scores, drawn(found), found["measure"]["name"]))
    rows = compared.matrix(seeds)
    (run.path / "matrix.png").unlink(missing_ok=True)  # of an earlier report
    if len(rows) > 1:
        write_atomic(run.path / "matrix.png", plots.matrix_png(rows, found["labels"][0], found["measure"]["name"]))
    write_events(run, found)
    page = run.path / "report.html"
    write_atomic(page, render(found, loss, scores).encode())
    return page


def facts(run: RunFolder, comparisons: Sequence[Comparison] = ()) -> dict[str, Any]:
    """All that report.json holds; the page and the tables of the command line are made from it alone."""
    study, state, lines = trained_study(run), read_state(run), read_lines(run.metrics)
    rounds = [_round(line) for line in lines if not line.get("final")]
    final = next((line for line in reversed(lines) if line.get("final")), None)
    measure = measure_of(study.task)
    sites = {s for r in rounds for s in r["sites"]} | set(compared.sites_of(comparisons))
    if final is not None:
        sites |= {*final["sites"], *final["left_out"], *final.get("together", {}).get("sites", ())}
    return {
        "run": run.id,
        "study": {
            "name": study.name,
            "title": study.title or study.name,
            "sha256": state.study_sha256,
            "seed": study.seed,
            "trained": in_words(study),
        },
        "measure": {"key": measure, "name": NAMES[measure]},
        "labels": list(study.task.answers),
        "sites": sorted(sites),
        "rounds_planned": study.rounds.count,
        "rounds_done": state.round,
        "finished": state.round >= study.rounds.count and (final is not None or not study.evaluate.every),
        "weights": {"file": run.weights(state.round).name, "sha256": state.weights_sha256},
        "rounds": rounds,
        "privacy": spent(study, rounds, [_before(each) for each in earlier(run)]),
        "secure": _secure(study, rounds),
        "totals": {key: round(sum(r[key] for r in rounds), 3) for key in ("seconds", "bytes_down", "bytes_up")},
        "test": {label: _test(final, label) for label in study.task.answers} if final is not None else {},
        "calibration": final.get("calibration", {}) if final is not None else {},
        "not_tested": final["left_out"] if final is not None else {},
        "comparison": compared.as_json(comparisons, NAMES[measure]) if comparisons else None,
    }


def _before(each: Earlier) -> Before:
    """An earlier run as the account of privacy wants it."""
    if each.run is None:
        return Before()
    lines = [line for line in read_lines(each.run.metrics) if not line.get("final") and line["round"] <= each.round]
    return Before(each.run.id, each.round, read_study(each.run), [_round(line) for line in lines])


def drawn(found: Mapping[str, Any]) -> list[str]:
    """Whose curves there are: the sites', or of a run through secure sums that of all together."""
    return [ALL, *found["sites"]] if found["secure"] else list(found["sites"])


def seen_in_words(study: Study) -> str:
    """What the network is shown of a case."""
    if study.table_only:
        return f"tables of {len(study.task.covariates)} columns"
    if study.of_bags:
        return f"bags of tiles, {study.model.features[0]} features each"
    pieces = ", in patches" if study.preprocess.fit == "patches" else ""
    size = " x ".join(map(str, study.preprocess.size))
    return f"{MODALITIES[study.modality]} images{pieces} of {size}"


def in_words(study: Study) -> str:
    """What is trained, in a paragraph."""
    train, task = study.train, study.task
    amount = f"{train.local_steps} batches" if train.local_steps else f"local epochs: {train.local_epochs}"
    loss = _LOSSES[task.loss]
    does = {
        "segmentation": "marks", "classification": "tells apart", "prognosis": "foretells", "detection": "finds",
        "reconstruction": "restores hidden parts of the",
    }[task.kind]  # fmt: skip
    pull = f", with a pull towards the received weights of {train.proximal_mu:g} (FedProx)" if train.proximal_mu else ""
    share = {
        "examples": "by its number of examples",
        "uniform": "like every other",
        "inverse_variance": "by how little its steps vary",
    }[study.strategy.weighting]
    lots = f"batches of {train.batch_size}"
    if (privacy := study.protect.privacy) is not None:
        part = "" if privacy.trained == "all" else ", of its last layer alone"
        amount = f"{train.local_steps} steps"
        lots = (
            f"each of patients taken with probability {privacy.sample_rate:g}, each patient's gradient{part} clipped "
            f"to {privacy.clip_norm:g} and noise of {privacy.noise_multiplier:g} clips added"
        )
    net = _PROPER.get(study.model.name, study.model.name)
    if not (study.table_only or study.of_bags):
        net += f" in {study.model.spatial_dims}-D"
    return (
        f"{net} that {does} {', '.join(task.answers)} on {seen_in_words(study)}. In each of "
        f"{study.rounds.count} rounds every site trains ({amount}, {lots}, "
        f"{_PROPER.get(train.optimizer, train.optimizer)} with learning rate {train.learning_rate:g}, against "
        f"{loss}{pull}), and {_PROPER.get(study.strategy.name, study.strategy.name)} combines what they learned, each "
        f"site weighing {share}.{strategy_in_words(study)}"
    )


def strategy_in_words(study: Study) -> str:
    """What the study adds to local training and averaging, one sentence each, with a blank before it."""
    train, strategy, own = study.train, study.strategy, study.personal
    kept = " and ".join({"norm": "norm layers", "head": "last layer"}[kind] for kind in own.keep)
    said = {
        "Steps are corrected by control variates (SCAFFOLD).": train.scaffold,
        "Features are held near to those of the received weights (MOON).": train.moon_mu,
        "Steps look for flat optima (sharpness-aware).": train.sharpness_rho,
        "Each site's optimizer goes on from its last round.": train.moments == "kept",
        "Updates are divided by their steps (FedNova).": strategy.normalise_steps,
        f"In the place of the mean stands {_PROPER.get(strategy.robust, strategy.robust)}"
        f"{f', which bears {strategy.malicious} malicious sites' if strategy.malicious else ''}.": strategy.robust
        != "none",
        f"Each site keeps its {kept}.": own.keep,
        "Each site also has a model of its own (Ditto).": own.ditto_lambda,
        "Each site also has a model of its own, mixed with the federation's (APFL).": own.apfl_alpha,
        "After the last round each site tunes a copy on its own images.": own.fine_tunes,
        f"Updates longer than {study.protect.clip_norm or 0:g} are shortened.": study.protect.clip_norm is not None,
        f"Updates travel compressed ({study.protect.compression}).": study.protect.compression != "none",
        "Updates are added up under masks (secure aggregation).": study.protect.secure_aggregation is not None,
    }
    return "".join(f" {sentence}" for sentence, so in said.items() if so)


def curves(found: Mapping[str, Any]) -> tuple[plots.Series, dict[str, plots.Series]]:
    """Training loss, and the validation score per label: site -> (round, value).

    The loss is the mean over a site's steps of the round, None where one was not finite; the score of the weights after
    round r stands at r, though sites measure it as round r + 1 begins.
    """
    loss: dict[str, dict[int, float | None]] = {}
    scores: dict[str, dict[str, dict[int, float | None]]] = {label: {} for label in found["labels"]}
    for line in found["rounds"]:
        if (together := line["together"]) is not None:
            loss.setdefault(ALL, {})[line["round"]] = together["loss"]
            for label, row in together["validation"].items():
                scores.setdefault(label, {}).setdefault(ALL, {})[line["round"] - 1] = value_in(row)
    for site, update in updates_told(found["rounds"]):
        loss.setdefault(site, {})[update["round"]] = update["loss"]
        for label, row in update["validation"].items():
            scores.setdefault(label, {}).setdefault(site, {})[update["round"] - 1] = value_in(row)
    return _series(loss), {label: _series(by_site) for label, by_site in scores.items()}


def write_events(run: RunFolder, found: Mapping[str, Any]) -> Path:
    """TensorBoard events, one folder for each site, so that it lays the sites over each other; returns their folder.

    Steps are rounds; wall time begins with the run and counts the seconds of its rounds alone.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = run.path / "tensorboard"
    folder.mkdir(exist_ok=True, mode=0o700)
    began = int((run.path / "study.json").stat().st_mtime)  # written once, as the run begins
    ends = accumulate((line["seconds"] for line in found["rounds"]), initial=float(began))
    wall = dict(zip([0, *(line["round"] for line in found["rounds"])], ends, strict=True))
    points: dict[str, list[tuple[int, str, float]]] = {}
    for line in found["rounds"]:
        if (together := line["together"]) is not None:
            told = {"train/loss": together["loss"], "train/examples": together["examples"]}
            all_ = points.setdefault(ALL, [])
            all_ += [(line["round"], tag, value) for tag, value in told.items() if value is not None]
            for label, row in together["validation"].items():
                value = value_in(row)
                tag = f"validation_{found['measure']['key']}/{label}"
                all_.append((line["round"] - 1, tag, nan if value is None else value))
    for site, update in updates_told(found["rounds"]):
        values = {f"train/{name}": update[name] for name in ("loss", "examples", "seconds")}
        mine = points.setdefault(site, [])
        mine += [(update["round"], tag, nan if value is None else value) for tag, value in values.items()]
        for label, row in update["validation"].items():
            tag, value = f"validation_{found['measure']['key']}/{label}", value_in(row)
            mine.append((update["round"] - 1, tag, nan if value is None else value))
    for site, mine in points.items():
        with replacing(folder / _folder_name(site) / f"events.out.tfevents.{began}.rounds") as file:
            writer = RecordWriter(file)
            writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
            for step, tag, value in sorted(mine):
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.write(Event(wall_time=wall[step], step=step, summary=summary).SerializeToString())
    return folder


def updates_told(rounds: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every counted update of which more is known than that it is in a sum, with its site."""
    for line in rounds:
        for site, part in line["sites"].items():
            for update in part["updates"]:
                if not update.get("summed"):
                    yield site, update


def _series(by_site: Mapping[str, Mapping[int, float | None]]) -> plots.Series:
    return {site: sorted(points.items()) for site, points in sorted(by_site.items())}


def _round(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl by site: its part, and the updates that were counted, late ones among them."""
    sites: dict[str, Any] = {
        site: {"part": seat["state"], "reason": seat["reason"], "updates": []}
        for site, seat in line["left_out"].items()
    }
    for key, update in line["sites"].items():
        late = _LATE.fullmatch(key)
        site, number = (late["site"], int(late["round"])) if late else (key, line["round"])
        part = sites.setdefault(site, {"part": "not asked" if late else "counted", "reason": "", "updates": []})
        part["updates"].append(
            {
                "round": number,
                "loss": _mean_loss(update["losses"]),
                **{key: update[key] for key in ("examples", "steps", "seconds", "attempt", "device")},
                "validation": {label: _without_bins(row) for label, row in update["scores"].items()},
            }
        )
    together = line.get("together")
    for site in together["sites"] if together else ():
        sites[site] = {"part": "counted", "reason": "", "updates": [{"round": line["round"], "summed": True}]}
    kept = ("round", "seconds", "bytes_down", "bytes_up", "weights_sha256")
    return {
        **{key: line[key] for key in kept},
        "sites": dict(sorted(sites.items())),
        "together": None if together is None else _in_a_sum(together),
    }


def _in_a_sum(together: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: together[key] for key in ("examples", "clipped", "attempt")},
        "loss": _mean_loss(together["losses"]),
        "validation": {label: _without_bins(row) for label, row in together["scores"].items()},
        "personalised": {label: _without_bins(row) for label, row in together.get("personalised", {}).items()},
    }


def _secure(study: Study, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the coordinator could know of a site in a run through secure sums; None for another run."""
    table = study.protect.secure_aggregation
    if table is None:
        return None
    sums = [line["together"] for line in rounds if line["together"] is not None]
    fewest = min((sum(s["part"] == "counted" for s in line["sites"].values()) for line in rounds), default=0)
    return {
        "clip": table.clip,
        "ring_bits": table.ring_bits,
        "fewest_sites": fewest,
        "clipped": sum(s["clipped"] for s in sums),
        "words": (
            f"Updates were added up under masks: the coordinator knows the sum of each round, of at least {fewest} "
            f"sites, and no update, loss, score or number of examples of one site. It knows who was in each sum. What "
            f"a sum of few sites says of their images, and what all the others in it could find out together, masks do "
            f"not bound; differential privacy does."
        ),
    }


def _mean_loss(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return round(fmean(known), 6) if known and len(known) == len(losses) else None


def _without_bins(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in BINS}


def _test(final: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The final test of one label: every site, all cases together, the mean over sites, and the worst site.

    Of a run through secure sums, all cases together alone.
    """
    rows = {
        site: _with_value(part["scores"][label]) for site, part in final["sites"].items() if label in part["scores"]
    }
    known = {site: row["value"] for site, row in rows.items() if row["value"] is not None}
    whole = final["federation"].get(label)
    worst, best = min(known, key=known.__getitem__, default=None), max(known, key=known.__getitem__, default=None)
    own = {site: part.get("personalised", {}) for site, part in final["sites"].items()}
    together = final.get("together", {}).get("personalised", {}).get(label)
    return {
        "sites": rows,
        "personalised": {
            site: _with_value(_without_bins(scores[label])) for site, scores in own.items() if label in scores
        },
        "all_cases": _with_value(whole) if whole else None,
        "personalised_all_cases": _with_value(_without_bins(together)) if together else None,
        "mean_over_sites": round(fmean(known.values()), 6) if known else None,
        "worst": worst,
        "best": best,
        "gap": None if worst is None or best is None else round(known[best] - known[worst], 6),
    }


def _with_value(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its headline figure as `value`."""
    return {**row, "value": value_in(row)}


def _folder_name(site: str) -> str:
    """One folder name for one site name, whatever it holds."""
    return quote(site, safe="").replace(".", "%2E")
