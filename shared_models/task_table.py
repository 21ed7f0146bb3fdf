"""`[task]` of a study: what the network answers, and against which loss it learns."""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from shared_models.parse import SHOWN, STRICT

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
Column = Annotated[str, Field(max_length=80, pattern=f"^{SHOWN}+$")]
Kind: TypeAlias = Literal["segmentation", "classification", "prognosis", "detection", "reconstruction"]

LOSSES = {
    "segmentation": ("bce", "dice_bce", "ce", "dice_ce", "focal", "tversky"),
    "classification": ("bce", "ce", "focal"),
    "prognosis": ("hazard",),
    "detection": ("centre",),
    "reconstruction": ("masked_l1",),
}
OF_KIND = {  # the keys that a kind of task reads beside kind, labels and loss
    "segmentation": {"regions", "tversky_beta", "tolerance_mm"},
    "classification": {"class_weights", "column", "none", "specificity"},
    "prognosis": {"intervals_days", "time_column", "event_column", "covariates"},
    "detection": set[str](),
    "reconstruction": {"mask_share", "mask_size"},
}


@dataclass(frozen=True, slots=True)
class Region:
    """An answer that holds several of the labels at once, as BraTS' whole tumour holds its core."""

    __pydantic_config__ = STRICT
    name: Name
    parts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=32)]


@dataclass(frozen=True, slots=True)
class Covariate:
    """A column of the case's table; the network sees (value - mean) / deviation, the same at every site."""

    __pydantic_config__ = STRICT
    column: Column
    mean: Finite = 0.0
    deviation: Positive = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """`[task]`: what the network answers.

    Attributes:
        kind: `segmentation` of voxels, `classification` of images, `prognosis`: when an event comes, `detection`: where
            lesions are and how large, or `reconstruction` of hidden parts of images, which needs no label and whose
            weights begin another study.
        labels: names of what is marked or told apart; mask value k is labels[k - 1]. Prognosis has one, the event, and
            reconstruction one, what is restored. Detection with `lesion` as its only label finds whatever a site has
            marked, under any name.
        loss: segmentation: `bce` binary cross-entropy, `dice_bce` soft Dice plus that in equal parts, `focal`,
            `tversky` (a sigmoid for each label), `ce`, `dice_ce` (a softmax over the labels and the background).
            Classification: `bce` where an image may show several labels or none, `ce` where it shows exactly one, and
            then also `focal`.
            Prognosis: `hazard`, the likelihood of discrete time. Detection: `centre`, the penalty-reduced focal loss of
            centres and the L1 of extents (Zhou et al. 2019). Reconstruction: `masked_l1`.
        regions: segmentation: what is answered instead of the labels, each a union of some of them.
        focal_gamma: how much less an easy voxel or image counts (Lin et al. 2017, equation 4).
        tversky_beta: weight of missed voxels, against 1 - beta of false ones (Salehi et al. 2017, equation 3).
        tolerance_mm: measure surfaces too, on the image's own grid: how far apart two may lie and still agree.
        class_weights: of each label in the loss of a classification; none given weigh alike.
        column: of a case's table that holds its labels, as `a` or `a|b`.
        none: what stands there where an image shows none of the labels.
        specificity: at which sensitivity is reported.
        intervals_days: ends of the intervals in which the event may come; who is followed for longer is censored then.
        time_column, event_column: of the case's table: days followed, and 1 where the event came then.
        covariates: columns that model `mlp` sees instead of an image.
        mask_share, mask_size: of a reconstruction: which share of an image is hidden, in squares of so many pixels.
    """

    __pydantic_config__ = STRICT
    kind: Kind = "segmentation"
    labels: Annotated[tuple[Name, ...], Field(min_length=1, max_length=32)] = ("lung",)
    loss: Literal["bce", "dice_bce", "ce", "dice_ce", "focal", "tversky", "hazard", "centre", "masked_l1"] = "bce"
    regions: Annotated[tuple[Region, ...], Field(max_length=32)] = ()
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    tversky_beta: Annotated[float, Field(gt=0, lt=1)] = 0.7
    tolerance_mm: Positive | None = None
    class_weights: Annotated[tuple[Positive, ...], Field(max_length=32)] = ()
    column: Column = "label"
    none: Annotated[str, Field(max_length=80, pattern=f"^{SHOWN}*$")] = "none"
    specificity: Annotated[float, Field(gt=0, lt=1)] = 0.9
    intervals_days: Annotated[tuple[Positive, ...], Field(max_length=64)] = ()
    time_column: Column = "time"
    event_column: Column = "event"
    covariates: Annotated[tuple[Covariate, ...], Field(max_length=512)] = ()
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    mask_size: Annotated[int, Field(ge=2, le=64)] = 16

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels {list(self.labels)} must differ from each other")
        if self.focal_gamma != 2.0 and self.loss != "focal":
            raise ValueError('focal_gamma is for loss = "focal"')
        if self.loss not in LOSSES[self.kind]:
            raise ValueError(f'loss = "{self.loss}" is not for a {self.kind}; allowed: {", ".join(LOSSES[self.kind])}')
        defaults = {f.name: f.default for f in fields(Task)}
        for kind, keys in OF_KIND.items():
            strange = sorted(key for key in keys if getattr(self, key) != defaults[key])
            if kind != self.kind and strange:
                raise ValueError(f'{strange[0]} is for kind = "{kind}", this is a {self.kind}')
        if self.kind == "segmentation":
            self._segments()
        elif self.kind == "classification":
            self._classifies()
        elif self.kind == "prognosis":
            self._foretells()
        elif self.kind == "reconstruction":
            self._restores()

    def _segments(self) -> None:
        if self.tversky_beta != 0.7 and self.loss != "tversky":
            raise ValueError('tversky_beta is for loss = "tversky"')
        if self.regions and self.loss in ("ce", "dice_ce"):
            raise ValueError(f'regions overlap, loss = "{self.loss}" is for labels that do not; use "dice_bce"')
        names = [region.name for region in self.regions]
        if len(set(names)) < len(names):
            raise ValueError(f"regions {names} must differ from each other")
        for region in self.regions:
            if strange := sorted(set(region.parts) - set(self.labels)):
                raise ValueError(f"region {region.name!r} has the part {strange[0]!r}; labels are {list(self.labels)}")

    def _classifies(self) -> None:
        if self.class_weights and len(self.class_weights) != len(self.labels):
            raise ValueError(f"class_weights has {len(self.class_weights)} numbers for {len(self.labels)} labels")
        if self.exclusive and len(self.labels) < 2:
            raise ValueError(
                f'loss = "{self.loss}" tells two or more labels apart; for one that is there or not use "bce"'
            )
        if self.none in self.labels:
            raise ValueError(f"none = {self.none!r} is a label as well")

    def _foretells(self) -> None:
        ends = self.intervals_days
        if len(self.labels) != 1:
            raise ValueError(f"labels of a prognosis is the one event, there are {len(self.labels)}")
        if len(ends) < 2 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"intervals_days must be two or more days that rise, it is {list(ends)}")
        columns = [covariate.column for covariate in self.covariates]
        if len(set(columns)) < len(columns):
            raise ValueError("covariates must differ from each other")

    def _restores(self) -> None:
        if len(self.labels) != 1:
            raise ValueError(f"labels of a reconstruction is what is restored, there are {len(self.labels)}")

    @property
    def answers(self) -> tuple[str, ...]:
        """What is scored, by name: the regions where there are some, else the labels."""
        return tuple(region.name for region in self.regions) or self.labels

    @property
    def any_lesion(self) -> bool:
        """Whether whatever a site has marked is found, under any name."""
        return self.kind == "detection" and self.labels == ("lesion",)

    @property
    def exclusive(self) -> bool:
        """Whether exactly one of the labels is true (a softmax)."""
        return self.loss in ("ce", "dice_ce") or (self.kind == "classification" and self.loss == "focal")

    @property
    def outputs(self) -> int:
        """Channels of the network's answer; a detection has an extent along each axis besides."""
        if self.kind == "prognosis":
            return len(self.intervals_days)
        return len(self.answers) + (self.kind == "segmentation" and self.exclusive)
