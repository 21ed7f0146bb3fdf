"""Figures of a site for Prometheus: its connection, work done, bytes sent, privacy spent, disk. None of a patient."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedclient.book import Book
from fedclient.overview import overview

STATES = ("connected", "working", "away", "refused", "stopped")


@dataclass(frozen=True, slots=True)
class Figures(Collector):
    """Read from the folder each time that Prometheus asks."""

    folder: Path

    def collect(self) -> Iterator[Metric]:
        book = Book(self.folder)
        facts = overview(self.folder, book)
        state = facts["connection"]["state"]
        connection = GaugeMetricFamily("fedclient_connection", "1 for the state that it is in.", labels=["state"])
        for name in STATES:
            connection.add_metric([name], float(name == state))
        yield connection
        heard = facts["connection"]["heard_at"]
        yield _gauge("heard_timestamp_seconds", "When the coordinator last answered; 0: never.", heard or 0.0)
        yield CounterMetricFamily("fedclient_rounds", "Updates that were sent.", value=facts["rounds_done"])
        yield from _sent(book)
        words = "Orders that this site did not carry out."
        yield CounterMetricFamily("fedclient_refused_orders", words, value=book.refused)
        work = facts["work"]
        yield _gauge("work_seconds", "Age of the order under way; 0: none.", time.time() - work["since"] if work else 0)
        yield _gauge("studies_waiting", "Studies that wait for a decision here.", facts["studies_waiting"])
        yield _gauge("open", "1 within the hours of the policy.", float(facts["open_now"]))
        yield _gauge("alarms", "What contradicts the coordinator's log, or our own book.", len(facts["alarms"]))
        for name, words in (("free", "on the disk of the site"), ("cache", "of the cache"), ("quota", "of it allowed")):
            yield _gauge(f"disk_{name}_bytes", f"Bytes {words}.", facts["disk"][name])
        ends = facts["certificate_expires_at"]
        yield _gauge("certificate_expires_timestamp_seconds", "Of this site's certificate.", ends)
        yield from _ledger(facts["ledger"])
        restarts = CounterMetricFamily("fedclient_process_restarts", "Since `start` was typed.", labels=["process"])
        for name, child in facts["processes"]["children"].items():
            restarts.add_metric([name], child["restarts"])
        yield restarts


def _sent(book: Book) -> Iterator[Metric]:
    family = CounterMetricFamily("fedclient_sent_bytes", "What has left this site, by kind.", labels=["kind"])
    for kind, (_, size) in sorted(book.kinds.items()):
        family.add_metric([kind], size)
    yield family


def _ledger(accounts: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    spent = GaugeMetricFamily("fedclient_epsilon_spent", "Privacy spent, over all studies.", labels=["data_set"])
    budget = GaugeMetricFamily("fedclient_epsilon_budget", "Privacy that may be spent.", labels=["data_set"])
    for account in accounts:
        if account["budget"] is not None:
            spent.add_metric([account["data_set"]], account["spent"])
            budget.add_metric([account["data_set"]], account["budget"])
    yield from (spent, budget)


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fedclient_{name}", words, value=value)


def exposition(folder: Path) -> bytes:
    """The figures in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Figures(folder))
    return generate_latest(registry)
