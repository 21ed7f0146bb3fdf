"""Replies as they come: each is seen to be the answer to its order, then counted, or left out with its reason.

What is no answer to the order that it names (see `shared_models.envelope`) is no word of the site that was asked: it is
written down, and the site is asked again, so that nobody is shut out of a round by what others send in his name.
"""

import logging
from collections.abc import Mapping

import httpx
from flwr.app import Message

from fedserver.setting import MOST_REASON, Accept, Seat, Setting, Table, Waited, note
from fedserver.signed import keep
from shared_models.envelope import Asked, opened
from shared_models.errors import AnswerForged, FederationError, UpdateRejected, WeightsInvalid
from shared_models.wire import MessageInvalid, Reply, SignedReply, read_signed

log = logging.getLogger("fedserver")
LATER = {  # refusals that are no last word: the round does without the site, and asks it again
    "APPROVAL_PENDING": "awaits approval at the site",
    "OUTSIDE_HOURS": "its hospital computes at other hours",
}
LOST = frozenset({3, 4, 5, 8})  # Flower's error codes of a node or app that went away, not of one that said no


def shut_out(setting: Setting, seats: Mapping[str, Seat]) -> Mapping[str, str]:
    """Takes their seats from the sites that are revoked: they are not waited for, nor is what they send counted."""
    revoked = setting.revoked()
    for site, words in revoked.items():
        if site in seats and seats[site].state != "counted":
            seats[site].state, seats[site].reason = "revoked", words
    return revoked


def take(setting: Setting, table: Table, asked: dict[str, Waited], seats: Mapping[str, Seat], accept: Accept) -> bool:
    """Pulls what has arrived and settles its seats; true when there was anything.

    Each reply is pulled by itself: Flower 1.41 has handed over for good all that one call asks for before it reads any
    of it, so that one reply that cannot be read would take those of other sites with it.
    """
    arrived = False
    for asked_for in [*asked, *table.late]:
        messages = _pull(setting, asked_for)
        if messages is None:
            arrived = True
            table.late.pop(asked_for, None)
            if asked_for in asked:
                waited = asked.pop(asked_for)
                words = "MESSAGE_UNREADABLE: its reply is no message of Flower"
                _forged(setting, waited, seats[waited.site], asked, words)
            continue
        arrived = arrived or bool(messages)
        revoked = shut_out(setting, seats) if messages else {}
        for message in messages:
            message_id = message.metadata.reply_to_message_id
            if message_id in table.late:
                waited = table.late.pop(message_id)
                if waited.site not in revoked and not message.has_error():
                    _take_late(setting, table, waited, message, accept)
            elif message_id in asked:
                waited = asked.pop(message_id)
                _settle(setting, table, waited, asked, seats[waited.site], message, accept)
    return arrived


def _pull(setting: Setting, message_id: str) -> list[Message] | None:
    """The reply to an order, where it is there; None of one that cannot even be read: Flower raises what its parser
    raises."""
    try:
        return list(setting.grid.pull_messages([message_id]))
    except (httpx.HTTPError, OSError, MemoryError):
        raise  # not the doing of one site
    except Exception:
        log.exception("a reply could not be read")
        return None


def _settle(
    setting: Setting,
    table: Table,
    waited: Waited,
    asked: Mapping[str, Waited],
    seat: Seat,
    message: Message,
    accept: Accept,
) -> None:
    """One reply: counted, or left out with its reason; nothing that a site sends ends the run."""
    site, expected, where = waited.site, waited.expected, f"site {waited.site!r}"
    if seat.state == "revoked":  # its uploads go with its certificates
        return
    if seat.state == "counted":  # an order was given again, and both were answered
        _second(setting, waited, message)
        return
    if message.has_error():
        _failed(seat, message)
        return
    reply = None
    try:
        told, reply, key = _opened(setting, waited.asked, message, where)
        if setting.records is not None and key is not None:
            setting.records.heard(site, reply, key)
        if reply.kind == "refusal":
            _put_off(seat, reply) if reply.refusal in LATER else _refused(seat, reply)
        else:
            accept(site, reply, message, expected, False)
            _counted(setting, table, waited, told, key, site)
            seat.state, seat.reason = "counted", ""
    except AnswerForged as e:
        _forged(setting, waited, seat, asked, f"{e.code}: {e}")
        return
    except (UpdateRejected, WeightsInvalid, MessageInvalid) as e:
        code = getattr(e, "code", "MESSAGE_INVALID")
        seat.state = "revoked" if code == "NOT_ON_ROSTER" else "rejected"
        seat.reason = f"{code}: {e}"[:MOST_REASON]
    except (FederationError, OSError, MemoryError):
        raise  # ours to mend, not the site's
    except Exception:  # a gap in our doubt: this site is left out, and the log says where the gap is
        log.exception("%s: its reply could not be used", where)
        seat.state, seat.reason = "rejected", "MESSAGE_INVALID: its reply could not be used"
    finally:
        if reply is not None:
            setting.courier.drop(site, reply)
    note(setting, f"reply-{seat.state}", expected.run, round=expected.round, site=site, why=seat.reason[:200])


def _second(setting: Setting, waited: Waited, message: Message) -> None:
    """Another answer of a site that is counted: noted, and what it has sent is let go of; its seat stays as it is."""
    if message.has_error():
        return
    try:
        _, reply, _ = _opened(setting, waited.asked, message, f"site {waited.site!r}")
    except (UpdateRejected, MessageInvalid) as e:
        _note_forged(setting, waited, getattr(e, "code", "MESSAGE_INVALID"))
        return
    _note_duplicate(setting, waited)
    setting.courier.drop(waited.site, reply)


def _opened(setting: Setting, asked: Asked, message: Message, where: str) -> tuple[SignedReply, Reply, bytes | None]:
    """The reply, once its envelope is seen to be this site's and of this order; raises as `envelope.opened` does.

    The key by which that was seen comes with it: all that follows goes by this one, for the site may renew it, or be
    revoked, while its update is added to the sum.
    """
    try:
        told = read_signed(message, where)
    except MessageInvalid as error:
        raise AnswerForged("MESSAGE_INVALID", str(error)) from None
    key = None if setting.records is None else setting.records.key_of(asked.site)
    return told, opened(told, asked, key, where), key


def _counted(setting: Setting, table: Table, waited: Waited, told: SignedReply, key: bytes | None, label: str) -> None:
    """Keeps what the site has signed, and that its update of this round is counted: it is in the sum, and nothing that
    has become of the site meanwhile takes it out."""
    table.counted.add((waited.site, waited.expected.round))
    if key is not None:
        table.answers[label] = keep(setting.folder, waited.asked, told, key)


def _forged(setting: Setting, waited: Waited, seat: Seat, asked: Mapping[str, Waited], words: str) -> None:
    """Notes a message that is no answer of the site; if that is still waited for, it is asked again."""
    _note_forged(setting, waited, words)
    if not seat.open:
        return
    seat.forged = words[:MOST_REASON]
    if all(other.site != waited.site for other in asked.values()):
        seat.state, seat.reason = "lost", f"is asked again: in its name came {words}"[:MOST_REASON]


def _note_forged(setting: Setting, waited: Waited, words: str) -> None:
    facts = {"round": waited.expected.round, "site": waited.site, "attempt": waited.asked.attempt}
    note(setting, "answer-forged", waited.expected.run, **facts, why=words[:200])


def _note_duplicate(setting: Setting, waited: Waited) -> None:
    expected = waited.expected
    note(setting, "reply-duplicate", expected.run, round=expected.round, site=waited.site, why="DUPLICATE")


def _failed(seat: Seat, message: Message) -> None:
    if message.error.code in LOST:
        seat.state, seat.reason = "lost", "its node went away while working"
    else:
        seat.state, seat.reason = "failed", _code(message.error.reason)


def _put_off(seat: Seat, reply: Reply) -> None:
    """Asked again in a while, as if for the first time: a hospital may take days to decide."""
    seat.state, seat.reason = "pending", LATER[reply.refusal or ""]
    seat.attempt, seat.put_off = 0, seat.put_off + 1


def _refused(seat: Seat, reply: Reply) -> None:
    keys = f" ({', '.join(reply.refusal_keys)})" if reply.refusal_keys else ""
    about = f" (from {reply.accused})" if reply.accused else ""
    seat.state, seat.reason, seat.accused = "refused", f"{reply.refusal or 'REFUSED'}{keys}{about}", reply.accused


def _take_late(setting: Setting, table: Table, waited: Waited, message: Message, accept: Accept) -> None:
    """A reply to an order of an earlier round: counted at its staleness weight, or dropped, as the study says."""
    site, expected, reply = waited.site, waited.expected, None
    try:
        told, reply, key = _opened(setting, waited.asked, message, f"site {site!r}")
        if setting.records is not None and key is not None:
            setting.records.heard(site, reply, key)
        if (site, expected.round) in table.counted:
            _note_duplicate(setting, waited)
        elif table.study.rounds.late == "next" and reply.kind == "update":
            accept(site, reply, message, expected, True)
            _counted(setting, table, waited, told, key, f"{site} (round {expected.round})")
            note(setting, "reply-counted", expected.run, round=expected.round, site=site, why="late")
    except AnswerForged as e:
        _note_forged(setting, waited, f"{e.code}: {e}")
    except (UpdateRejected, WeightsInvalid, MessageInvalid) as e:
        _left_out_late(setting, table, waited, f"{getattr(e, 'code', 'MESSAGE_INVALID')}: {e}")
    except (FederationError, OSError, MemoryError):
        raise  # ours to mend, not the site's: the sum may hold half of the update
    except Exception:  # a gap in our doubt, as in `_settle`
        log.exception("site %r: its late reply could not be used", site)
        _left_out_late(setting, table, waited, "MESSAGE_INVALID: its reply could not be used")
    finally:
        if reply is not None:
            setting.courier.drop(site, reply)


def _left_out_late(setting: Setting, table: Table, waited: Waited, words: str) -> None:
    """Notes of a late update why it does not count; its site has a seat in this round, or is not asked in it."""
    if (seat := table.seats.get(waited.site)) is not None:
        told = f"its late update was left out: {words}"
        seat.reason = (f"{seat.reason}; {told}" if seat.reason else told)[:MOST_REASON]
    facts = {"round": waited.expected.round, "site": waited.site}
    note(setting, "reply-rejected", waited.expected.run, **facts, why=f"late, {words}"[:200])


def _code(reason: str | None) -> str:
    """The upper-case code of an error that our client sent; other words stay out of status files."""
    first = (reason or "").split(" ", 1)[0]
    return first if first.isupper() and len(first) <= 40 else "CLIENT_ERROR"
