"""What a hospital allows: `[policy]` of site.toml, asked for every order, and never sent."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, time
from typing import Annotated, Literal, TypeAlias, get_args
from zoneinfo import ZoneInfo

from pydantic import Field

from shared_models.model_table import Network
from shared_models.parse import STRICT, SiteName, did_you_mean
from shared_models.protect.ring import MOST_SITES
from shared_models.study import Study
from shared_models.task_table import Kind

ANY = "any"
KINDS: tuple[str, ...] = get_args(Kind)
NETWORKS: tuple[str, ...] = get_args(Network)
MOST_A_DAY = 200  # new studies that are taken part in without asking
Protection: TypeAlias = Literal["secure-sum", "differential-privacy"]
Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
Words = Annotated[tuple[Word, ...], Field(min_length=1, max_length=32)]
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Policy:
    """`[policy]`: what may be done with this site's images, and what may leave.

    Attributes:
        smallest_count: a distribution leaves only of so many patients (CMS and PCORnet: 11): of those with what is
            looked for, and of those without.
        approval: `ask` leaves each new study to a person (`fedclient approve`); `inside-policy` takes part in every
            study that the other keys allow, `MOST_A_DAY` new ones a day; beyond these it leaves them to a person too.
        approval_days: after so many days a study is asked for anew.
        tasks, models: kinds of `[task]` and names of `[model]` that a study may have; `any` allows all.
        most_rounds: of one study.
        least_cohort: a study must not close a round with fewer sites than this (`rounds.quorum`).
        protections: that a study must have: `secure-sum`, `differential-privacy`.
        hours: `20:00-06:00`, one or more; outside them nothing is computed, and work under way stops. None: always.
        time_zone: of the hours, by its IANA name.
        least_threshold: share of a secure sum's sites that must stay to its end, where a study has such sums; whatever
            it says, a site takes part in none of fewer than three sites or of a threshold of two thirds or less.
        partners: names of the sites with which this one sums. Others may be in a secure sum and count for nothing: it
            needs as many of these as a sum needs sites, above two thirds of them to its end, and a threshold that all
            others together do not reach. One whose identity key changes is no partner until it is confirmed
            (`fedclient partners`). None named are all that the federation's roster has.
    """

    __pydantic_config__ = STRICT
    smallest_count: Annotated[int, Field(ge=1, le=10_000)] = 11
    approval: Literal["ask", "inside-policy"] = "ask"
    approval_days: Annotated[int, Field(ge=1, le=3650)] = 365
    tasks: Words = (ANY,)
    models: Words = (ANY,)
    most_rounds: Annotated[int, Field(ge=1, le=10_000)] = 1000
    least_cohort: Annotated[int, Field(ge=1, le=1000)] = 2
    protections: Annotated[tuple[Protection, ...], Field(max_length=2)] = ()
    hours: Annotated[tuple[str, ...], Field(max_length=14)] = ()
    time_zone: str = "UTC"
    least_threshold: Annotated[float, Field(gt=2 / 3, le=1)] = 0.67
    partners: Annotated[tuple[SiteName, ...], Field(max_length=MOST_SITES)] = ()

    def __post_init__(self) -> None:
        for key, words, known in (("tasks", self.tasks, KINDS), ("models", self.models, NETWORKS)):
            for word in words:
                if word not in (ANY, *known):
                    hint = did_you_mean(word, known)
                    raise ValueError(
                        f"{key} has {word!r}, which no study has.{hint} Allowed: {ANY}, {', '.join(known)}"
                    )
        for window in self.hours:
            if not _WINDOW.fullmatch(window):
                raise ValueError(f'hours has {window!r}; a window is HH:MM-HH:MM, as in "20:00-06:00"')
        try:
            ZoneInfo(self.time_zone)
        except (ValueError, OSError, KeyError) as error:  # zoneinfo raises one of these for a name that is none
            raise ValueError(f'time_zone {self.time_zone!r} is not known here; an example: "Europe/Berlin"') from error

    def is_open(self, at_s: float) -> bool:
        """Whether `at_s` (seconds since the epoch) lies in the hours; a window may pass midnight."""
        now = datetime.fromtimestamp(at_s, ZoneInfo(self.time_zone)).time().replace(microsecond=0)
        return not self.hours or any(_within(now, *_ends(window)) for window in self.hours)


def least_cases(smallest_count: int, patients: Iterable[str]) -> int:
    """So many cases are of `smallest_count` patients or more, whichever they are; `patients`: whose each case is."""
    most = sorted(Counter(patients).values(), reverse=True)
    return max(smallest_count, sum(most[: smallest_count - 1]) + 1)


def _ends(window: str) -> tuple[time, time]:
    numbers = [int(n) for n in re.split("[:-]", window)]
    return time(numbers[0], numbers[1]), time(numbers[2], numbers[3])


def _within(now: time, begin: time, end: time) -> bool:
    return begin <= now < end if begin < end else now >= begin or now < end


def protections_of(study: Study) -> frozenset[str]:
    """The protections that a study has."""
    found = {"secure-sum": study.protect.secure_aggregation, "differential-privacy": study.protect.privacy}
    return frozenset(name for name, table in found.items() if table is not None)


@dataclass(frozen=True, slots=True)
class Objection:
    """One key of the policy that a study breaks: what the study has, and what is allowed."""

    key: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.key}: the study has {self.found}, allowed: {self.allowed}"


def objections(policy: Policy, study: Study) -> Iterator[Objection]:
    """Every key of the policy that `study` breaks."""
    for key, found, allowed in (
        ("tasks", study.task.kind, policy.tasks),
        ("models", study.model.name if study.plan == "given" else "dynunet", policy.models),
    ):
        if ANY not in allowed and found not in allowed:
            yield Objection(key, repr(found), ", ".join(allowed))
    if study.rounds.count > policy.most_rounds:
        yield Objection("most_rounds", f"{study.rounds.count} rounds", f"{policy.most_rounds}")
    if study.rounds.quorum < policy.least_cohort:
        yield Objection("least_cohort", f"rounds.quorum = {study.rounds.quorum}", f"{policy.least_cohort} or more")
    if missing := [p for p in policy.protections if p not in protections_of(study)]:
        yield Objection("protections", f"no {' and no '.join(missing)}", "studies that have it")
    secure = study.protect.secure_aggregation
    if secure is not None and secure.threshold < policy.least_threshold:
        yield Objection(
            "least_threshold", f"secure_aggregation.threshold = {secure.threshold:g}", f"{policy.least_threshold:g}"
        )


def in_words(policy: Policy) -> list[str]:
    """The policy as sentences, one for each key."""
    asked = {
        "ask": "Each study waits for a person here: `fedclient approve`.",
        "inside-policy": (
            f"A study that keeps to all of the following is taken part in without asking, {MOST_A_DAY} new ones a day."
        ),
    }
    hours = ", ".join(policy.hours)
    return [
        asked[policy.approval],
        f"An approval is good for {policy.approval_days} days.",
        f"Tasks: {', '.join(policy.tasks)}. Networks: {', '.join(policy.models)}.",
        f"A study has at most {policy.most_rounds} rounds.",
        f"A round needs {policy.least_cohort} or more sites to be counted.",
        f"Protections required: {', '.join(policy.protections) or 'none'}.",
        f"A secure sum needs three or more sites, and {policy.least_threshold:.0%} or more of them to its end.",
        f"In a secure sum count {', '.join(policy.partners) or 'all sites of the roster'}.",
        f"Work is done {f'{hours} ({policy.time_zone})' if hours else 'at any hour'}.",
        f"A distribution leaves only of {policy.smallest_count} or more patients: with a finding, and without.",
    ]
