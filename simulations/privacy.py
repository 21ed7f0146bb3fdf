"""What epsilon a study would cost, and what noise an epsilon takes: the site's accountant, before anything runs."""

from dataclasses import dataclass
from math import ceil

from shared_models.errors import StudyInvalid
from shared_models.parse import parse
from shared_models.protect.accounting import Spend, epsilon, epsilon_bound, noise_for
from shared_models.study import Study

NOISES = (0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # shown when neither noise nor epsilon is asked for


@dataclass(frozen=True, slots=True)
class Work:
    """What training asks of one site's patients, whatever the noise.

    Attributes:
        sample_rate: probability with which a step takes a patient.
        delta: below one over the patients, or the promise is empty.
    """

    sample_rate: float
    steps: int
    delta: float
    patients: int | None = None


def work_of(
    study: Study | None,
    patients: int | None,
    batch: int | None,
    steps: int | None,
    delta: float | None,
) -> Work:
    """The work of a whole study at a site; what is given goes before the study's.

    A study with [protect.privacy] says how often a step takes a patient, at every site the same; of another one this
    follows from the patients of a site and its batches.

    Raises:
        StudyInvalid: numbers that do not go together, or that nobody has given.
    """
    privacy = study.protect.privacy if study else None
    if privacy is not None and batch is None:
        rate = privacy.sample_rate
    else:
        rate = _rate(study, patients, batch)
    if steps is None and study is not None:
        train = study.train
        steps = study.rounds.count * (train.local_steps or ceil(train.local_epochs / rate))
    if steps is None:
        raise StudyInvalid("privacy: how many steps? Name a study, or give --steps.")
    chosen = delta
    if chosen is None:
        chosen = privacy.delta if privacy else min(1e-5, 0.1 / (patients or 1))
    if not 0 < chosen < 1 / (patients or 1):
        raise StudyInvalid(
            f"privacy: delta {chosen:g} for {patients} patients; it must be above 0 and below "
            f"{1 / (patients or 1):.2g}, because it allows that often to publish a patient outright."
        )
    return Work(rate, steps, chosen, patients)


def _rate(study: Study | None, patients: int | None, batch: int | None) -> float:
    batch = batch or (study.train.batch_size if study else None)
    if batch is None:
        raise StudyInvalid("privacy: name a study, or give --batch and --steps.")
    if patients is None:
        raise StudyInvalid("privacy: of how many patients? Give --patients, or a study with [protect.privacy].")
    if batch > patients:
        raise StudyInvalid(f"privacy: a batch of {batch} of {patients} patients. Give a smaller --batch.")
    return batch / patients


@dataclass(frozen=True, slots=True)
class Price:
    """One answer: epsilon by privacy loss distributions, and the bound by Rényi's that it must not exceed."""

    noise_multiplier: float
    epsilon: float
    epsilon_rdp: float


def price(work: Work, noise_multiplier: float) -> Price:
    """What `work` costs with this noise."""
    asked = {"noise_multiplier": noise_multiplier, "sample_rate": work.sample_rate, "steps": work.steps}
    spent = [parse(Spend, asked, "privacy")]
    return Price(noise_multiplier, epsilon(spent, work.delta), epsilon_bound(spent, work.delta))


def noise_of(work: Work, target: float) -> Price:
    """The least noise with which `work` stays within epsilon `target`."""
    try:
        return price(work, noise_for(target, work.sample_rate, work.steps, work.delta))
    except ValueError as error:
        raise StudyInvalid(f"privacy: {error}.") from None
