"""What is trained, how, and under which rules: `study.toml`, and the ready studies.

A study names things that both sides have installed; it never carries code, paths or addresses. Its canonical JSON is
its identity: the SHA-256 of those bytes travels in every order and every update.
"""

import hashlib
from dataclasses import dataclass, field
from importlib.resources import files
from math import ceil, prod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared_models.errors import StudyInvalid
from shared_models.files import canonical_json
from shared_models.model_table import BAGWISE, ENCODERS, PIXELWISE, SMALLEST_EDGE
from shared_models.model_table import Level as Level
from shared_models.model_table import Model as Model
from shared_models.parse import STRICT, Line, parse, parse_json, plain, read_toml
from shared_models.protect.privacy import Protect, check_private
from shared_models.protect.secure import check_secure
from shared_models.protect.stages import check_stages
from shared_models.strategy import NotNegative, Positive, check_strategy
from shared_models.strategy import Personal as Personal
from shared_models.strategy import Strategy as Strategy
from shared_models.task_table import Task as Task
from shared_models.unlabelled_table import Unlabelled as Unlabelled
from shared_models.unlabelled_table import check_unlabelled

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
MODALITIES = {"ct": "CT", "xray": "X-ray", "mr": "MR", "photo": "colour picture"}  # as people write them
COLOURS = ("red", "green", "blue")  # channels by these names are those of one coloured picture


@dataclass(frozen=True, slots=True)
class Preprocess:
    """`[preprocess]`: from a volume or picture to what the network sees; the same at every site and in the release.

    Attributes:
        size: pixels (rows, columns) or voxels (rows, columns, planes) of one example.
        fit: `letterbox` scales the whole image into `size` keeping its aspect; `crop_pad` keeps the voxel size
            (or resamples to `spacing_mm`) and crops or pads around the centre; `patches` keeps the voxel size
            likewise and the whole image: `size` is of patches, which are drawn from it at random for training and
            moved over it, overlapping, to predict.
        intensity: `window` clips to `window_hu` and maps to [0, 1]; `percentile` clips each image to its own 0.5 and
            99.5 percentiles and standardises it (mean 0, deviation 1); `zscore` clips to `window_hu`, subtracts `mean`
            and divides by `deviation`, or standardises each image as it is where these are not given.
        nonzero: that standardisation looks at voxels that are not 0, and leaves 0 as it is (images without a skull).
        spacing_mm: voxel size (rows, columns[, planes]) before cropping; not with `letterbox`.
    """

    __pydantic_config__ = STRICT
    size: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=2, max_length=3)] = (
        256,
        256,
    )
    fit: Literal["letterbox", "crop_pad", "patches"] = "letterbox"
    intensity: Literal["window", "percentile", "zscore"] = "window"
    window_hu: tuple[Finite, Finite] = (-1000.0, 400.0)
    mean: Finite | None = None
    deviation: Positive | None = None
    nonzero: bool = False
    spacing_mm: tuple[Positive, ...] | None = None

    def __post_init__(self) -> None:
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(f"window_hu must rise, it is {list(self.window_hu)}")
        if self.spacing_mm is not None and (self.fit == "letterbox" or len(self.spacing_mm) != len(self.size)):
            raise ValueError(
                f'spacing_mm is {list(self.spacing_mm)} with fit = "{self.fit}"; it needs fit = "crop_pad" or '
                f'"patches", and as many numbers as size {list(self.size)}'
            )
        if (self.mean is None) != (self.deviation is None) or (self.mean is not None and self.intensity != "zscore"):
            raise ValueError('mean and deviation come together, and only with intensity = "zscore"')
        if self.nonzero and (self.intensity != "zscore" or self.mean is not None):
            raise ValueError('nonzero is for intensity = "zscore" without mean and deviation')


@dataclass(frozen=True, slots=True)
class Augment:
    """`[augment]`: random changes of training examples; 0 or false switches one off.

    Attributes:
        rotate_deg, scale, shift: largest in-plane rotation, relative zoom and relative shift, drawn evenly.
        gamma, brightness, noise: largest relative exponent, additive shift and standard deviation, in units of the
            preprocessed image; the exponent is of each channel from its lowest to its highest value.
        flip_left_right: only where no answer names a side (`left-lung`).
    """

    __pydantic_config__ = STRICT
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.0
    brightness: NotNegative = 0.0
    noise: NotNegative = 0.0
    flip_left_right: bool = False

    @property
    def changes(self) -> bool:
        """Whether anything is switched on."""
        return self != Augment()


@dataclass(frozen=True, slots=True)
class Train:
    """`[train]`: what a site does in one round.

    Attributes:
        local_steps: batches a round instead of `local_epochs`, so that sites of unlike size do equal work.
        schedule: of the learning rate over the rounds; `cosine` falls to a twentieth in the last (Loshchilov & Hutter
            2017, equation 5, one cycle).
        foreground: share of the patches that are drawn around a labelled voxel; only with preprocess.fit = "patches",
            where 0.33 is taken if nothing is said.
        momentum: of `sgd`.
        moments: of the optimizer, with which a round begins: none (`restart`), or those that the site's last counted
            round left there (`kept`), without which rounds of few steps go astray.
        proximal_mu: FedProx's pull towards the received weights (Li et al. 2020, equation 2); 0 is plain training.
        scaffold: each step is corrected by how the site's mean gradient differs from the federation's (Karimireddy et
            al. 2020, Algorithm 1, option II); every order and update is twice as large.
        moon_mu, moon_temperature: MOON's pull of the network's features towards those of the received weights, and
            away from those of the site's last ones (Li et al. 2021, equations 3 and 4); 0 switches it off.
        sharpness_rho: each step takes the gradient at the worst weights so far away (FedSAM, Qu et al. 2022, Algorithm
            1; Foret et al. 2021, equation 2): twice the time, flatter optima; 0 switches it off.
        precision: `auto` is bf16 autocast on a GPU that has it, float32 elsewhere.
        deterministic: bit-equal weights on a second run of the same machine and thread count; slower on a GPU.
    """

    __pydantic_config__ = STRICT
    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    foreground: Annotated[float, Field(ge=0, le=1)] | None = None
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: NotNegative = 0.0
    clip_gradient: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    moments: Literal["restart", "kept"] = "restart"
    proximal_mu: NotNegative = 0.0
    scaffold: bool = False
    moon_mu: NotNegative = 0.0
    moon_temperature: Positive = 0.5
    sharpness_rho: NotNegative = 0.0
    precision: Literal["auto", "float32"] = "auto"
    deterministic: bool = False

    def steps(self, examples: int) -> int:
        """Batches that a site with so many examples trains on in a round."""
        return self.local_steps or self.local_epochs * ceil(examples / self.batch_size)


@dataclass(frozen=True, slots=True)
class Rounds:
    """`[rounds]`: how many, who, and how long to wait.

    Attributes:
        quorum: fewest updates that make a round; with fewer the run pauses and says for whom.
        gather_s: longest wait, as a round opens, for sites that were in the last one and are not online.
        deadline_s: seconds from the orders of a round to its end; who has not answered by then is late.
        pause_s: longest pause for want of a quorum before the run stops and can be run again.
        late: `drop` a late update, or count it in the `next` round at `late_weight` of its examples.
        cohort: share of the sites that are asked in a round, chosen by (seed, round).
    """

    __pydantic_config__ = STRICT
    count: Annotated[int, Field(ge=1, le=10_000)] = 10
    quorum: Annotated[int, Field(ge=1, le=1000)] = 2
    gather_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    deadline_s: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    pause_s: Annotated[float, Field(ge=0, le=30 * 86400)] = 86400.0
    late: Literal["drop", "next"] = "drop"
    late_weight: Share = 0.5
    cohort: Share = 1.0


@dataclass(frozen=True, slots=True)
class Evaluate:
    """`[evaluate]`: validation each `every` rounds (0: never), test after the last; `threshold` is a probability.

    Attributes:
        overlap: share of its edge by which patches overlap that are moved over an image; only with preprocess.fit =
            "patches", where 0.5 is taken if nothing is said.
        publish_sites: a site's own page may name the other sites; else it shows them all together alone.
        reference: at the end, each site counts what its validation and test patients and the answers on them are like
            (shared_models/drift.py), so that whoever uses the release can tell a drift.
    """

    __pydantic_config__ = STRICT
    every: Annotated[int, Field(ge=0)] = 1
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    overlap: Annotated[float, Field(ge=0, le=0.9)] | None = None
    publish_sites: bool = False
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Planning:
    """`[planning]`: what a federated plan must fit into.

    Attributes:
        memory_gib: of the smallest accelerator that trains it; 8 is nnU-Net's measure.
        batch_most: examples in a batch, whatever the memory.
    """

    __pydantic_config__ = STRICT
    memory_gib: Annotated[float, Field(ge=0.1, le=1000)] = 8.0
    batch_most: Annotated[int, Field(ge=2, le=4096)] = 256


@dataclass(frozen=True, slots=True)
class Transfer:
    """`[transfer]`: weights from elsewhere to begin with, and how far they may move. A block is a convolution with its
    norm, or a residual, dense or inverted block; blocks count from the image on, the last is the head.

    Attributes:
        sha256: of the weights file, which lies at the coordinator; empty begins from the seed.
        freeze: how many blocks stay as they are.
        rate_decay: learning rate of a block as a share of the next one's.
        head_rounds: how many first rounds train the head alone.
        fresh_head: the last layer begins from the seed, as where the file is of a network that was asked for something
            else (a reconstruction).
    """

    __pydantic_config__ = STRICT
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    freeze: Annotated[int, Field(ge=0, le=1000)] = 0
    rate_decay: Share = 1.0
    head_rounds: Annotated[int, Field(ge=0, le=10_000)] = 0
    fresh_head: bool = False

    def __post_init__(self) -> None:
        if not self.sha256 and (self.freeze or self.rate_decay != 1.0 or self.head_rounds or self.fresh_head):
            raise ValueError(
                "freeze, rate_decay, head_rounds and fresh_head are for weights from a file; name its sha256"
            )


@dataclass(frozen=True, slots=True)
class Study:
    """The declarative file that says what is trained, how, and under which rules.

    Attributes:
        channels: which pictures of a case the network sees, by name (`t1ce`), in its order; none named is the one
            that there is; `red`, `green` and `blue` are the colours of one picture, which is else read as grey.
        modality: `photo` is a picture in visible light (dermoscopy, fundus, endoscopy).
        plan: `given` by the tables of this file, or `federated`: derived from counts of all sites before round 1
            (shared_models/plan.py). Then preprocess, model but for spatial_dims, dropout and supervised, and batch_size
            are the plan's, and what this file says of them is not used; a plan of few levels has no more supervised
            than it can.
    """

    __pydantic_config__ = STRICT
    name: Name
    title: Line = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    modality: Literal["ct", "xray", "mr", "photo"] = "ct"
    channels: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")], ...], Field(max_length=16)
    ] = ()
    plan: Literal["given", "federated"] = "given"
    planning: Planning = field(default_factory=Planning)
    task: Task = field(default_factory=Task)
    model: Model = field(default_factory=Model)
    transfer: Transfer = field(default_factory=Transfer)
    preprocess: Preprocess = field(default_factory=Preprocess)
    augment: Augment = field(default_factory=Augment)
    train: Train = field(default_factory=Train)
    unlabelled: Unlabelled = field(default_factory=Unlabelled)
    rounds: Rounds = field(default_factory=Rounds)
    strategy: Strategy = field(default_factory=Strategy)
    personal: Personal = field(default_factory=Personal)
    evaluate: Evaluate = field(default_factory=Evaluate)
    protect: Protect = field(default_factory=Protect)

    def __post_init__(self) -> None:
        if len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels {list(self.channels)} must differ from each other")
        check_strategy(self)
        self._check_task()
        check_private(self)
        check_secure(self)
        check_stages(self)
        check_unlabelled(self)
        if self.plan == "federated":
            self._check_patches(self.modality not in ("xray", "photo"), "a plan makes none of pictures without spacing")
            return  # the tables below are the plan's to set
        if self.table_only or self.of_bags:
            return  # there is no image to preprocess
        if len(self.preprocess.size) != self.model.spatial_dims:
            raise ValueError(
                f"preprocess.size has {len(self.preprocess.size)} numbers, model.spatial_dims is "
                f"{self.model.spatial_dims}; they must agree"
            )
        in_hu = self.preprocess.intensity == "window" or self.preprocess.mean is not None
        if in_hu and self.modality != "ct":
            raise ValueError(
                f'preprocess.intensity = "{self.preprocess.intensity}" is for modality = "ct", which is '
                f'"{self.modality}"; use "percentile"'
            )
        self._check_patches(self.preprocess.fit == "patches", "which is not chosen")
        if self.task.kind == "reconstruction" and max(self.preprocess.size) <= self.task.mask_size:
            raise ValueError(
                f"task.mask_size is {self.task.mask_size}, and preprocess.size {list(self.preprocess.size)} is one "
                f"square of it: hidden, nothing is left to restore it from. Use a smaller mask_size, or a larger size"
            )
        self._check_size()

    @property
    def in_colour(self) -> bool:
        """Whether the channels are the colours of one picture."""
        return bool(self.channels) and set(self.channels) <= set(COLOURS)

    @property
    def table_only(self) -> bool:
        """Whether the network sees a case's table and no image."""
        return self.model.name == "mlp"

    @property
    def of_bags(self) -> bool:
        """Whether a case is a bag of feature vectors that somebody has computed: tiles of a slide, not the slide."""
        return self.model.name == BAGWISE

    def _check_task(self) -> None:
        task, name = self.task, self.model.name
        if self.plan == "federated" and self.transfer.sha256:
            raise ValueError('transfer is for a network that the study names, plan = "federated" makes one')
        if self.plan == "federated" and task.kind != "segmentation":
            raise ValueError(f'plan = "federated" is for kind = "segmentation", the task is a {task.kind}')
        pixelwise = task.kind in ("segmentation", "detection", "reconstruction")
        if pixelwise != (name in PIXELWISE) and self.plan == "given":
            fitting = PIXELWISE if pixelwise else ENCODERS
            if not (task.kind == "prognosis" and name == "mlp"):
                raise ValueError(f'model.name = "{name}" is not for a {task.kind}; use one of {", ".join(fitting)}')
        if name == "mlp" and (task.kind != "prognosis" or not task.covariates):
            raise ValueError('model.name = "mlp" sees a table: it needs task.kind = "prognosis" and task.covariates')
        if self.of_bags and task.kind != "classification":
            raise ValueError(
                f'model.name = "{name}" answers for bags of features; it needs task.kind = "classification"'
            )
        if task.covariates and name != "mlp":
            raise ValueError('task.covariates are for model.name = "mlp", which sees a table and no image')
        if self.preprocess.fit == "patches" and task.kind not in ("segmentation", "detection"):
            raise ValueError(f'preprocess.fit = "patches" is for a segmentation or detection, this is a {task.kind}')
        if self.evaluate.reference and (self.table_only or self.of_bags or not self.evaluate.every):
            raise ValueError("evaluate.reference counts images at the final evaluation; it needs both")
        if self.evaluate.reference and task.kind in ("detection", "reconstruction"):
            raise ValueError(f"evaluate.reference has no grids for the answers of a {task.kind}")
        if task.kind == "reconstruction" and (self.protect.privacy is not None or self.model.supervised):
            raise ValueError(
                "[protect.privacy] and model.supervised are for tasks with labels; a reconstruction hides parts of "
                "whole batches"
            )
        if (self.table_only or self.of_bags) and (self.augment != Augment() or self.channels):
            raise ValueError(f'augment and channels are for images; model.name = "{name}" sees none')
        sided = next((name for name in task.answers if {"left", "right"} & set(name.split("-"))), None)
        if self.augment.flip_left_right and sided is not None:
            raise ValueError(
                f"augment.flip_left_right mirrors images, and {sided!r} names a side: half of the examples would teach "
                f"the wrong one. Set it to false, or answer for both sides under one name"
            )
        if self.of_bags and (self.protect.privacy is not None or self.unlabelled.method != "none"):
            raise ValueError(f'model.name = "{name}" sees no images, which [protect.privacy] and [unlabelled] are for')

    def _check_patches(self, drawn: bool, why_not: str) -> None:
        for key, given in (("train.foreground", self.train.foreground), ("evaluate.overlap", self.evaluate.overlap)):
            if given is not None and not drawn:
                raise ValueError(f'{key} is {given}; it is for preprocess.fit = "patches", {why_not}')

    @property
    def fewest(self) -> int:
        """Examples that a batch needs to be trained on: two, where batch norm sees one value of a channel of each."""
        return 2 if self.model.name in ENCODERS and self.model.norm == "batch" and self._ends < 2 else 1

    @property
    def _ends(self) -> int:
        """Values that the last norm of an encoder sees of a channel of one example."""
        name = self.model.name
        if name.startswith("vgg"):  # halves once more behind it
            return prod(edge // (SMALLEST_EDGE // 2) for edge in self.preprocess.size)
        up = SMALLEST_EDGE - 1 if name.startswith("resnet") else 0  # whose strides round up
        return prod((edge + up) // SMALLEST_EDGE for edge in self.preprocess.size)

    def _check_size(self) -> None:
        size, divisors, model = self.preprocess.size, self.model.divisors, self.model
        if model.name in ENCODERS:
            least = SMALLEST_EDGE if model.norm != "instance" else 2 * SMALLEST_EDGE  # one value has no deviation
            if min(size) < least:
                raise ValueError(f'preprocess.size {list(size)}: model.name = "{model.name}" wants {least} or more')
            if self.train.batch_size < self.fewest:
                raise ValueError(
                    f'preprocess.size {list(size)} leaves one value at the end of model.name = "{model.name}" for '
                    f'model.norm = "batch" to normalise where a batch holds one example; make train.batch_size 2 or '
                    f"more, or an edge {2 * SMALLEST_EDGE} or more"
                )
            return
        if any(edge % divisor for edge, divisor in zip(size, divisors, strict=True)):
            raise ValueError(
                f"preprocess.size {list(size)} must be multiples of {divisors[0]}, the U-Net halves it four times"
                if model.name == "unet"
                else f"preprocess.size {list(size)} must be multiples of {list(divisors)}, as the network halves it"
            )
        together = model.deepest // model.groups if model.norm == "group" else 1
        if prod(edge // divisor for edge, divisor in zip(size, divisors, strict=True)) * together < 2:
            raise ValueError(
                f"preprocess.size {list(size)} leaves one value at the bottom of the U-Net for "
                f'model.norm = "{model.norm}" to normalise; use a larger size, or "group" with fewer groups'
            )


def canonical(study: Study) -> bytes:
    """The bytes that a study is known by: every key, defaults included, as canonical JSON."""
    return canonical_json(plain(study))


def sha256(study: Study) -> str:
    return hashlib.sha256(canonical(study)).hexdigest()


SIGNED = "study"  # purpose of the coordinator's signature


def statement(run: str, study_sha256: str) -> bytes:
    """What the coordinator signs: that this run is of this study."""
    return canonical_json({"run": run, "study_sha256": study_sha256})


def from_json(text: bytes | str, where: str) -> Study:
    return parse_json(Study, text, where)


def ready_studies() -> dict[str, Path]:
    """Name -> file of each study that comes with the package."""
    folder = Path(str(files("shared_models"))) / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_study(name_or_path: str) -> Study:
    """A ready study by its name, or a study file by its path.

    Raises:
        StudyInvalid: an unknown name, a missing file, or a wrong key, type, range or combination.
    """
    ready = ready_studies()
    path = ready.get(name_or_path, Path(name_or_path))
    if name_or_path not in ready and not path.exists() and path.suffix != ".toml":
        raise StudyInvalid(
            f"{name_or_path!r} is neither a study file nor a ready study. Ready: {', '.join(ready)}; "
            f"or give the path of a study.toml."
        )
    return parse(Study, read_toml(path), str(path))
