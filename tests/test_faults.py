"""The fault table as a command: every row is tried by something that is there, and its own figures are right."""

import ast
import hashlib
import http.client
import socket
import ssl
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedserver.checkpoint import RunFolder, State, create_run
from shared_models.files import append_json, write_json
from shared_models.identity import new_site_keys, save_secret
from shared_models.weights import save_arrays
from simulations.bench.faults import sent
from simulations.bench.faults.__main__ import SCENARIOS, Seen, add_tests, chosen_faults, named_tests, run_tests
from simulations.bench.faults.app import FIRST, MOST_SITES, moved
from simulations.bench.faults.fleet import FellShort, study
from simulations.bench.faults.ledger import miscounted
from simulations.bench.faults.line import Line
from simulations.bench.faults.sent import MIB, offered
from simulations.bench.faults.table import FAULTS, Fault

ROOT = Path(__file__).parents[1]
TESTS = sorted({test for fault in FAULTS for test in fault.tests})


# The table


def test_every_fault_of_the_matrix_has_a_row_and_something_that_tries_it():
    assert [fault.id for fault in FAULTS] == ["F1", "F2", "F2b", *(f"F{n}" for n in range(3, 27))]
    assert set(SCENARIOS) <= {fault.id for fault in FAULTS}
    assert all(fault.tests for fault in FAULTS)


@pytest.mark.parametrize("node_id", TESTS)
def test_a_test_that_the_table_names_is_there_and_is_not_skipped_without_a_reason(node_id):
    path, _, name = node_id.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    marks = [mark for mark in found.decorator_list if "skip" in ast.unparse(mark) or "xfail" in ast.unparse(mark)]
    assert all(isinstance(mark, ast.Call) and "reason" in {k.arg for k in mark.keywords} for mark in marks)


def test_faults_are_chosen_by_their_numbers_and_an_unknown_one_is_named():
    assert [fault.id for fault in chosen_faults("f8, F2b,F1")] == ["F1", "F2b", "F8"]
    assert len(chosen_faults(None)) == 27
    with pytest.raises(SystemExit, match=r"'F99' is no fault\. There are: F1, F2, F2b"):
        chosen_faults("F99")


FAULT = Fault("F0", "what", "required", ("tests/test_a.py::test_a", "tests/processes/test_b.py::test_b"))


def test_tests_of_processes_are_run_only_where_no_scenario_was():
    assert named_tests([FAULT], {"F0": Seen(ran=True)}) == ["tests/test_a.py::test_a"]
    assert named_tests([FAULT], {"F0": Seen()}) == list(FAULT.tests)


@pytest.mark.parametrize(
    ("outcomes", "verdict", "not_run"),
    [
        (["passed", "passed"], "pass", []),
        (["passed", "failed"], "FAIL", []),
        (["passed", "skipped"], "pass", ["tests/test_a.py::test_a[1]: needs root"]),
        ([], "FAIL", []),
    ],
)
def test_a_fault_is_judged_by_all_parameters_of_its_tests(outcomes, verdict, not_run):
    seen, name = Seen(), FAULT.tests[0]
    lines = [{"test": f"{name}[{i}]", "outcome": o, "why": "needs root"} for i, o in enumerate(outcomes)]
    add_tests(FAULT, {name: lines}, [name], seen)
    assert (seen.verdict, seen.not_run) == (verdict, not_run)


def test_where_the_tests_are_not_at_hand_a_fault_is_not_judged_by_them():
    seen = Seen()
    add_tests(FAULT, None, FAULT.tests[:1], seen)
    assert (seen.verdict, seen.not_run) == ("not run", ["tests/test_a.py::test_a: is not at hand"])


@pytest.mark.parametrize(("code", "told"), [(0, 1), (1, 1), (2, 0), (3, 0), (-9, 0)])
def test_a_pytest_that_broke_off_tells_of_no_test(tmp_path, monkeypatch, code, told):
    def ended(_words, *, env, **_):
        append_json(Path(env["FAULTS_TOLD"]), {"test": "tests/test_a.py::test_a[0]", "outcome": "passed", "why": ""})
        return subprocess.CompletedProcess([], code)

    monkeypatch.setattr(subprocess, "run", ended)
    found = run_tests(["tests/test_a.py::test_a"], tmp_path)
    assert found is not None
    assert len(found) == told


def test_a_scenario_that_fell_short_is_not_made_good_by_tests():
    seen = Seen(failed=["a round hung"], ran=True)
    add_tests(FAULT, {FAULT.tests[0]: [{"test": "t", "outcome": "passed", "why": ""}]}, FAULT.tests[:1], seen)
    assert seen.verdict == "FAIL"


# What a run has counted


def finished(folder: Path, counted: list[dict[str, float]], told: list[list[str]]) -> RunFolder:
    """A run whose round r moved by the given shares of honest updates (site, or `site@round`), and says `told`."""
    run, weights = create_run(folder, "run", study("toy", 9, late="next"), FIRST), dict(FIRST)
    for number, (shares, names) in enumerate(zip(counted, told, strict=True), start=1):
        step = {name: array.astype("f8") for name, array in weights.items()}
        for update, share in shares.items():
            site, _, of = update.partition("@")
            after = moved(weights, site, int(of or number))
            step = {name: step[name] + share * (after[name] - weights[name]) for name in step}
        weights = {name: array.astype("f4") for name, array in step.items()}
        digest = save_arrays(run.weights(number), weights)
        append_json(run.metrics, {"round": number, "sites": {name: {} for name in names}})
        write_json(run.path / "state.json", asdict(State("run", _study_digest(run), number, digest)))
    return run


def _study_digest(run: RunFolder) -> str:
    return hashlib.sha256((run.path / "study.json").read_bytes()).hexdigest()


def test_a_run_whose_every_update_moved_its_weights_once_is_sound(tmp_path):
    halves = {"s1": 0.5, "s2": 0.5}
    thirds = {"s1": 0.4, "s2": 0.4, "s3@1": 0.2}  # a late one weighs half as much
    assert miscounted(finished(tmp_path, [halves, thirds], [["s1", "s2"], ["s1", "s2", "s3 (round 1)"]])) == []


@pytest.mark.parametrize(
    ("counted", "told", "words"),
    [
        ([{"s1": 1.0, "s2": 0.5}], [["s1", "s2"]], "moved otherwise"),
        ([{"s1": 0.5}], [["s1", "s2"]], "moved otherwise"),
        ([{"s1": 0.5, "s2@4": 0.5}], [["s1", "s2"]], "'round' moved otherwise"),
        (
            [{"s1": 1.0}, {"s1": 2 / 3, "s1@1": 1 / 3}],
            [["s1"], ["s1", "s1 (round 1)"]],
            "s1 of round 1 was counted twice",
        ),
    ],
    ids=["twice", "not at all", "of another round", "twice and told"],
)
def test_an_update_that_was_miscounted_is_found(tmp_path, counted, told, words):
    assert any(words in wrong for wrong in miscounted(finished(tmp_path, counted, told)))


def test_each_site_has_a_place_of_its_own():
    after = moved(FIRST, f"s{MOST_SITES}", 3)
    assert after["site"].tolist() == [0.0] * (MOST_SITES - 1) + [1.0]
    assert after["round"][-1] == pytest.approx(0.003)


# A body that is too large


class Peer:
    """A connection to a server that takes so many bytes, and then answers with a status or not at all."""

    def __init__(self, takes: int, status: int | None) -> None:
        self.left, self.status, self.told = takes, status, list[tuple[str, str]]()

    def putrequest(self, *words: str) -> None:
        self.told.append(("POST", words[1]))

    def putheader(self, name: str, value: str) -> None:
        self.told.append((name, value))

    def endheaders(self) -> None:
        pass

    def send(self, block: bytes) -> None:
        if len(block) > self.left:
            raise BrokenPipeError
        self.left -= len(block)

    def getresponse(self) -> SimpleNamespace:
        if self.status is None:
            raise ConnectionResetError
        return SimpleNamespace(status=self.status)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("status", [413, 200, None])
@pytest.mark.parametrize("takes", [0, 3 * MIB, 400 * MIB])
def test_how_a_large_body_ended_is_told_as_it_was(takes, status):
    peer = Peer(takes, status)
    assert offered(peer, "/push", {"key": "k"}) == (status, takes)  # type: ignore[arg-type]
    assert peer.told == [("POST", "/push"), ("key", "k"), ("content-length", str(400 * MIB))]


def test_a_server_that_says_nothing_has_not_hung_up(monkeypatch):
    def silent(_peer: Peer) -> None:
        raise TimeoutError

    monkeypatch.setattr(Peer, "getresponse", silent)
    with pytest.raises(TimeoutError):
        offered(Peer(0, None), "/push", {})  # type: ignore[arg-type]


@pytest.fixture
def large_body(tmp_path, monkeypatch):
    """Offers the body of the table to a peer, in the place of the coordinator's gateway."""
    save_secret(tmp_path / "keys/node.key", new_site_keys().node)
    here, context = SimpleNamespace(folder=lambda _site: tmp_path, port=1), ssl.create_default_context()

    def offer(takes_mib: int, status: int | None) -> str:
        peer = Peer(takes_mib * MIB, status)
        monkeypatch.setattr(http.client, "HTTPSConnection", lambda *_, **__: peer)
        return sent._big_body(here, "s1", context)  # type: ignore[arg-type]

    return offer


def test_a_large_body_is_refused_with_a_status_or_by_hanging_up(large_body):
    assert (large_body(3, 413), large_body(3, None)) == ("413", "cut off")


@pytest.mark.parametrize(
    ("takes_mib", "status", "told"),
    [
        (3, 200, "answered with 200"),
        (400, None, "400 MiB of 400 MB were taken"),
        (400, 413, "400 MiB of 400 MB were taken"),
    ],
)
def test_a_large_body_that_is_taken_falls_short(large_body, takes_mib, status, told):
    with pytest.raises(FellShort, match=told):
        large_body(takes_mib, status)


# The line


@pytest.fixture
def echo():
    """A line to a server that sends back what it gets, and a connection through it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = Line(server.getsockname()[1])
        near = socket.create_connection(("127.0.0.1", line.port), timeout=5)
        far, _ = server.accept()
        far.settimeout(5)
        yield line, near, far
        near.close()
        far.close()
        line.close()


def test_a_silent_line_holds_back_what_is_sent_and_loses_nothing(echo):
    line, near, far = echo
    with line.silent():
        near.sendall(b"order")
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(10)
    far.settimeout(5)
    assert far.recv(10) == b"order"


def test_a_cut_line_ends_connections_and_takes_none_until_it_is_whole(echo):
    line, near, far = echo
    with line.cut():
        assert far.recv(10) == b""
        assert near.recv(10) == b""
        with socket.create_connection(("127.0.0.1", line.port), timeout=5) as refused:
            assert refused.recv(10) == b""
    with socket.create_connection(("127.0.0.1", line.port), timeout=5) as again:
        again.sendall(b"x")
