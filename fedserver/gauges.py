"""Figures of a coordinator for Prometheus, on loopback: rounds, sites by state, bytes, seconds, replies, the queue.

Labels are names of runs under way and words for states; there is no figure of a patient or of one site's data.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedserver.backup import last_backup_s
from fedserver.checkpoint import RunFolder
from fedserver.enrol import Federation, open_federation
from fedserver.overview import overview
from shared_models.audit_files import every_event
from shared_models.errors import FederationError
from shared_models.files import read_lines
from shared_models.identity import load_credential, read_certificate
from shared_models.loopback import loopback_app, page_main

UNDER_WAY = ("queued", "running", "paused")
OUTCOMES = ("counted", "refused", "rejected", "failed", "pending", "lost")


@dataclass(frozen=True, slots=True)
class Figures(Collector):
    """Read from the folder each time that Prometheus asks."""

    folder: Path

    def collect(self) -> Iterator[Metric]:
        federation = open_federation(self.folder)
        facts = overview(federation)
        yield _gauge("served", "1 while `fedserver serve` runs.", float(facts["served"]))
        yield _by("runs", "Runs by state.", "state", Counter(run["state"] for run in facts["runs"]))
        queue = sum(run["queue"] is not None for run in facts["runs"])
        yield _gauge("queue_length", "Runs that wait for their turn.", queue)
        yield from _runs([run for run in facts["runs"] if run["state"] in UNDER_WAY])
        yield _by("sites", "Sites by state.", "state", Counter(site["state"] for site in facts["sites"]))
        yield _gauge("sites_online", "Sites heard of lately.", sum(site["online"] for site in facts["sites"]))
        yield _gauge("alarms", "Audit logs of sites that contradict what was vouched for.", len(facts["alarms"]))
        yield from _work(federation)
        yield from _machine(federation)
        restarts = CounterMetricFamily("fedserver_process_restarts", "Since `serve` was started.", labels=["process"])
        for name, child in facts["processes"].items():
            restarts.add_metric([name], child["restarts"])
        yield restarts


def _runs(runs: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    finished = GaugeMetricFamily("fedserver_run_finished_rounds", "Rounds that are finished.", labels=["run"])
    wanted = GaugeMetricFamily("fedserver_run_rounds", "Rounds that the study asks for.", labels=["run"])
    seats = GaugeMetricFamily("fedserver_run_sites", "Sites in the round under way, by state.", labels=["run", "state"])
    for run in runs:
        if run["rounds"] is not None:
            finished.add_metric([run["id"]], run["finished_rounds"])
            wanted.add_metric([run["id"]], run["rounds"])
        states = Counter(seat["state"] for seat in run["progress"].get("sites", {}).values())
        for state, count in sorted(states.items()):
            seats.add_metric([run["id"], state], count)
    yield from (finished, wanted, seats)


def _work(federation: Federation) -> Iterator[Metric]:
    """What all runs together have done, from their own files and the audit log, so that no restart counts anew."""
    rounds, seconds, up, down, damaged = 0, 0.0, 0, 0, 0
    for path in sorted(federation.runs.glob("*/metrics.jsonl")):
        try:
            lines = [line for line in read_lines(RunFolder(path.parent).metrics) if not line.get("final")]
            took = fsum(float(line.get("seconds", 0.0)) for line in lines)
            sent = [sum(int(line.get(f"bytes_{way}", 0)) for line in lines) for way in ("up", "down")]
        except (ValueError, TypeError, AttributeError):  # of one run; the figures of the others are still wanted
            damaged += 1
            continue
        rounds, seconds, up, down = rounds + len(lines), seconds + took, up + sent[0], down + sent[1]
    yield _gauge("runs_damaged", "Runs whose metrics.jsonl cannot be read; they are in no other figure.", damaged)
    yield CounterMetricFamily("fedserver_rounds", "Rounds that were finished.", value=rounds)
    yield CounterMetricFamily("fedserver_round_seconds", "From the opening of rounds to their end.", value=seconds)
    traffic = CounterMetricFamily("fedserver_model_bytes", "Tensors of counted updates, and of models.", labels=["way"])
    traffic.add_metric(["up"], up)
    traffic.add_metric(["down"], down)
    yield traffic
    counted = Counter(
        str(line["event"]).removeprefix("reply-")
        for line in every_event(federation.folder, [f"reply-{outcome}" for outcome in OUTCOMES])
    )
    replies = CounterMetricFamily("fedserver_replies", "Replies of sites, by what became of them.", labels=["outcome"])
    for outcome in OUTCOMES:
        replies.add_metric([outcome], counted[outcome])
    yield replies


def _machine(federation: Federation) -> Iterator[Metric]:
    own = read_certificate(load_credential(federation.server_certificate).certificate)
    yield _gauge("certificate_expires_timestamp_seconds", "Of the coordinator's certificate.", own.expires_at_s)
    yield _gauge("disk_free_bytes", "On the disk of the federation.", shutil.disk_usage(federation.folder).free)
    at = last_backup_s(federation.folder)
    yield _gauge("backup_timestamp_seconds", "Of the last backup; 0 before the first.", 0.0 if at is None else at)


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fedserver_{name}", words, value=value)


def _by(name: str, words: str, label: str, counts: Counter[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"fedserver_{name}", words, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def exposition(folder: Path) -> bytes:
    """The figures in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Figures(folder))
    return generate_latest(registry)


def metrics_app(folder: Path) -> FastAPI:
    app = loopback_app("figures of a coordinator")

    @app.get("/metrics")
    def metrics() -> Response:
        try:
            return Response(exposition(folder), media_type=CONTENT_TYPE_LATEST)
        except FederationError as error:
            return PlainTextResponse(f"{error}\n", 503)

    return app


if __name__ == "__main__":
    page_main("fedserver.gauges", "Figures for Prometheus.", metrics_app)
