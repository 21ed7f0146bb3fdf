"""What the gate knows: what a study needs of a case, what was found in one, and how that is kept for the next look."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedclient.data.cases import Case
from fedclient.data.findings import Finding
from fedclient.data.truths import has_truth
from shared_models.files import canonical_json
from shared_models.parse import STRICT, plain
from shared_models.study import Study, Task

VERSION = 4  # of the checks: raise it when they see more, or something else


@dataclass(frozen=True, slots=True)
class Needs:
    """What a study asks of each case; without a study nothing, and then only what any study would want is checked.

    Attributes:
        modality: `ct`, `xray`, `mr`; empty without a study.
        channels: as the study names them.
        labels: what masks are to mark.
        spacing_mm: voxel size that images are resampled to, if they are.
        patches: they are kept whole at it, for patches to be drawn from.
        task: that is answered by something else than masks: classes, follow-up, lesions.
        table_only: the network sees a case's table and no image.
        unlabelled: it learns from training cases without labels too.
        tile_features: features of a tile, where a case is a bag of them; None where it is an image.
    """

    modality: str = ""
    channels: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    spacing_mm: tuple[float, ...] | None = None
    task: Task | None = None
    table_only: bool = False
    unlabelled: bool = False
    tile_features: int | None = None
    patches: bool = False

    @property
    def wants_labels(self) -> bool:
        return bool(self.labels) or self.task is not None

    @property
    def answers(self) -> tuple[str, ...]:
        """What some case is to show."""
        return self.labels if self.task is None else self.task.labels

    def labelled(self, case: Case) -> bool:
        """Whether there is something to learn from; without a study, whether there are labels of any kind."""
        return case.label is not None if self.task is None else has_truth(case, self.task)

    @property
    def digest(self) -> str:
        """12 hex digits of all that the findings of a case depend on beside its files."""
        return hashlib.sha256(canonical_json([VERSION, plain(self)])).hexdigest()[:12]


def needs_of(study: Study | None) -> Needs:
    if study is None:
        return Needs()
    spacing_mm = None if study.table_only or study.of_bags else study.preprocess.spacing_mm
    tiles = study.model.features[0] if study.of_bags else None
    unlabelled = study.unlabelled.method != "none"
    patches = spacing_mm is not None and study.preprocess.fit == "patches"
    if study.task.kind == "segmentation":
        return Needs(
            study.modality, study.channels, study.task.labels, spacing_mm, unlabelled=unlabelled, patches=patches
        )
    if study.task.kind == "reconstruction":  # it looks at no label
        return Needs(study.modality, study.channels, (), spacing_mm)
    return Needs(
        study.modality, study.channels, (), spacing_mm, study.task, study.table_only, unlabelled, tiles, patches
    )


def takes_part(case: Case, needs: Needs) -> bool:
    """Whether something is learned from the image of a case, or it is scored: with labels, or without for training."""
    return needs.labelled(case) or (needs.unlabelled and case.split == "train")


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn of one label in a case.

    Attributes:
        share: of the image's voxels.
        level: median grey value inside it.
    """

    __pydantic_config__ = STRICT
    voxels: int
    share: float
    level: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen in a case that could be read; no identifier, and no value that says who it is without the secret.

    Attributes:
        axes: voxels along I, J, K.
        level_1, level_99: percentiles of its grey values.
        pixels: HMAC of its grid and all its voxels.
        bands: HMACs of the parts of a perceptual hash; None for a part without contrast.
        axial, coronal: 16 x 16 grey values of its projections, for telling which way it lies.
        person: HMAC of the PatientID in its headers; empty where there is none.
        mask: HMAC of its labels, voxel by voxel; empty where none are drawn.
        shown: labels of the study that the case shows: classes, lesions, or that the event came.
    """

    __pydantic_config__ = STRICT
    modality: str | None
    manufacturer: str | None
    body_part: str | None
    slice_thickness_mm: float | None
    tube_kv: float | None
    lossy: bool
    picture: bool
    spacing_mm: tuple[float, float, float]
    axes: tuple[int, int, int]
    level_1: float
    level_99: float
    pixels: str
    bands: tuple[str | None, ...]
    axial: tuple[int, ...]
    coronal: tuple[int, ...]
    person: str = ""
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    mask: str = ""

    def has(self, label: str) -> bool:
        """Whether the case shows a label of the study."""
        return label in self.shown or (label in self.drawn and self.drawn[label].voxels > 0)


@dataclass(frozen=True, slots=True)
class Looked:
    """One case after a look at it, as it is kept.

    Attributes:
        state: of its files, as `state_of` gives it.
        facts: None where the image could not be read.
        picture: a small PNG in base64; stays on site, and may show what is burnt into the pixels.
    """

    __pydantic_config__ = STRICT
    state: str
    facts: Facts | None
    findings: tuple[Finding, ...]
    picture: str = field(repr=False, default="")


@dataclass(frozen=True, slots=True)
class Seen:
    """A case and what was seen in it."""

    case: Case
    looked: Looked
