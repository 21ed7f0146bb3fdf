"""What a site remembers of its secure sums, so that none is ever made twice, also after a crash.

One SQLite file, `site/sums.db`: a row for each context that this site has ever made keys for, with the step it is at
and, sealed under a key of this site, what that step left. A step is written before its answer leaves and only from the
step before it, so of two processes, or of a process and its successor, one is refused. Secrets are wiped when a sum has
ended or another attempt has begun. Every step is an entry of a chain too, as in the ledger: a file that was put back
from a backup has forgotten sums, and would let an update be added twice.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedclient import chain, secagg
from fedclient.chain import Chain
from fedclient.secagg import Advertised, Confirmed, Held, Masked, Member, RandomBytes, Shared
from shared_models.database import check, connected, create, writing
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import canonical_json
from shared_models.identity import load_secret, save_secret
from shared_models.parse import parse_json, plain
from shared_models.protect.context import Context
from shared_models.protect.masking import seal, unseal
from shared_models.protect.messages import (
    Advert,
    Adverts,
    Confirmation,
    Confirmations,
    Inbox,
    Revealed,
    Sealed,
    Survivors,
)
from shared_models.protect.prg import Masks, framed
from shared_models.protect.ring import Layout, encode, packed
from shared_models.weights import Tensors

State = TypeVar("State", Advertised, Shared, Masked, Confirmed)
_VERSION = 2
_SCHEMA = f"""{chain.SCHEMA}
CREATE TABLE sums (
    id TEXT PRIMARY KEY,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    model_sha256 TEXT NOT NULL,
    policy_sha256 TEXT NOT NULL,
    step TEXT NOT NULL CHECK (step IN ('Advertised', 'Shared', 'Masked', 'Confirmed', 'Revealed')),
    confirmed INTEGER NOT NULL DEFAULT 0,
    state BLOB
) STRICT;
PRAGMA user_version = {_VERSION};
"""


@dataclass(frozen=True, slots=True)
class Sums:
    """The secure sums of one site: `fedclient.secagg` step by step, each remembered before its answer leaves.

    Every step raises OrderRefused with what the step itself refuses, with `CONTEXT_USED` for a context that had keys
    made before, with `ROUND_CONFIRMED` for an update that may be in a sum already, and with `STEP_REPEATED` for a step
    that was done before or whose sum was given up.
    """

    member: Member
    path: Path
    key: bytes = field(repr=False)
    random_bytes: RandomBytes = os.urandom

    def advertise(self, context: Context, held: Held) -> Advert:
        state, advert = secagg.advertise(self.member, context, held, self.random_bytes)
        with self._writing(context.id, "Advertised") as db:
            if db.execute("SELECT 1 FROM sums WHERE id = ?", [context.id]).fetchone():
                raise OrderRefused(
                    "CONTEXT_USED",
                    f"secure sum of round {context.round}, attempt {context.attempt}: keys were made for it before. "
                    f"Another attempt needs another number.",
                )
            _check_unconfirmed(db, context)
            db.execute("UPDATE sums SET state = NULL WHERE run = ?", [context.run])
            db.execute(
                "INSERT INTO sums (id, run, round, attempt, model_sha256, policy_sha256, step, state) "
                "VALUES (?, ?, ?, ?, ?, ?, 'Advertised', ?)",
                [context.id, context.run, context.round, context.attempt, context.model_sha256, context.policy_sha256,
                 self._sealed(context.id, state)],
            )  # fmt: skip
        return advert

    def about(self, context_id: str) -> dict[str, str]:
        """Run, weights and study of a sum that this site has made keys for; OrderRefused of any other."""
        with connected(self.path) as db:
            row = db.execute("SELECT run, model_sha256, policy_sha256 FROM sums WHERE id = ?", [context_id]).fetchone()
        if row is None:
            raise _unheard_of()
        return dict(zip(("run", "model_sha256", "policy_sha256"), map(str, row), strict=True))

    def share(self, adverts: Adverts) -> Sealed:
        before = self._state(adverts.context, Advertised)
        state, answer = secagg.share(before, self.member, adverts, self.random_bytes)
        self._advance(before, state)
        return answer

    def mask(
        self, inbox: Inbox, delta: Tensors, weight: int, counts: Mapping[str, int], layout: Layout
    ) -> Iterator[NDArray[np.uint8]]:
        """The masked vector in blocks, each good until the next is asked for; once, and not again if it is lost."""
        before = self._state(inbox.context, Shared)
        context = before.context
        if layout.sha256 != context.schema_sha256:
            raise OrderRefused("SCHEMA_MISMATCH", f"secure sum of round {context.round}: is about another vector.")
        if not 0 < weight <= context.whole:
            raise OrderRefused(
                "WEIGHT_RANGE",
                f"secure sum of round {context.round}: this site's weight {weight} is not from 1 to the cohort's "
                f"{context.whole}.",
            )
        state, masks = secagg.mask(before, self.member, inbox)
        self._advance(before, state)
        return masked(delta, weight, counts, layout, context, masks)

    def confirm(self, survivors: Survivors) -> Confirmation:
        """The same survivors are signed again, which tells nothing new, so that a sum does not die with the process
        of a site that had remembered its word and not sent it; other survivors are refused."""
        if (signed := self._confirmed(survivors)) is not None:
            return secagg.confirmation(signed, self.member)
        before = self._state(survivors.context, Masked)
        state, answer = secagg.confirm(before, self.member, survivors)
        self._advance(before, state)
        return answer

    def unmask(self, confirmations: Confirmations, keep: Callable[[Revealed], None] = lambda _: None) -> Revealed:
        """`keep` is given the answer before the secrets are wiped: it follows from the survivors alone, so that told
        again it tells nothing new, and a sum that waits for just this site does not die with its process."""
        before = self._state(confirmations.context, Confirmed)
        answer = secagg.unmask(before, self.member, confirmations)
        keep(answer)
        self._advance(before, None)
        return answer

    def _confirmed(self, survivors: Survivors) -> Confirmed | None:
        """What was signed of just these survivors, while the sum is not ended."""
        with connected(self.path) as db:
            row = db.execute(
                "SELECT 1 FROM sums WHERE id = ? AND step = 'Confirmed' AND state IS NOT NULL", [survivors.context]
            ).fetchone()
        state = None if row is None else self._state(survivors.context, Confirmed)
        return state if state is not None and state.survivors == survivors else None

    def _state(self, context_id: str, kind: type[State]) -> State:
        with connected(self.path) as db:
            row = db.execute("SELECT step, state FROM sums WHERE id = ?", [context_id]).fetchone()
        if row is None:
            raise _unheard_of()
        step, sealed = row
        if step != kind.__name__ or sealed is None:
            raise OrderRefused(
                "STEP_REPEATED", f"secure sum: is at {step!r}, not at {kind.__name__!r}. Nothing is told a second time."
            )
        content = unseal(self.key, sealed, framed(context_id.encode(), step.encode()))
        return parse_json(kind, content, "secure sum")

    def _advance(self, before: Advertised | Shared | Masked | Confirmed, state: object | None) -> None:
        """From one step to the next, in one transaction, or not at all."""
        old, new = type(before).__name__, "Revealed" if state is None else type(state).__name__
        sealed = None if state is None else self._sealed(before.context.id, state)
        with self._writing(before.context.id, new) as db:
            if new == "Confirmed":  # of two sums of different runs that were begun side by side, one is
                _check_unconfirmed(db, before.context)
            moved = db.execute(
                "UPDATE sums SET step = ?, state = ?, confirmed = ? WHERE id = ? AND step = ? AND state IS NOT NULL",
                [new, sealed, new in ("Confirmed", "Revealed"), before.context.id, old],
            ).rowcount
            if moved != 1:
                raise OrderRefused("STEP_REPEATED", f"secure sum: {old!r} was left meanwhile. Nothing is told twice.")

    @contextmanager
    def _writing(self, context_id: str, step: str) -> Iterator[sqlite3.Connection]:
        """A transaction that is an entry of the chain, which the witness is told of before anything leaves."""
        with writing(self.path) as db:
            yield db
            head = self.chain.add(db, f"{context_id} {step}")
        self.chain.seen(head)

    @property
    def chain(self) -> Chain:
        secrets = self.path.parent / "secrets"
        until = (
            f"Until then this site takes part in no secure sum. Without it, remove {self.path.name} and, in "
            f"{secrets}, sums.key and sums.head, and approve no study here whose seed was summed before."
        )
        return Chain(self.path, secrets / "sums.head", "SUMS_ROLLBACK", until)

    def _sealed(self, context_id: str, state: object) -> bytes:
        about = framed(context_id.encode(), type(state).__name__.encode())
        return seal(self.key, canonical_json(plain(state)), about, os.urandom)


def _check_unconfirmed(db: sqlite3.Connection, context: Context) -> None:
    """Raises OrderRefused, `ROUND_CONFIRMED`, where this site's update may be in another sum.

    Two sums over sets that differ by one site differ by its update: what is confirmed once is never added again,
    neither from the same weights, where training from the same seed gives the same update, nor for the same round of
    the same study in any run, which bounds how many sums from almost the same weights a coordinator can have.
    """
    if db.execute(
        "SELECT 1 FROM sums WHERE confirmed AND ((run = ? OR policy_sha256 = ?) AND (round = ? OR model_sha256 = ?))",
        [context.run, context.policy_sha256, context.round, context.model_sha256],
    ).fetchone():
        raise OrderRefused(
            "ROUND_CONFIRMED",
            f"secure sum of round {context.round}: this site's update may be in one already. A study that is run anew "
            f"needs another seed.",
        )


def _unheard_of() -> OrderRefused:
    return OrderRefused("CONTEXT_SPLIT", "secure sum: a message is about a context that this site has not seen.")


def summed_studies(folder: Path) -> frozenset[str]:
    """Digests of the studies for which the site in `folder` has confirmed a sum."""
    path = folder / "sums.db"
    if not path.exists():
        return frozenset()
    with connected(path) as db:
        return frozenset(row[0] for row in db.execute("SELECT DISTINCT policy_sha256 FROM sums WHERE confirmed"))


def open_sums(member: Member, folder: Path) -> Sums:
    """The secure sums of the site in `folder`, made on first use: `sums.db`, then its key and witness in `secrets`.

    Raises:
        OrderRefused: `SUMS_ROLLBACK`, when it is not the file that it was.
        StateInvalid: a file that is damaged, exposed or of another version, or one of the two without the other.
    """
    path, key = folder / "sums.db", folder / "secrets" / "sums.key"
    if not path.exists():
        if key.exists():
            raise StateInvalid(
                f"{path}: is missing, and with it which secure sums this site has been part of. Restore it from a "
                f"backup; without one, remove {key} and sums.head beside it too, and approve no study here whose seed "
                f"was summed before."
            )
        create(path, _SCHEMA)
    check(path, _VERSION, "`fedclient join`")
    if not key.exists():
        with connected(path) as db:
            if db.execute("SELECT 1 FROM sums").fetchone():
                raise StateInvalid(f"{key}: is missing. Restore it from a backup.")
        save_secret(key, os.urandom(32))
    made = Sums(member, path, load_secret(key))
    made.chain.begin()
    made.chain.read()
    return made


def masked(
    delta: Tensors, weight: int, counts: Mapping[str, int], layout: Layout, context: Context, masks: Masks
) -> Iterator[NDArray[np.uint8]]:
    """The vector of a site under its masks, in the bytes that travel, a block of 256 KiB at a time."""
    for block in encode(delta, weight / context.whole, weight, counts, layout, context.encoding, context.canary):
        masks.apply(block)
        yield packed(block, context.ring_bits)
