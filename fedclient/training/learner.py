"""Training and scoring on this site's images: data set, network and loop put together."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from numpy.random import Generator

from fedclient.data.cases import ALL, Case
from fedclient.data.dataset import Batch, DataSet, prepare
from fedclient.data.manifest import Progress
from fedclient.data.truths import has_truth
from fedclient.gate.run import usable_cases
from fedclient.policy import least_cases
from fedclient.site import Site
from fedclient.training.depth import rates_of
from fedclient.training.device import device_named, gpus, limit
from fedclient.training.evaluate import evaluate
from fedclient.training.local_round import Start, train_round
from fedclient.training.moments import Moments
from fedclient.training.personal import LOCAL, MOMENTS_OF_HEAD, filed, own_weights, part, staying
from fedclient.training.private import patients_of, train_privately
from fedclient.training.profile import site_profile
from fedclient.training.trainer import fit, scheduled, slanted
from fedclient.training.unlabelled import consistency, nothing, worth
from fedclient.work import Holding, Learned
from shared_models import nets
from shared_models.control import without_control
from shared_models.drift import Profile
from shared_models.errors import OrderRefused
from shared_models.scores import Score
from shared_models.seeds import rng, seed_of
from shared_models.study import Study
from shared_models.tasks import segmentation
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.reconstruction import hidden
from shared_models.weights import Arrays
from shared_models.wire import Split

log = logging.getLogger("fedclient")


@dataclass(frozen=True, slots=True)
class ImageLearner:
    """The learner of a real site; holds nothing, so that every order reads the data that is there."""

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        return self.learn_on(site, study, round_number, weights, {})[0]

    def learn_on(
        self, site: Site, study: Study, round_number: int, weights: Arrays, memory: Arrays
    ) -> tuple[Learned, Arrays]:
        device = device_of(site)
        settle(site, study, seed_of(study.seed, study.name, round_number, site.name, "torch"))
        labelled, unlabelled = to_train_on(site, study)
        cases = labelled if len(labelled) else unlabelled
        received = without_control(weights)
        net = nets.network(study)
        stay = staying(net, study)
        nets.load_arrays(net, {**received, **part(memory, LOCAL)})
        net.to(device)
        train = scheduled(study.train, round_number, study.rounds.count)
        if len(unlabelled) and not len(
            labelled
        ):  # nothing holds such a site in place before there is an answer to keep
            train = replace(train, learning_rate=train.learning_rate * study.unlabelled.ramp(round_number))
        if study.protect.privacy is not None:
            people, loss = patients_of(_cases(site), cases), functions_of(study.task, site.labelled).loss
            fitted = train_privately(
                net, cases, people, loss, study, train, rates_of(net, study.transfer, round_number), site.go_on
            )
            return Learned(nets.arrays_of(net), 0, fitted.steps, device=device.type), {}
        words = (study.seed, study.name, round_number, site.name)
        kept: Arrays = {}
        if study.personal.head_epochs:
            heads = drawn(site, cases, study, device, rng(*words, "head batches"), study.personal.head_epochs, None)
            loss, only = functions_of(study.task, site.labelled).loss, sorted(nets.head_names(net))
            moments = Moments(part(memory, MOMENTS_OF_HEAD)) if train.moments == "kept" else None
            fit(net, heads, loss, train, device, only=only, moments=moments)
            kept = {} if moments is None else filed(moments.left(), MOMENTS_OF_HEAD)
        steps, epochs = study.train.local_steps, None if study.train.local_steps else study.train.local_epochs
        batches = drawn(site, cases, study, device, rng(*words, "batches"), epochs, steps)
        rates = rates_of(net, study.transfer, round_number)
        start = Start(study, train, device, net, weights, memory, stay, rates)
        task, further, watches = functions_of(study.task, site.labelled), [], []
        if len(unlabelled):
            weight = study.unlabelled.weight * study.unlabelled.ramp(round_number)
            look, pull = consistency(net, unlabelled, study, task, rng(*words, "unlabelled"), weight)
            further, watches = [pull], [look]
        done = train_round(start, batches, task.loss if len(labelled) else nothing, further, watches)
        fitted = done.fitted
        examples = worth(len(labelled), len(unlabelled), study, round_number)
        learned = Learned(done.tensors, examples, fitted.steps, fitted.losses, device.type, done.variance)
        return learned, {**done.memory, **kept}

    def own(self, site: Site, study: Study, weights: Arrays, memory: Arrays, tuned: bool) -> Arrays | None:
        mine = own_weights(weights, memory)
        if not tuned:
            return mine
        device = device_of(site)
        settle(site, study, seed_of(study.seed, study.name, "fine-tuning", site.name, "torch"))
        net = nets.network(study)
        nets.load_arrays(net, weights if mine is None else mine)
        net.to(device)
        last, share = study.rounds.count, study.personal.fine_tune_rate
        rate = scheduled(study.train, last, last).learning_rate if share is None else share * study.train.learning_rate
        train = replace(study.train, learning_rate=rate, proximal_mu=0.0)
        draw, steps = rng(study.seed, study.name, site.name, "fine-tuning"), study.personal.fine_tune_steps or None
        epochs = None if steps else study.personal.fine_tune_epochs
        cases = data_set(site, study, "train")
        course = slanted(steps or study.personal.fine_tune_epochs * ceil(len(cases) / train.batch_size))
        batches, rates = drawn(site, cases, study, device, draw, epochs, steps), rates_of(net, study.transfer, last)
        fit(net, batches, functions_of(study.task, site.labelled).loss, train, device, rates=rates, course=course)
        return nets.arrays_of(net)

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        device = device_of(site)
        site.go_on()
        settle(site, study, 0)
        net = nets.network(study)
        nets.load_arrays(net, weights)
        task, (cases, least) = functions_of(study.task, site.labelled), to_score(site, study, split)
        return evaluate(net.to(device), cases, study, task, device, least, site.go_on)

    def profile(self, site: Site, study: Study, weights: Arrays) -> Profile | None:
        kept = [case for case in _cases(site) if case.split != "train"]
        if len({case.patient for case in kept}) < site.smallest_count:
            return None
        device = device_of(site)
        settle(site, study, 0)
        net = nets.network(study)
        nets.load_arrays(net, weights)
        return site_profile(net.to(device), kept, study, device, _told("profile", site))

    def holding(self, site: Site, study: Study) -> Holding:
        labelled, unlabelled = sorted_by_label(site, study)
        train = [case for case in labelled if case.split == "train"] + unlabelled
        return Holding(len(train), sum(c.split == "test" for c in labelled), len({c.patient for c in train}))


def drawn(
    site: Site,
    cases: DataSet,
    study: Study,
    device: torch.device,
    draw: Generator,
    epochs: int | None,
    steps: int | None,
) -> Iterator[Batch]:
    """Batches for training, for as long as the hospital lets the work go on; OrderRefused at the first step after.

    On a CPU the thread that prepares them ahead would take from the one that trains.
    """
    ahead = device.type == "cuda"
    hiding = draw.spawn(1)[0] if study.task.kind == "reconstruction" else None
    later = ahead and hiding is None  # what is hidden is hidden of the image as it was changed
    for batch in cases.batches(
        study.train.batch_size,
        draw,
        epochs=epochs,
        steps=steps,
        augment=study.augment,
        ahead=ahead,
        later=later,
        fewest=study.fewest,
    ):
        site.go_on()
        yield batch if hiding is None else Batch(*hidden(batch.images, study.task, hiding))


def device_of(site: Site) -> torch.device:
    """The device that the site's file names.

    Raises:
        OrderRefused: a GPU that is not there.
    """
    found = device_named(site.device)
    if found is None:
        raise OrderRefused(
            "DEVICE_MISSING", f'site.toml asks for {site.device}, PyTorch sees {gpus()} GPUs. Set device = "cpu".'
        )
    return found


def settle(site: Site, study: Study, seed: int) -> None:
    """Global state of PyTorch that training depends on."""
    if site.threads:
        torch.set_num_threads(site.threads)
    if site.deployed:
        limit(site.limits, device_of(site))
    if study.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has no deterministic sums without it
    torch.use_deterministic_algorithms(study.train.deterministic)
    torch.manual_seed(seed)


def data_set(site: Site, study: Study, split: str) -> DataSet:
    """The prepared cases of one split that have a label, or of all splits (`ALL`).

    Raises:
        OrderRefused: the site has none for training, or they do not fit into its cache.
    """
    return to_score(site, study, split)[0]


def to_score(site: Site, study: Study, split: str) -> tuple[DataSet, int]:
    """As `data_set`, and of how many such cases a distribution may leave: `policy.smallest_count` is of patients."""
    labelled, unlabelled = sorted_by_label(site, study)
    cases = [case for case in labelled if split in (case.split, ALL)]
    if not cases and split == "train":
        raise OrderRefused("NO_CASES", f"{site.data}: no case with a label for training. Run `fedclient check`.")
    prepared = _prepared(site, study, cases, split, len(labelled) + len(unlabelled))
    return prepared, least_cases(site.smallest_count, (case.patient for case in cases))


def to_train_on(site: Site, study: Study) -> tuple[DataSet, DataSet]:
    """The prepared training cases with a label, and those without, where the study learns from them.

    Raises:
        OrderRefused: the site has none of either, or they do not fit into its cache.
    """
    labelled, unlabelled = sorted_by_label(site, study)
    if not unlabelled:
        return data_set(site, study, "train"), DataSet(())
    cases, in_all = [case for case in labelled if case.split == "train"], len(labelled) + len(unlabelled)
    without = _prepared(site, study, unlabelled, "train", in_all)
    return (_prepared(site, study, cases, "train", in_all) if cases else DataSet(())), without


def sorted_by_label(site: Site, study: Study) -> tuple[list[Case], list[Case]]:
    """The cases whose labels the site uses, of all splits; and the training cases without, where the study wants them.

    What a layout has for test and gives no labels of is neither.

    Raises:
        OrderRefused: `LABELS_UNKNOWN`: the site labels nothing that the study answers; or not all that a detection
            looks for, where what nobody has marked is learned as nothing.
    """
    unmarked = [label for label in study.task.labels if site.labelled and label not in site.labelled]
    if unmarked and study.task.kind == "detection":
        raise OrderRefused(
            "LABELS_UNKNOWN",
            f"site.toml says that the masks here have {', '.join(site.labelled)}, and not {', '.join(unmarked)}: a "
            f"detection would learn that there is none. Label them, correct `labelled` under [data], or refuse the "
            f"study.",
        )
    if site.labelled and study.task.kind == "segmentation" and not segmentation.kept(study.task, site.labelled):
        raise OrderRefused(
            "LABELS_UNKNOWN",
            f"site.toml says that the masks here have {', '.join(site.labelled)}, the study answers "
            f"{', '.join(study.task.answers)} of the labels {', '.join(study.task.labels)}: none could be learned. "
            f"Correct `labelled` under [data], or refuse the study.",
        )
    labelled: list[Case] = []
    unlabelled: list[Case] = []
    for case in _cases(site):
        if has_truth(case, study.task) and case.key not in site.hidden:
            labelled.append(case)
        elif case.split == "train" and study.unlabelled.method != "none":
            unlabelled.append(case)
    return labelled, unlabelled


def _prepared(site: Site, study: Study, cases: Sequence[Case], split: str, in_all: int) -> DataSet:
    return prepare(
        cases,
        study,
        site.folder / "cache",
        _told(split, site),
        quota_bytes=site.quota_bytes,
        processes=site.processes,
        in_all=in_all,
    )


def _told(split: str, site: Site) -> Progress:
    """Progress for the log, every ten seconds: the first time a large data set is prepared for long.

    Between two cases, as between two steps, consent may have ended.
    """
    told = time.monotonic()

    def tell(done: int, of: int) -> None:
        nonlocal told
        site.go_on()
        if time.monotonic() - told > 10:
            told = time.monotonic()
            log.info("prepared %d of %d cases for %s", done, of, split)

    return tell


def _cases(site: Site) -> tuple[Case, ...]:
    return usable_cases(site)
