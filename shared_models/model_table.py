"""`[model]` of a study: a network by name and arguments."""

from dataclasses import dataclass, fields
from math import prod
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from shared_models.parse import STRICT

Network: TypeAlias = Literal[
    "unet", "dynunet", "residual-unet", "segresnet", "resnet18", "resnet34", "resnet50",
    "vgg11", "vgg13", "vgg16", "vgg19", "densenet121", "efficientnet-b0", "mlp", "attention-mil",
]  # fmt: skip
ENCODERS = (  # networks that answer with one vector for each image
    "resnet18", "resnet34", "resnet50", "vgg11", "vgg13", "vgg16", "vgg19", "densenet121", "efficientnet-b0",
)  # fmt: skip
BAGWISE = "attention-mil"  # answers for a bag of feature vectors, one for each tile of a slide
PIXELWISE = ("unet", "dynunet", "residual-unet", "segresnet")
NORMLESS = ("mlp", BAGWISE)
FEATURES = {  # the layer whose output, averaged over space, stands for the image
    "unet": "down_4",
    "dynunet": "bottleneck",
    "segresnet": "down_layers.3",
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), "layer4"),
    **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), "features"),
    "densenet121": "class_layers.pool",
    "efficientnet-b0": "_avg_pooling",
}
SMALLEST_EDGE = 32  # of an encoder's example: it halves five times
OF_MODEL = {  # the keys that some networks read and others do not
    "features": ("unet", "residual-unet", "segresnet", "mlp", BAGWISE),
    "levels": ("dynunet",),
    "supervised": ("dynunet",),
    "groups": ("unet", "dynunet", "residual-unet", "segresnet", *ENCODERS),
    "dropout": (*PIXELWISE, "mlp", "vgg11", "vgg13", "vgg16", "vgg19", "densenet121"),
    "head": ("vgg11", "vgg13", "vgg16", "vgg19"),
    "width": ("resnet18", "resnet34", "resnet50"),
}
Features = Annotated[int, Field(ge=4, le=2048)]


@dataclass(frozen=True, slots=True)
class Level:
    """One level of `dynunet`: channels, how it shrinks the level above, and how wide it convolves, along each axis."""

    __pydantic_config__ = STRICT
    features: Features
    stride: Annotated[tuple[Literal[1, 2], ...], Field(min_length=2, max_length=3)]
    kernel: Annotated[tuple[Literal[1, 3], ...], Field(min_length=2, max_length=3)]


@dataclass(frozen=True, slots=True)
class Model:
    """`[model]`: a network by name and arguments.

    Attributes:
        name: answering voxel by voxel: `unet`, `dynunet`, `residual-unet`, `segresnet`; image by image: `resnet18` and
            the others of its kind; a table without an image: `mlp`; a bag of feature vectors, as of the tiles of a
            slide: `attention-mil`.
        features: channels of the five levels of `unet`, then of the last up-sampling (MONAI BasicUNet's order); of the
            levels of `residual-unet`; the first of `segresnet`, doubled three times; the hidden layers of `mlp`; of
            `attention-mil` the width of a tile's features, of its embedding, and of the attention.
        levels: of `dynunet`, from full size down; its features are there. A federated plan sets them.
        supervised: of `dynunet`: how many levels below full size answer too while it trains, each counting half of the
            one above in the loss (Isensee et al. 2021, online methods).
        norm: `group` (of `groups` groups) or `instance`; batch statistics leak and differ between sites, so `batch`
            is only for norm layers that stay at their site (`personal.keep`). `none` is for a VGG as it was published,
            and for `mlp` and `attention-mil`.
        head: of a VGG: `slim` is one layer on pooled features; `full` are the published three, 120 M parameters.
        width: of a ResNet: channels of its first blocks, doubled three times; 64 as it was published. The fewer, the
            less noise a private study takes in all.
    """

    __pydantic_config__ = STRICT
    name: Network = "unet"
    spatial_dims: Literal[2, 3] = 2
    features: Annotated[tuple[Features, ...], Field(max_length=12)] = (32, 32, 64, 128, 256, 32)
    levels: Annotated[tuple[Level, ...], Field(max_length=12)] = ()
    supervised: Annotated[int, Field(ge=0, le=8)] = 0
    norm: Literal["group", "instance", "batch", "none"] = "group"
    groups: Annotated[int, Field(ge=1, le=64)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head: Literal["slim", "full"] = "slim"
    width: Annotated[int, Field(ge=8, le=128, multiple_of=8)] = 64

    def __post_init__(self) -> None:
        if self.name == "unet" and self.levels:
            raise ValueError('levels are of name = "dynunet"; "unet" has features')
        defaults = {f.name: f.default for f in fields(Model)}
        for key, names in OF_MODEL.items():
            if self.name not in names and getattr(self, key) != defaults[key]:
                raise ValueError(f'{key} is not an argument of name = "{self.name}"; it is of {", ".join(names)}')
        if self.name == "dynunet" and len(self.levels) < 3:
            raise ValueError(f'name = "dynunet" needs at least 3 levels, there are {len(self.levels)}')
        if self.supervised and self.supervised > len(self.levels) - 2:
            raise ValueError(f"supervised = {self.supervised}: {len(self.levels)} levels have {len(self.levels) - 2}")
        for level in self.levels:
            if len(level.stride) != self.spatial_dims or len(level.kernel) != self.spatial_dims:
                raise ValueError(f"levels need {self.spatial_dims} strides and kernels each, as spatial_dims says")
        if self.levels and set(self.levels[0].stride) != {1}:
            raise ValueError("the first of levels is at full size: its strides are 1")
        self._check_features()
        if self.norm == "none" and self.name not in NORMLESS and not self.name.startswith("vgg"):
            raise ValueError(f'norm = "none" is for a VGG or "mlp"; "{self.name}" needs "group" or "instance"')
        if self.name in NORMLESS and self.norm != "none":
            raise ValueError(f'name = "{self.name}" has no norm; say norm = "none"')
        if self.name.startswith("vgg") and self.spatial_dims == 3 and self.head == "full":
            raise ValueError('head = "full" is for spatial_dims = 2; in 3-D it would have 2 billion parameters')

    def _check_features(self) -> None:
        count = {"unet": (6, 6), "segresnet": (1, 1), "residual-unet": (2, 8), "mlp": (0, 8), BAGWISE: (3, 3)}
        least, most = count.get(self.name, (0, 12))
        if not least <= len(self.features) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ValueError(f'features {list(self.features)} must be {wanted} numbers for name = "{self.name}"')
        features = [level.features for level in self.levels] or list(self.features)
        if self.norm == "group" and self.name in PIXELWISE and any(f % self.groups for f in features):
            raise ValueError(f"features {features} must all be multiples of groups = {self.groups}")
        if self.norm == "group" and self.name in ENCODERS and 8 % self.groups:
            raise ValueError(f'groups = {self.groups} must divide 8 for name = "{self.name}"')

    @property
    def divisors(self) -> tuple[int, ...]:
        """What the edges of an example must be multiples of."""
        if self.name == "unet":
            return (16,) * self.spatial_dims
        if self.name == "segresnet":
            return (8,) * self.spatial_dims
        if self.name == "residual-unet":
            return (2 ** (len(self.features) - 1),) * self.spatial_dims
        if self.name == "dynunet":
            return tuple(prod(axis) for axis in zip(*(level.stride for level in self.levels), strict=True))
        return (1,) * self.spatial_dims

    @property
    def deepest(self) -> int:
        """Channels at the bottom of a network that answers voxel by voxel."""
        if self.name == "dynunet":
            return self.levels[-1].features
        if self.name == "segresnet":
            return 8 * self.features[0]
        return self.features[4] if self.name == "unet" else self.features[-1]
