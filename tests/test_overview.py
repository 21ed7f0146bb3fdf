"""How both ends stand: a layout that is written down and kept, and figures for Prometheus."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

import fedclient.cli
import fedserver.cli
from fedclient import gauges as site_gauges
from fedclient import overview as site_overview
from fedclient import start
from fedclient.book import Book
from fedclient.ledger import Reservation, open_ledger
from fedclient.policy import Policy
from fedserver import gauges, serve
from fedserver.enrol import Federation, init_federation, invite
from fedserver.overview import Overview, _site, overview, schema
from fedserver.state import Run, add_run, change_run, list_sites
from fedserver.submit import submit
from shared_models.alarms import alarm_words
from shared_models.errors import StateInvalid
from shared_models.files import append_json, write_json
from shared_models.parse import parse
from shared_models.protect.accounting import Spend
from shared_models.study import Rounds, Study
from shared_models.weights import schema_of, size_bytes
from tests.asking import Browser
from tests.edge import running_edge
from tests.hospitals import Hospitals
from tests.test_submit import STUDY
from tests.toys import WEIGHTS

TOY = Study(name="toy", rounds=Rounds(count=2, quorum=2, deadline_s=300, gather_s=0))
Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def figures(text: bytes) -> Figures:
    """(name, labels) -> value, as Prometheus' own parser reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@dataclass
class Played:
    """A federation of two sites that has finished a run of two rounds."""

    federation: Federation
    north: Path


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("played")
    with running_edge(folder / "federation") as edge:
        hospitals = Hospitals(edge, folder / "sites")
        for name in ("north", "south"):
            hospitals.join(name, Policy(approval="inside-policy"))
        hospitals.run(TOY)
        add_run(edge.federation.state, Run("toy", "toy", "0" * 64, "finished", None, 1.0, 1.0, ""))
        yield Played(edge.federation, hospitals.sites["north"])


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", "Test", "127.0.0.1:8443")


# The layout of `fedserver status --json`


def test_what_status_prints_is_of_the_layout_that_it_prints_itself(played, federation):
    invoke = CliRunner().invoke
    here = ["--federation", str(federation.folder)]
    layout = json.loads(invoke(fedserver.cli.app, ["status", "--schema", *here]).stdout)
    assert layout == json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(layout)
    check = jsonschema.Draft202012Validator(layout).validate
    check(json.loads(invoke(fedserver.cli.app, ["status", "--json", *here]).stdout))
    submit(federation, STUDY, None, False)
    invite(federation, "north")
    log_line(federation.folder / "audit.jsonl", "reply-rejected", 6.0, site="south", run="toy", round=2, why="X")
    write_json(federation.folder / "status.json", {"supervisor": 1, "children": {"link": {
        "pid": 3, "state": "running", "restarts": 1, "last_exit": -9, "since": 1.0, "last_words": ""}}})  # fmt: skip
    write_json(federation.runs / "tiny-1/progress.json", {
        "phase": "train", "round": 1, "rounds": 4, "quorum": 2, "updated_at": 1.0, "deadline_in_s": 3.0,
        "left_s": None, "sites": {"north": {"state": "asked", "reason": "is working on it", "attempt": 1}},
    })  # fmt: skip
    (federation.runs / "tiny-1/hold.json").write_text('{"after": 2, "at": 1.0}')
    for one in (federation, played.federation):
        facts = overview(one)
        check(json.loads(json.dumps(facts)))
        assert isinstance(parse(Overview, facts, "status", StateInvalid), Overview)
    with pytest.raises(jsonschema.ValidationError):
        check({**overview(federation), "runs": [{"id": "x"}]})
    with pytest.raises(jsonschema.ValidationError):
        check({**overview(federation), "new": 1})


def test_a_damaged_run_is_still_of_the_layout(federation):
    submit(federation, STUDY, None, False)
    (federation.runs / "tiny-1/state.json").write_text("{")
    jsonschema.validate(json.loads(json.dumps(overview(federation))), schema())


# Alarms and refusals


def log_line(path: Path, event: str, at: float, **facts: object) -> None:
    append_json(path, {"event": event, "facts": facts, "prev": "", "seq": 0, "sign": "", "time": at})


def test_a_contradicted_log_is_told_once_for_each_party_and_problem(tmp_path):
    path = tmp_path / "audit.jsonl"
    assert alarm_words(path) == []
    log_line(path, "order", 1.0, peer="witness-refused")
    for at in (86400.0, 2 * 86400.0):
        log_line(path, "witness-refused", at, peer="north", problem="LOG_CUT", head={})
    log_line(path, "witness-unsigned", 86400.0, peer="south")
    told = alarm_words(path)
    assert len(told) == 2
    assert told[0].startswith("The log of north: its end was cut off (noticed on 1970-01-03")
    assert "is not signed by its key" in told[1]


def test_alarms_are_shown_by_both_status_commands(played, tmp_path):
    copy = tmp_path / "federation"
    shutil.copytree(played.federation.folder, copy)
    log_line(copy / "audit.jsonl", "witness-refused", 5.0, peer="north", problem="LOG_FORKED", head={})
    log_line(copy / "audit.jsonl", "reply-refused", 6.0, site="south", run="toy", round=2, why="DATA_NOT_READY")
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(fedserver.cli.app, ["status", "--federation", str(copy)]).stdout
    assert "The log of north: lines that were vouched for have been written anew" in shown
    assert "Last refused or left out: south, run toy round 2, 1970-01-01" in shown
    assert ": DATA_NOT_READY" in shown
    site = tmp_path / "site"
    shutil.copytree(played.north, site)
    log_line(site / "audit.jsonl", "witness-missing", 5.0, peer="coordinator")
    log_line(site / "audit.jsonl", "order-refused", 6.0, code="DATA_NOT_READY", run="toy", round=3)
    shown = CliRunner().invoke(fedclient.cli.app, ["status", "--site", str(site)]).stdout
    assert "The log of coordinator: nothing vouches for it any more" in shown
    assert "last refused order: DATA_NOT_READY, run toy round 3" in shown
    assert read_on(site).last_refused == {"time": 6.0, "code": "DATA_NOT_READY", "run": "toy", "round": 3}


# Figures


def test_the_coordinators_figures_are_those_of_its_runs(played):
    found = figures(gauges.exposition(played.federation.folder))
    size = size_bytes(schema_of(WEIGHTS))
    assert found["fedserver_rounds_total", ()] == 2
    assert found["fedserver_model_bytes_total", (("way", "up"),)] == 2 * 2 * size
    assert found["fedserver_model_bytes_total", (("way", "down"),)] == 2 * 2 * size
    assert found["fedserver_replies_total", (("outcome", "counted"),)] == 6, "two updates a round, two last scores"
    assert found["fedserver_replies_total", (("outcome", "rejected"),)] == 0
    assert found["fedserver_sites", (("state", "active"),)] == 2
    assert found["fedserver_runs", (("state", "finished"),)] == 1
    assert found["fedserver_served", ()] == 0
    assert found["fedserver_disk_free_bytes", ()] > 0


def test_a_run_whose_lines_are_damaged_takes_the_figures_of_no_other(played, tmp_path):
    copy = tmp_path / "federation"
    shutil.copytree(played.federation.folder, copy)
    (copy / "runs/damaged").mkdir()
    (copy / "runs/damaged/metrics.jsonl").write_text('{"round": 1, "seconds": 5.0}\n{"round": 2, "seconds": "long"}\n')
    (copy / "runs/torn").mkdir()
    (copy / "runs/torn/metrics.jsonl").write_text('{"round": 1, "sec\n')
    found, whole = figures(gauges.exposition(copy)), figures(gauges.exposition(played.federation.folder))
    assert (found["fedserver_runs_damaged", ()], whole["fedserver_runs_damaged", ()]) == (2, 0)
    assert found["fedserver_rounds_total", ()] == 2
    assert found["fedserver_round_seconds_total", ()] == whole["fedserver_round_seconds_total", ()]


def test_runs_under_way_have_their_rounds_sites_and_places(federation):
    submit(federation, STUDY, "first", False)
    change_run(federation.state, "first", 1.0, "running")
    write_json(federation.runs / "first/progress.json", {"sites": {
        "north": {"state": "asked"}, "south": {"state": "asked"}, "west": {"state": "away"}}})  # fmt: skip
    submit(federation, STUDY, "second", True)
    found = figures(gauges.exposition(federation.folder))
    assert found["fedserver_run_rounds", (("run", "first"),)] == 4
    assert found["fedserver_run_finished_rounds", (("run", "first"),)] == 0
    assert found["fedserver_run_sites", (("run", "first"), ("state", "asked"))] == 2
    assert found["fedserver_queue_length", ()] == 1
    assert found["fedserver_backup_timestamp_seconds", ()] == 0


def test_a_sites_figures_are_those_of_its_work_and_none_is_of_a_patient(played, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(played.north, site)
    open_ledger(site).set_budget("all", 8.0, 1e-5)
    open_ledger(site).reserve(Reservation("all", "run-1", "a" * 64, 100, Spend(8.0, 0.1, 100)))
    (site / "cache/plan").mkdir(parents=True)
    (site / "cache/plan/0a1b").write_bytes(b"x" * 1000)
    text = site_gauges.exposition(site)
    found = figures(text)
    sent = json.loads(CliRunner().invoke(fedclient.cli.app, ["sent", "--json", "--site", str(site)]).stdout)
    assert found["fedclient_rounds_total", ()] == 2
    assert found["fedclient_sent_bytes_total", (("kind", "tensors"),)] == sum(
        line["bytes"] for line in sent if line["kind"] == "tensors"
    )
    assert found["fedclient_connection", (("state", "stopped"),)] == 1
    assert sum(value for (name, _), value in found.items() if name == "fedclient_connection") == 1
    assert found["fedclient_epsilon_budget", (("data_set", "all"),)] == 8
    assert 0 < found["fedclient_epsilon_spent", (("data_set", "all"),)] < 8
    assert found["fedclient_disk_cache_bytes", ()] == 1000
    assert not re.search(r"patient|case|label|example", text.decode())


# Where a site stands


def test_the_connection_is_told_by_what_the_node_has_noted(played, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(played.north, site)
    (site / "node").mkdir(exist_ok=True)
    runs = {"supervisor": 1, "children": {}}

    def state(now: float = 1000.0) -> str:
        return str(site_overview.connection(site, runs, now)["state"])

    def words(now: float) -> str:
        return str(site_overview.connection(site, runs, now)["words"])

    assert site_overview.connection(site, {"supervisor": None}, 0.0)["state"] == "stopped"
    assert state() == "away"
    (site / "node/contact").touch()
    now = (site / "node/contact").stat().st_mtime
    assert state(now + 10) == "connected"
    assert state(now + 100) == "away"
    assert state(now - 3600) == "away"
    assert "the coordinator was heard of not since this machine's clock was set back" in words(now - 3600)
    (site / "node/order.pb").touch()
    assert state(now + 100) == "working"
    assert words(now + 10) == "connected, and at work on an order"
    assert words(now + 100).startswith("at work on an order; the coordinator")
    assert words(now + 100).endswith("was heard of not for 100 s")
    write_json(site / "node/refused.json", {"refused": "was revoked", "at": 1.0})
    assert state(now + 10) == "refused"


def test_a_site_that_was_heard_of_in_the_future_is_not_shown_online(played):
    (north,) = [site for site in list_sites(played.federation.state) if site.name == "north"]
    assert north.seen_at is not None
    shown = [_site(played.federation.state, north, north.seen_at + after) for after in (5.0, 100.0, -3600.0)]
    assert [one["online"] for one in shown] == [True, False, False]
    assert shown[1]["reason"] == "last heard of 100 s ago"
    assert "this machine's clock was set back" in shown[2]["reason"]


def read_on(folder: Path) -> Book:
    book = Book(folder)
    book.look()
    return book


def test_the_order_under_way_is_the_last_one_that_was_not_answered(tmp_path):
    path = tmp_path / "audit.jsonl"
    assert read_on(tmp_path).work is None
    log_line(path, "order", 1.0, run="a", round=1, kind="train")
    assert read_on(tmp_path).work == {"run": "a", "round": 1, "kind": "train", "since": 1.0}
    log_line(path, "sent", 2.0, run="a", round=1, kind="tensors", bytes=9)
    assert read_on(tmp_path).work is not None, "the reply with its facts comes after the tensors"
    log_line(path, "sent", 3.0, run="a", round=1, kind="facts", bytes=9)
    assert read_on(tmp_path).work is None
    log_line(path, "order", 4.0, run="a", round=2, kind="train")
    log_line(path, "order-refused", 5.0, run="a", round=2, kind="train", code="X")
    assert read_on(tmp_path).work is None


def test_page_and_figures_are_processes_of_their_own_where_a_port_is_given(played, federation, tmp_path):
    shutil.copytree(played.north, tmp_path / "site")
    named = {child.name: child for child in start._children(tmp_path / "site", "app", 8471)}
    assert set(named) == {"node", "executor", "page"}
    assert named["page"].command[1:] == ["-m", "fedclient.page.web", str(tmp_path / "site"), "--port", "8471"]
    assert [child.name for child in start._children(tmp_path / "site", "app", None)] == ["node", "executor"]
    pages = {"metrics": 9471, "dashboard": 9472}
    served = {child.name: child for child in serve._children(federation.folder, "h", 1, "app", 3, pages)}
    assert set(served) == {"link", "gateway", "dispatch", "metrics", "dashboard"}
    assert served["dashboard"].command[-4:] == ["fedserver.dashboard.web", str(federation.folder), "--port", "9472"]
    assert len(serve._children(federation.folder, "h", 1, "app", 3, dict.fromkeys(pages))) == 3
    assert served["dispatch"].command[-2:] == ["--at-once", "3"]
    assert served["metrics"].command[-2:] == ["--port", "9471"]


def test_the_coordinators_figures_are_served_to_this_machine_alone(played):
    client = Browser(gauges.metrics_app(played.federation.folder), "http://localhost:9100")
    assert client.get("/metrics").status_code == 200
    assert client.get("/metrics", headers={"host": "evil.example"}).status_code == 421


def test_figures_of_a_folder_that_cannot_be_read_are_refused_with_the_reason(tmp_path):
    client = Browser(gauges.metrics_app(tmp_path), "http://localhost:9100")
    answer = client.get("/metrics")
    assert answer.status_code == 503
    assert str(tmp_path) in answer.text
