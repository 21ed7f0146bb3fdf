"""Faults of what a site sends or refuses: lies about updates, floods, versions, policies, and work that never ends."""

import base64
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from fedclient.ledger import open_ledger
from fedclient.overview import overview
from fedclient.site import read_site_file
from fedserver.checkpoint import RunFolder
from fedserver.fleet import PUSH_MESSAGES
from fedserver.gateway import NODE_KEY_HEADER
from fedserver.listener import MOST_STRANGERS
from shared_models.identity import node_public_key, node_public_pem
from shared_models.protect.privacy import Privacy, Protect
from shared_models.study import Strategy, Study, Train
from shared_models.transfer import site_context
from simulations.bench.faults.fleet import COORDINATOR, Fleet, await_finished, await_that, round_of, study, told
from simulations.bench.faults.kills import check, everybody, sound

MIB = 1 << 20
BIG_BYTES = 400 * MIB
MOST_TAKEN_BYTES = 100 * MIB  # of them: more than the gateway reads to be heard (64 MiB), and buffers on the way
IDLE = 400
MOST_GROWTH = 1.5
LIAR = "s3"


def left_out(run: RunFolder, number: int, site: str) -> str:
    """How a site was left out of a round: `rejected UPDATE_SCHEMA: ...`"""
    found = told(run, number)["left_out"].get(site, {})
    return f"{found.get('state', 'counted')} {found.get('reason', '')}".strip()


def lies(here: Fleet, name: str, words: dict[str, str]) -> str:
    """A round for each word, in which s3 tells it; it must be left out for that reason, and the others counted."""
    here.honest()
    here.script(LIAR, each=dict(enumerate(words, start=1)))
    run = here.begin(name, study(name, len(words), deadline_s=60.0))
    here.finish(name)
    for number, (word, reason) in enumerate(words.items(), start=1):
        found = left_out(run, number, LIAR)
        check(found.startswith(reason), f"{word}: s3 was {found!r}, due is {reason!r}")
    sound(run)
    here.honest()
    return f"{len(words)} kinds, each named and left out by itself: {', '.join(words)}"


def nonfinite(here: Fleet) -> str:
    seen = lies(here, "f13", {
        "diverge": "refused TRAINING_DIVERGED",
        "nan": "rejected UPDATE_NONFINITE",
        "infinity": "rejected UPDATE_NONFINITE",
    })  # fmt: skip
    return f"{seen}; the site's own check answers first (diverge)"


def schema(here: Fleet) -> str:
    words = ("shape", "dtype", "missing", "extra")
    return lies(here, "f14", {**dict.fromkeys(words, "rejected UPDATE_SCHEMA"), "garbage": "rejected MESSAGE_INVALID"})


def weights(here: Fleet) -> str:
    return lies(here, "f15", {
        **dict.fromkeys(("negative", "none", "huge"), "rejected EXAMPLES_RANGE"),
        "far": "rejected UPDATE_RANGE",
    })  # fmt: skip


def replayed(here: Fleet) -> str:
    (here.folder(LIAR) / "replayed.json").unlink(missing_ok=True)
    return lies(here, "f17", {
        "not-sent": "rejected UPDATE_MISSING",
        "no-blob": "rejected UPDATE_MISSING",
        "other-site": "rejected OTHER_SITE",
        "other-study": "rejected OTHER_STUDY",
        "other-weights": "rejected OTHER_WEIGHTS",
        "foreign": "rejected MESSAGE_INVALID",
        "forge": "rejected BAD_SIGNATURE",
    }) + "; " + _replay(here)  # fmt: skip


def _replay(here: Fleet) -> str:
    """The first reply is kept and is honest; the same bytes in the next round are not."""
    run = here.begin("f17-replay", study("f17-replay", 2, deadline_s=60.0))
    here.script(LIAR, do="replay")
    here.finish("f17-replay")
    found = left_out(run, 2, LIAR)
    check(LIAR in told(run, 1)["sites"], "its first, honest reply was not counted")
    check(found.startswith("rejected STALE_ROUND"), f"the replayed reply: {found!r}")
    sound(run)
    here.honest()
    return f"an earlier reply word for word: {found.split(':')[0]}"


def resident(here: Fleet) -> dict[str, int]:
    """Bytes of memory of the coordinator's gateway and SuperLink."""
    pids = {child: here.pid(COORDINATOR, child) for child in ("gateway", "link")}
    return {child: psutil.Process(pid).memory_info().rss for child, pid in pids.items() if pid}


def flood(here: Fleet) -> str:
    """While a run goes on: a body of 400 MB, 400 idle connections, a bomb inside a reply; the gateway outlives them."""
    here.honest(1.0)
    run = here.begin("f16", study("f16", 200, deadline_s=30.0))
    await_that("round 1 is finished", lambda: round_of(run) >= 1)
    before, most, gateway = resident(here), dict[str, int](), here.pid(COORDINATOR, "gateway")
    host, context = "127.0.0.1", site_context(here.folder("s1") / "keys")
    with ExitStack() as held:
        refused = _big_body(here, "s1", context)
        stranger = ssl.create_default_context(cafile=str(here.federation.ca_certificate))
        idle = [c for c in (_idle(held, host, here.port, stranger) for _ in range(IDLE)) if c]
        for _ in range(20):
            most = {child: max(size, most.get(child, 0)) for child, size in resident(here).items()}
            time.sleep(0.1)
        at = round_of(run)
        await_that("rounds go on meanwhile", lambda: round_of(run) > at)
        kept = sum(map(_is_open, idle))
        check(kept <= MOST_STRANGERS, f"{kept} idle connections of strangers are kept")
    for child, size in most.items():
        growth = size / before[child]
        check(growth < MOST_GROWTH, f"{child}: memory grew {growth:.2f} times")
    here.script(LIAR, do="bomb")
    at = round_of(run)
    number = await_that("the bomb is refused", lambda: _refused_in(run, at), 90)
    found = left_out(run, number, LIAR)
    here.honest()
    here.cease("f16")
    sound(run)
    growth = max(resident(here)[child] / before[child] for child in before)
    check(growth < MOST_GROWTH, f"memory grew {growth:.2f} times after the bomb")
    check(here.pid(COORDINATOR, "gateway") == gateway, "the gateway has ended over it, and was started again")
    return (
        f"400 MB: {refused}; {kept} of {IDLE} idle connections of strangers kept; tensors in a message: refused, "
        f"{LIAR} {found.split(':')[0]}; memory grew {growth:.2f} times, rounds went on"
    )


def _refused_in(run: RunFolder, after: int) -> int | None:
    return next((n for n in range(after + 1, round_of(run) + 1) if LIAR in told(run, n)["left_out"]), None)


def _big_body(here: Fleet, site: str, context: ssl.SSLContext) -> str:
    """How 400 MB of an enrolled node were refused, most of them untaken."""
    key = node_public_pem(node_public_key((here.folder(site) / "keys/node.key").read_bytes()))
    with closing(http.client.HTTPSConnection("127.0.0.1", here.port, context=context, timeout=60)) as connection:
        status, taken = offered(connection, PUSH_MESSAGES, {NODE_KEY_HEADER: base64.b64encode(key).decode()})
    check(status in (None, 413), f"400 MB were answered with {status}")
    check(taken < MOST_TAKEN_BYTES, f"{taken // MIB} MiB of 400 MB were taken")
    return "cut off" if status is None else str(status)


def offered(connection: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> tuple[int | None, int]:
    """The status of the answer to 400 MB, and how many bytes were taken; None where the connection broke before it.

    The body is announced, and sent while it is taken. An answer that is followed by a reset may be lost on its way.
    """
    taken = 0
    try:
        connection.putrequest("POST", path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(BIG_BYTES))
        connection.endheaders()
        with suppress(OSError):
            while taken < BIG_BYTES:
                connection.send(bytes(MIB))
                taken += MIB
        return connection.getresponse().status, taken
    except TimeoutError:  # neither an answer nor an end
        raise
    except (OSError, http.client.HTTPException):
        return None, taken


def _idle(held: ExitStack, host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket | None:
    """A connection that says nothing; None where it was not let in."""
    try:
        plain = held.enter_context(socket.create_connection((host, port), timeout=2))
        return held.enter_context(context.wrap_socket(plain, server_hostname=host))
    except OSError:
        return None


def _is_open(connection: ssl.SSLSocket) -> bool:
    """Whether the other side has not hung up."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except (ssl.SSLWantReadError, BlockingIOError):
        return True
    except OSError:
        return False


def policy_conflict(here: Fleet) -> str:
    here.honest()
    file = read_site_file(here.folder(LIAR))
    here.write_site(replace(file, policy=replace(file.policy, protections=("secure-sum",))))
    try:
        run = here.begin("f22", study("f22", 1))
        here.finish("f22")
    finally:
        here.write_site(file)
    found = left_out(run, 1, LIAR)
    check(found == "refused OUTSIDE_POLICY (protections)", f"{LIAR}: {found}")
    sound(run)
    return f"{found}; the others' round was made"


def endless_work(here: Fleet) -> str:
    """An order that hangs, one that is slow, one that finds no memory, one that is private."""
    hung = hanging_call(here)
    with order_limit(here, 4.0):
        slow = lies_by_work(here, "f25-slow", seconds=60.0)
    check(slow == "refused TRAIN_TIMEOUT", f"slow steps: {slow}")
    memory = lies_by_work(here, "f25-memory", do="out-of-memory")
    check(memory == "failed OUT_OF_MEMORY", f"no memory: {memory}")
    return f"{hung}; slow steps: {slow}; no memory: {memory}; {_private_hang(here)}"


@contextmanager
def order_limit(here: Fleet, seconds: float) -> Iterator[None]:
    """`[limits] order_s` of s3, until the block ends."""
    file = read_site_file(here.folder(LIAR))
    here.write_site(replace(file, limits=replace(file.limits, order_s=seconds)))
    try:
        yield
    finally:
        here.write_site(file)


def hanging_call(here: Fleet) -> str:
    """Training hangs in a call that holds the interpreter, so that no thread of its process runs any more."""
    here.honest(0.5)
    here.script(LIAR, do="hang", rounds=[1])
    with order_limit(here, 4.0):
        run = here.begin("f25", study("f25", 2, deadline_s=100.0))
        await_finished(run, 1, 120)
        here.finish("f25")
    found, took = left_out(run, 1, LIAR), float(told(run, 1)["seconds"])
    check(found == "failed TRAIN_TIMEOUT", f"a call that never returns: {found}")
    everybody(here, run, 2)
    sound(run)
    check("app.py" in here.log(LIAR, "executor"), "its log does not tell where it hung")
    words = overview(here.folder(LIAR))["warnings"]
    check(any("TRAIN_TIMEOUT" in each for each in words), f"`fedclient status` does not tell: {words}")
    return f"a call that never returns: ended from outside, {found} after {took:.0f} s, counted in the next round"


def lies_by_work(here: Fleet, name: str, do: str = "", seconds: float = 0.0) -> str:
    """How s3 was left out of the one round in which its work goes wrong; it must be counted in the next."""
    here.honest()
    here.script(LIAR, do=do, seconds=seconds, rounds=[1])
    run = here.begin(name, study(name, 2, deadline_s=60.0))
    here.finish(name)
    everybody(here, run, 2)
    sound(run)
    return left_out(run, 1, LIAR)


def private(name: str, rounds: int) -> Study:
    """A study that spends privacy; nothing is learned in it, and no noise is in its updates."""
    made = study(name, rounds, deadline_s=60.0)
    return replace(
        made,
        train=Train(local_steps=4, precision="float32"),
        strategy=Strategy(weighting="uniform"),
        protect=Protect(Privacy(noise_multiplier=2.0, sample_rate=0.25)),
    )


def with_budgets(here: Fleet, most: float) -> None:
    for site in here.sites:
        open_ledger(here.folder(site)).set_budget("all", most, 1e-5)


def _private_hang(here: Fleet) -> str:
    """What is reserved for work that hangs stays spent."""
    with_budgets(here, 50.0)
    here.honest()
    here.script(LIAR, seconds=60.0, rounds=[1])
    with order_limit(here, 2.0):
        run = here.begin("f25-private", private("f25-private", 1))
        here.finish("f25-private")
    accounts = {site: open_ledger(here.folder(site)).accounts()[0] for site in here.sites}
    open_now = {site: account.open for site, account in accounts.items()}
    check(open_now == {"s1": 0, "s2": 0, "s3": 1}, f"reservations that were never settled: {open_now}")
    check(accounts[LIAR].spent == accounts["s1"].spent > 0, "what it reserved was given back")
    sound(run)
    return "its privacy stays spent"


def ledger_rolled_back(here: Fleet) -> str:
    """A ledger that was put back from a backup, then a budget that is spent."""
    here.honest()
    with_budgets(here, 50.0)
    ledger = here.folder(LIAR) / "ledger.db"
    for path in _files_of(ledger):
        saved = path.with_name(f"saved-{path.name}")
        saved.write_bytes(path.read_bytes())
        saved.chmod(0o600)
    here.begin("f26-before", private("f26-before", 1))
    here.finish("f26-before")
    newest = {path: path.read_bytes() for path in _files_of(ledger)}
    for path in _files_of(ledger):
        path.unlink()
    for saved in here.folder(LIAR).glob("saved-ledger.db*"):
        saved.rename(saved.with_name(saved.name.removeprefix("saved-")))
    run = here.begin("f26", private("f26", 1))
    here.finish("f26")
    found = left_out(run, 1, LIAR)
    check(found == "refused LEDGER_ROLLBACK", f"a ledger from a backup: {found}")
    alarms = " ".join(overview(here.folder(LIAR))["alarms"])
    check("put back from a backup" in alarms, f"`fedclient status` raises no alarm: {alarms!r}")
    for path in _files_of(ledger):
        path.unlink()
    for path, content in newest.items():
        path.write_bytes(content)
        path.chmod(0o600)
    here_budget = open_ledger(here.folder(LIAR))
    here_budget.set_budget("all", here_budget.accounts()[0].spent + 1e-6, 1e-5)
    spent = here.begin("f26-spent", private("f26-spent", 1))
    here.finish("f26-spent")
    exhausted = left_out(spent, 1, LIAR)
    check(exhausted == "refused DP_BUDGET_EXHAUSTED", f"a budget that is spent: {exhausted}")
    return f"{found}, an alarm in `fedclient status`; a spent budget: {exhausted}; the others' rounds were made"


def _files_of(database: Path) -> list[Path]:
    return sorted(path for path in database.parent.glob(f"{database.name}*") if path.is_file())


SCENARIOS: dict[str, Callable[[Fleet], str]] = {
    "F13": nonfinite,
    "F14": schema,
    "F15": weights,
    "F16": flood,
    "F17": replayed,
    "F22": policy_conflict,
    "F25": endless_work,
    "F26": ledger_rolled_back,
}
