"""VGG (Simonyan & Zisserman 2015, table 1, columns A, B, D, E) under torchvision's names for its tensors.

With `norm = "none"` the tensors are those of torchvision's vgg11 to vgg19, with a norm those of its `_bn` networks,
less the batch statistics.
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

CONVOLUTIONS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)
POOLED = 7  # pixels along an edge of what the published head sees


class Vgg(nn.Module):
    """Logits float32[B, outputs] of images float32[B, in_channels, *size]."""

    def __init__(
        self,
        name: str,
        spatial_dims: int,
        in_channels: int,
        outputs: int,
        norm: Callable[[int], nn.Module] | None,
        full_head: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        pool = nn.MaxPool2d if spatial_dims == 2 else nn.MaxPool3d
        average = nn.AdaptiveAvgPool2d if spatial_dims == 2 else nn.AdaptiveAvgPool3d
        layers: list[nn.Module] = []
        before = in_channels
        for channels, count in zip(CHANNELS, CONVOLUTIONS[name], strict=True):
            for _ in range(count):
                layers.append(conv(before, channels, 3, padding=1))
                layers += [norm(channels)] if norm is not None else []
                layers.append(nn.ReLU())
                before = channels
            layers.append(pool(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = average(POOLED if full_head else 1)
        if full_head:
            self.classifier = nn.Sequential(
                nn.Linear(before * POOLED**spatial_dims, 4096), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(4096, outputs),
            )  # fmt: skip
        else:
            self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(before, outputs))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits
