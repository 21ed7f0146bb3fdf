"""What the dashboard says: an audit log that is verified as it grows, and figures that are the hand-computed ones."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedserver import plots, report
from fedserver.backup import SECRET
from fedserver.checkpoint import RunFolder, create_run
from fedserver.comparison import ALL
from fedserver.dashboard import view
from fedserver.dashboard.book import MOST_EVENTS, Book, Chain
from fedserver.dashboard.login import TOKEN, token_path
from fedserver.dashboard.look import environment, likely, palette
from shared_models.audit import AuditLog
from shared_models.audit_check import verify_log
from shared_models.figure_text import DASH
from shared_models.files import append_json
from shared_models.identity import identity_public_key, new_site_keys
from shared_models.live.pages import ICONS, STATIC
from shared_models.protect.privacy import Protect
from shared_models.protect.secure import SecureAggregation
from shared_models.study import Evaluate, Rounds, Study
from shared_models.weights import schema_of, size_bytes
from tests.toys import WEIGHTS

KEY = new_site_keys().identity
STUDY = Study(name="toy", rounds=Rounds(count=4, quorum=2), evaluate=Evaluate(every=1))


# The audit log


@pytest.fixture
def log(quick_folder: Path) -> AuditLog:
    made = AuditLog(quick_folder / "audit.jsonl", "coordinator", KEY)
    for number in (1, 2, 3):
        made.add("order", site="north", run="a", round=number)
        made.add("reply-counted", site="north", run="a", round=number, why="")
    return made


def book_of(log: AuditLog) -> Book:
    made = Book(log.path.parent, lambda: identity_public_key(KEY))
    made.look()
    return made


def test_a_whole_log_is_said_to_be_whole_and_goes_on_being_so_as_it_grows(log):
    book = book_of(log)
    assert (book.chain.lines, book.chain.known, book.chain.bad) == (7, 7, None)
    log.add("revoked", site="south", reason="has ended")
    book.look()
    assert (book.chain.lines, book.chain.known, book.chain.bad) == (8, 8, None)
    assert verify_log(log.path.read_bytes(), identity_public_key(KEY)).lines == 8


def test_an_edit_of_what_was_verified_long_ago_is_noticed_at_the_next_look(log):
    book = book_of(log)
    log.path.write_bytes(log.path.read_bytes().replace(b'"round":2', b'"round":9', 1))
    book.look()
    assert book.chain.bad is not None
    assert book.chain.bad[0] == 4, "line 1 opens the log, 2 and 3 are of round 1"
    assert "is not signed by the key" in book.chain.bad[1]


def test_a_log_that_was_cut_or_is_gone_is_told_and_so_is_its_return(log):
    book, whole = book_of(log), log.path.read_bytes()
    log.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    book.look()
    assert book.chain.bad is not None
    assert "the end was cut off" in book.chain.bad[1]
    log.path.unlink()
    book.look()
    assert book.chain.bad == (1, "and all others are missing: the log is gone")
    book.look()
    assert book.chain.bad is not None, "still"
    log.path.write_bytes(whole)
    book.look()
    assert book.chain == Chain(7, 7, None)


def test_a_log_that_is_not_there_yet_is_no_trouble(tmp_path):
    book = Book(tmp_path, lambda: identity_public_key(KEY))
    book.look()
    assert view.chain(book)["words"] == "Nothing is written yet."
    assert book.chain.bad is None


def test_another_log_in_its_place_is_not_taken_for_it(log):
    book = book_of(log)
    for path in (log.path, log.path.with_suffix(".head.json")):
        path.unlink()
    AuditLog(log.path, "coordinator", new_site_keys().identity).add("order", site="north")
    book.look()
    assert book.chain.bad is not None
    assert book.chain.bad[0] == 1


def test_a_log_that_was_begun_with_a_renewed_key_is_whole_again(log):
    key = [identity_public_key(KEY)]
    book = Book(log.path.parent, lambda: key[0])
    book.look()
    renewed = new_site_keys().identity
    key[0] = identity_public_key(renewed)
    AuditLog(log.path, "coordinator", renewed).add("founded", name="x")
    book.look()
    assert book.chain == Chain(2, 2, None)
    assert [event.what for event in book.latest] == ["log begun", "federation founded"]


def test_a_line_that_is_still_being_written_is_waited_for(log):
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-20])
    head = log.path.with_suffix(".head.json")
    kept = head.read_bytes()
    head.unlink()
    book = book_of(log)
    assert (book.chain.known, book.chain.bad) == (6, None)
    log.path.write_bytes(whole)
    head.write_bytes(kept)
    book.look()
    assert (book.chain.lines, book.chain.known, book.chain.bad) == (7, 7, None)


def test_a_long_log_is_verified_bit_by_bit_and_says_so(log):
    book = Book(log.path.parent, lambda: identity_public_key(KEY))
    book.look(most_s=0.0)
    assert (book.chain.lines, book.chain.known) == (0, 7)
    assert view.chain(book)["mark"] == "work"
    assert view.chain(book)["words"] == "0 of 7 lines are verified so far, none of them is bad."
    assert len(book.latest) > 0, "what has happened is told at once"
    book.look()
    assert view.chain(book)["words"] == "All 7 lines are whole, in order and signed."


def test_events_are_told_without_the_routine_and_only_the_latest(log):
    for number in range(MOST_EVENTS + 5):
        log.add("run-queued", run=f"run-{number}")
    log.add("reply-refused", site="south", run="a", round=4, why="DATA_NOT_READY")
    log.add("never-heard-of", site=["no", "text"], run=None, round="x")
    book = book_of(log)
    assert len(book.latest) == MOST_EVENTS
    assert [event.what for event in book.latest][-3:] == ["run queued", "order refused", "never heard of"]
    refused = book.latest[-2]
    assert (refused.site, refused.run, refused.round, refused.words) == ("south", "a", 4, "DATA_NOT_READY")
    assert refused.mark == "bad"
    assert not any(event.what == "order" for event in book.latest)


@pytest.mark.parametrize("moment", [b"1e18", b"-1e18", b"1e308", b"NaN", b"Infinity", b"true", b'"noon"'])
def test_an_edited_line_of_no_day_is_named_and_hides_no_other(log, moment):
    log.add("revoked", site="south", reason="has ended")
    log.add("run-queued", run="b")
    lines = log.path.read_bytes().split(b"\n")
    lines[7] = re.sub(rb'"time":[0-9.e+]+', b'"time":' + moment, lines[7])
    log.path.write_bytes(b"\n".join(lines))
    book = book_of(log)
    assert book.chain.bad is not None
    assert book.chain.bad[0] == 8
    text = environment().get_template("audit.html").render(chain=view.chain(book), events=list(book.latest))
    assert "run queued" in text


def test_each_site_has_its_last_word(log):
    log.add("refused", code="REVOKED", times=3, site="north")
    book = book_of(log)
    assert (book.latest[-1].what, book.latest[-1].words) == ("turned away at the gateway", "REVOKED, 3 times")
    assert (book.last_words["north"].what, book.last_words["north"].round) == ("reply counted", 3)
    assert "south" not in book.last_words


# The round


def run_facts(**change: Any) -> dict[str, Any]:
    made = {
        "id": "a", "study": "toy", "state": "running", "message": "", "finished_rounds": 2, "rounds": 4, "queue": None,
        "pausing": None,
        "progress": {
            "phase": "train", "round": 3, "rounds": 4, "quorum": 2, "updated_at": 1000.0, "deadline_in_s": 60.0,
            "left_s": 200.0,
            "sites": {
                "north": {"state": "counted", "reason": "", "attempt": 1, "since": 990.0},
                "south": {"state": "asked", "reason": "is working on it", "attempt": 2, "since": 950.0},
                "east": {"state": "refused", "reason": "DATA_NOT_READY", "attempt": 1, "since": 960.0},
                "west": {"state": "away", "reason": "is not online", "attempt": 0, "since": 900.0},
            },
        },
    }  # fmt: skip
    return made | change


def test_a_round_says_whom_it_waits_for_since_when_and_till_when():
    now = view.round_now(run_facts(), None, {}, 1001.0)
    assert (now["phase"], now["answered"], now["quorum"], now["done"]) == ("training", 1, 2, 2)
    assert [(seat["site"], seat["why"], seat["since"]) for seat in now["waits"]] == [
        ("south", "is working on it", 950.0), ("west", "is not online", 900.0)]  # fmt: skip
    assert [seat["site"] for seat in now["seats"]] == ["south", "west", "east", "north"], "whom it waits for first"
    assert (now["until"], now["ends"], now["quiet"]) == (1060.0, 1200.0, None)
    assert now["sentence"] == "a: round 3 of 4, training; waits for south, west."


def test_moments_do_not_waver_while_a_round_goes_on():
    steady: view.Steady = {}
    first = view.round_now(run_facts(), None, steady, 1000.0)
    later = run_facts()
    later["progress"] |= {"updated_at": 1020.4, "deadline_in_s": 40.1}
    second = view.round_now(later, None, steady, 1020.0)
    assert (second["until"], second["ends"]) == (first["until"], first["ends"])
    later["progress"] |= {"deadline_in_s": 90.0}
    assert view.round_now(later, None, steady, 1020.0)["until"] == pytest.approx(1110.4)


def test_a_process_that_says_nothing_any_more_is_told():
    assert view.round_now(run_facts(), None, {}, 1031.0)["quiet"] == 1000.0


def test_a_run_that_has_not_begun_its_first_round_is_shown_too():
    now = view.round_now(run_facts(progress={}, finished_rounds=None, rounds=None), None, {}, 1.0)
    assert (now["phase"], now["seats"], now["until"]) == ("is about to begin", [], None)
    assert now["sentence"] == "a: is about to begin."


def test_runs_stand_in_the_order_in_which_they_matter():
    facts = {"runs": [
        run_facts(id="old", state="finished"), run_facts(id="new", state="finished"),
        run_facts(id="rests", state="paused"), run_facts(id="later", state="queued", queue=2),
        run_facts(id="next", state="queued", queue=1), run_facts(id="now"),
    ]}  # fmt: skip
    assert [run["id"] for run in view.runs(facts)] == ["now", "next", "later", "rests", "new", "old"]
    assert likely(facts) == "now"
    assert likely({"runs": facts["runs"][:2]}) == "new"
    assert likely({"runs": [run_facts(id="only", state="queued", finished_rounds=0)]}) == "only"
    assert likely({"runs": []}) is None


# Curves, the matrix and what it costs


def line(number: int, sites: Mapping[str, tuple[float, float]], **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; a site has its loss and its seconds."""
    size = size_bytes(schema_of(WEIGHTS))
    told = {
        site: {"examples": 10, "steps": 2, "seconds": seconds, "losses": [loss, loss], "attempt": 1, "device": "cpu",
               "scores": {}}
        for site, (loss, seconds) in sites.items()
    }  # fmt: skip
    return {"round": number, "weights_sha256": "0" * 64, "seconds": 10.0, "sites": told, "left_out": {},
            "bytes_down": 2 * size, "bytes_up": size * len(sites), **more}  # fmt: skip


@pytest.fixture
def run(quick_folder: Path) -> RunFolder:
    return create_run(quick_folder, "a", STUDY, WEIGHTS)


def found_of(run: RunFolder, *lines: Mapping[str, Any]) -> dict[str, Any]:
    for each in lines:
        append_json(run.metrics, each)
    return report.facts(run)


def test_bytes_and_seconds_are_those_of_each_site_and_round(run):
    found = found_of(run, line(1, {"north": (1.0, 2.0), "south": (2.0, 4.0)}), line(2, {"north": (0.5, 3.0)}))
    cost, size = view.cost(run, found), size_bytes(schema_of(WEIGHTS))
    north, south = cost["sites"]
    assert (north["rounds"], north["mean"], north["last"], north["up"], north["down"]) == (
        2,
        2.5,
        3.0,
        2 * size,
        2 * size,
    )
    assert (south["rounds"], south["mean"], south["last"], south["up"], south["down"]) == (1, 4.0, 4.0, size, size)
    assert sum(row["up"] for row in cost["sites"]) == found["totals"]["bytes_up"]
    assert [(row["round"], row["sites"]) for row in cost["rounds"]] == [(2, [3.0, None]), (1, [2.0, 4.0])]


def test_a_curve_has_a_gap_where_a_site_was_not_there(run):
    found = found_of(
        run, line(1, {"north": (1.0, 1.0)}), line(2, {"south": (3.0, 1.0)}), line(3, {"north": (0.5, 1.0)})
    )
    (loss,) = view.charts(found, view.styles_of(found))
    assert loss["rounds"] == [1, 2, 3]
    assert [(each["site"], each["values"]) for each in loss["lines"]] == [
        ("north", [1.0, None, 0.5]), ("south", [None, 3.0, None])]  # fmt: skip
    assert loss["rows"][0] == (3, ["0.500", DASH])
    assert loss["said"] == "Line chart by round. Latest: north 0.500, south 3.000."


def test_a_long_run_is_drawn_and_listed_by_its_latest_rounds(run):
    found = found_of(run, *(line(n, {"north": (1.0, 1.0)}) for n in range(1, view.MOST_POINTS + 11)))
    (loss,) = view.charts(found, view.styles_of(found))
    assert (len(loss["rounds"]), loss["rounds"][0]) == (view.MOST_POINTS, 11)
    assert (len(loss["rows"]), loss["cut"]) == (view.MOST_ROWS, True)


def test_of_a_run_through_secure_sums_nothing_of_one_site_is_shown(quick_folder):
    study = Study(
        name="sum", rounds=Rounds(count=4, quorum=3),
        protect=Protect(secure_aggregation=SecureAggregation(clip=1.0)),
    )  # fmt: skip
    run = create_run(quick_folder, "s", study, WEIGHTS)
    together = {"sites": ["east", "north", "south"], "examples": 30, "clipped": 0, "attempt": 1, "losses": [1.0, 0.5],
                "scores": {}}  # fmt: skip
    found = found_of(run, line(1, {}, together=together, bytes_up=300))
    charts, cost = view.charts(found, view.styles_of(found)), view.cost(run, found)
    assert [each["site"] for each in charts[0]["lines"]] == [ALL]
    assert [(row["site"], row["up"], row["mean"]) for row in cost["sites"]] == [
        ("east", 100, None), ("north", 100, None), ("south", 100, None)]  # fmt: skip
    assert cost["names"] == []


def test_the_matrix_has_a_row_for_each_site_and_names_the_worst():
    test = {"sites": {"north": {"value": 0.9, "cases": 12}, "south": {"value": 0.5, "cases": 20}},
            "personalised": {"south": {"value": 0.7}}, "worst": "south", "all_cases": None}  # fmt: skip
    found = {
        "measure": {"name": "Dice"},
        "comparison": None,
        "secure": None,
        "test": {"lung": test},
        "labels": ["lung"],
        "not_tested": {"west": {"state": "pending", "reason": "awaits approval at the site"}},
    }
    (matrix,) = view.matrices(found)
    assert matrix["title"] == "Test Dice: lung"
    assert matrix["models"] == ["federated", "each site's own"]
    north, south, west = matrix["rows"]
    assert (north["site"], north["cases"], north["worst"]) == ("north", 12, False)
    assert north["cells"] == [{"value": "0.900", "heat": view.HEATS}, {"value": DASH, "heat": None}]
    assert south["cells"] == [{"value": "0.500", "heat": 0}, {"value": "0.700", "heat": view.HEATS // 2}]
    assert south["worst"]
    assert (west["note"], west["cells"][0]["heat"]) == ("not now: awaits approval at the site", None)


def test_a_model_that_finds_nothing_anywhere_is_shown_with_its_zeros():
    test = {"sites": {s: {"value": 0.0, "cases": 4} for s in ("north", "south")}, "personalised": {}, "worst": "north",
            "all_cases": None}  # fmt: skip
    found = {
        "measure": {"name": "Dice"}, "comparison": None, "secure": None, "test": {"lung": test}, "labels": ["lung"],
        "not_tested": {},
    }  # fmt: skip
    (matrix,) = view.matrices(found)
    assert [row["cells"][0]["value"] for row in matrix["rows"]] == ["0.000", "0.000"]


def test_a_comparison_is_shown_with_all_its_models():
    rows = [
        {"model": f"{name} alone", "trained": name, "values": {s: {"mean": 0.8, "deviation": None} for s in "ab"}}
        for name in "ab"
    ]
    found = {
        "measure": {"name": "Dice"},
        "comparison": {"matrix": rows},
        "labels": ["lung"],
        "test": {},
        "secure": None,
    }
    (matrix,) = view.matrices(found)
    assert matrix["models"] == ["a alone", "b alone"]
    assert [row["site"] for row in matrix["rows"]] == ["a", "b"]


# What it looks like


def channel(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, contrast ratio."""
    light = []
    for colour in (one, other):
        red, green, blue = (channel(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
        light.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(light) + 0.05) / (min(light) + 0.05)


def themes() -> list[dict[str, str]]:
    """Colours by name: of light, and of dark."""
    text = (STATIC / "live.css").read_text()
    blocks = re.findall(r":root \{([^}]*)\}", text)[:2]
    light = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", blocks[0]))
    return [light, light | dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", blocks[1]))]


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "soft", "accent", "good", "work", "look", "bad", "quiet"])
def test_words_can_be_read_on_card_and_paper(theme, name):
    for ground in ("card", "paper"):
        assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)


@pytest.mark.parametrize(
    ("theme", "colours"), zip(themes(), (plots.LIGHT, plots.DARK), strict=True), ids=["light", "dark"]
)
def test_lines_of_charts_can_be_told_from_their_ground(theme, colours):
    for colour in colours:
        assert contrast(colour, theme["card"]) >= 3.0, colour


def test_each_cell_of_the_matrix_can_be_read():
    cells = re.findall(r"\.heat-\d+\{background:(#\w{6});color:(#\w{6})\}", palette())
    assert len(cells) == view.HEATS + 1
    for background, ink in cells:
        assert contrast(background, ink) >= 4.5, background


def test_every_state_has_a_mark_of_its_own_beside_its_colour():
    marks = [*view.SEATS.values(), *view.RUNS.values(), *view.STAGES.values()]
    assert {ICONS[mark] for mark in marks} == {icon for mark, icon in ICONS.items() if mark}
    assert len(set(ICONS.values())) == len(ICONS)


def test_the_token_is_a_secret_of_the_folder():
    """What a backup encrypts is what lies in `secrets`."""
    assert token_path(Path("f")) == Path("f/secrets") / TOKEN
    assert "secrets/" in SECRET
