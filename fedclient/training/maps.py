"""Where a network looked: Grad-CAM, occlusion sensitivity and SmoothGrad (MONAI's), as maps over one example.

A map says what moved the score of one answer. For a classification the score is the answer's logit. For a segmentation
it is the mean logit over the region that is predicted on the unchanged example, as in Seg-Grad-CAM (Vinogradova et al.
2020, equation 2): the map says what in the image made the network mark that region.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from monai.visualize.class_activation_maps import GradCAM
from monai.visualize.gradient_based import SmoothGrad
from monai.visualize.occlusion_sensitivity import OcclusionSensitivity
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models.errors import ExplanationFailed
from shared_models.study import Study
from shared_models.tasks.chosen import functions_of

Method = Literal["grad-cam", "occlusion", "smooth-grad"]
Saliency: TypeAlias = NDArray[np.float32]
LEAST_CELLS = 7  # of a feature map along its shortest edge, below which it tells no place (VGG's and ResNet's have 7)
PARTS = 8  # occluding boxes along the longest edge
OVERLAP = 0.5  # of their edge
TOGETHER = 16  # occluded copies in one pass
NOISY = 16  # copies that SmoothGrad averages over
NOISE = 0.1  # of the image's range (Smilkov et al. 2017, section 3.2: 10 to 20 %)


@dataclass(frozen=True, slots=True)
class Explained:
    """One map of one example.

    Attributes:
        answer: which of the task's answers.
        chance: its probability; of a segmentation the mean over the region.
        saliency: float32[*size], from 0 to 1, 1 where the score depends most.
        layer: that Grad-CAM looked at; empty otherwise.
        region: bool[*size], of a segmentation what is predicted; None of a classification.
    """

    method: Method
    answer: str
    chance: float
    saliency: Saliency
    layer: str = ""
    region: NDArray[np.bool_] | None = None


class RegionScore(nn.Module):
    """A segmentation network that answers as a classification does: the mean logit over a region, float32[B, L]."""

    def __init__(self, net: nn.Module, region: Tensor) -> None:
        """`region`: bool[L, *size], what is predicted of each channel on the unchanged example."""
        super().__init__()
        self.net = net
        self.region = region

    def forward(self, images: Tensor) -> Tensor:
        logits, inside = self.net(images), self.region.to(images)
        space = tuple(range(1, inside.ndim))
        mean: Tensor = (logits * inside).flatten(2).sum(dim=2) / inside.sum(dim=space).clamp(min=1)
        return mean


def explain(
    net: nn.Module,
    image: Tensor,
    study: Study,
    answer: str,
    method: Method,
    *,
    layer: str = "",
    seed: int = 0,
    region: NDArray[np.bool_] | None = None,
) -> Explained:
    """The map of one example float32[C, *size]; `net` is left as it was.

    Args:
        net: many examples cost less with one that is `prepared` already.
        layer: that Grad-CAM looks at, by its name in the network; `cam_layer` says which if none is given.
        seed: of SmoothGrad's noise.
        region: bool[*size], of a segmentation: what is explained instead of what the network predicts itself.

    Raises:
        ExplanationFailed: an answer or a layer that is not there, a segmentation that predicts nothing, or a network
            whose score does not depend on the example.
    """
    channel = channel_of(study, answer)
    device = next(net.parameters()).device
    batch = image[None].to(device).float()
    scored = net if isinstance(net, Prepared) else prepared(net)
    with torch.no_grad():
        chances = functions_of(study.task).chances(scored(batch).float())
    chance = float(chances[0, channel].mean())
    answering: nn.Module = scored
    if study.task.kind == "segmentation":
        marked = predicted(chances[0], study)
        if region is not None:
            marked[channel] = torch.from_numpy(region).to(device)
        region = marked[channel].cpu().numpy()
        if not region.any():
            raise ExplanationFailed(f"nothing is predicted of {answer!r}, so there is no region to explain.")
        chance = float(chances[0, channel][marked[channel]].mean())
        answering = RegionScore(scored, marked)
    else:
        region = None
    if method == "grad-cam":
        chosen = layer or cam_layer(scored.net, study, batch)
        inner = "net.net." if region is not None else "net."
        saliency = grad_cam(answering, batch, channel, inner + chosen)
        return Explained(method, answer, chance, saliency, chosen, region)
    made = occlusion if method == "occlusion" else smooth_grad
    return Explained(method, answer, chance, made(answering, batch, channel, seed), "", region)


class Prepared(nn.Module):
    """A copy of a network that maps are taken of: MONAI's hooks and switches stay on what they are put on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.net(images)
        return answer


def prepared(net: nn.Module) -> Prepared:
    """A copy that answers as in use, has no gradients of its weights, and overwrites nothing that a hook has seen."""
    made = copy.deepcopy(net).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            setattr(module, "inplace", False)  # noqa: B010
    return Prepared(made)


def channel_of(study: Study, answer: str) -> int:
    """Of the network's output.

    Raises:
        ExplanationFailed: the task has no such answer, or none that an image is the reason for.
    """
    if study.task.kind not in ("segmentation", "classification"):
        raise ExplanationFailed(f"maps are of a segmentation or a classification, the study is a {study.task.kind}.")
    if answer not in study.task.answers:
        raise ExplanationFailed(f"the study has no {answer!r}. It answers: {', '.join(study.task.answers)}.")
    background = study.task.kind == "segmentation" and study.task.exclusive
    return study.task.answers.index(answer) + background


def predicted(chances: Tensor, study: Study) -> Tensor:
    """bool[L, *size]: what a segmentation marks, from its probabilities [L, *size]."""
    if not study.task.exclusive:
        return chances > study.evaluate.threshold
    most = chances.argmax(dim=0)
    return torch.stack([most == channel for channel in range(len(chances))])


def cam_layer(net: nn.Module, study: Study, batch: Tensor) -> str:
    """The layer that Grad-CAM looks at where nobody says: the deepest whose map still tells places.

    Of a classification the last block with 7 cells along each edge, as those have for which Grad-CAM was described
    (Selvaraju et al. 2017, section 3); at small sizes the very last one would have 2. Of a segmentation the bottleneck,
    or of what is above it the deepest with so many cells. What runs more than once in a pass has no one map: a ResNet's
    blocks share one activation among their convolutions.

    Raises:
        ExplanationFailed: no layer keeps places.
    """
    runs: list[tuple[str, int]] = []
    modules = dict(net.named_modules())
    hooks = [module.register_forward_hook(_noting(runs, name, batch.ndim)) for name, module in modules.items() if name]
    try:
        with torch.no_grad():
            net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    times, cells_of = Counter(name for name, _ in runs), dict(runs)
    seen = [(name, cells) for name, cells in runs if cells > 1 and times[name] == 1]
    if not seen:
        raise ExplanationFailed("no block of the network keeps places, so Grad-CAM cannot tell where. Use occlusion.")
    least = min(LEAST_CELLS, min(batch.shape[2:]) // 2)

    def halved(name: str) -> bool:
        """Whether it lies in the middle of a block that leaves fewer cells."""
        around = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
        return any(0 < cells_of.get(a, 0) < least and not isinstance(modules[a], nn.Sequential) for a in around)

    fine = [(name, cells) for name, cells in seen if cells >= least and not halved(name)] or seen
    if study.task.kind == "segmentation":
        deepest = min(cells for _, cells in fine)
        return next(name for name, cells in reversed(fine) if cells == deepest)
    return fine[-1][0]


def _noting(runs: list[tuple[str, int]], name: str, dims: int) -> Callable[[nn.Module, Any, Any], None]:
    """Notes each run of a module, with the cells along the shortest edge of what it made; 0 where that has none."""

    def note(module: nn.Module, given: Any, made: Any) -> None:
        runs.append((name, min(made.shape[2:]) if isinstance(made, Tensor) and made.ndim == dims else 0))

    return note


def grad_cam(net: nn.Module, batch: Tensor, channel: int, layer: str) -> Saliency:
    """Selvaraju et al. 2017, equations 1 and 2; the map of `layer` scaled to the example.

    Raises:
        ExplanationFailed: no such layer, or one that has no single map, as it runs several times in one pass.
    """
    modules, shown = dict(net.named_modules()), layer.removeprefix("net.").removeprefix("net.")
    if layer not in modules:
        raise ExplanationFailed(f"the network has no layer {shown!r}. Leave --layer out to have one chosen.")
    runs: list[str] = []

    def once(module: nn.Module, given: Any, made: Any) -> None:
        runs.append(shown)
        if len(runs) > 1:
            raise ExplanationFailed(
                f"layer {shown!r} runs more than once in one pass, so it has no one map. Name the block that it is "
                f"in, or leave --layer out to have one chosen."
            )

    seen = batch.clone().requires_grad_(True)  # so that hooks fire at the first layer as well
    modules[layer].register_forward_hook(once)
    try:
        made = GradCAM(net, layer, postprocessing=_as_it_is)(seen, class_idx=channel)
    finally:
        for module in net.modules():  # which MONAI leaves its hooks on
            module._forward_hooks.clear()
            module._backward_hooks.clear()
    return scaled(made[0, 0].detach().cpu().numpy())


def occlusion(net: nn.Module, batch: Tensor, channel: int, seed: int = 0) -> Saliency:
    """How much the score falls where a box hides the example by its mean (Zeiler & Fergus 2014, section 4.2)."""
    edge = max(4, max(batch.shape[2:]) // PARTS)
    box = [min(edge, whole) for whole in batch.shape[2:]]
    hide = OcclusionSensitivity(
        net, mask_size=box, overlap=OVERLAP, n_batch=TOGETHER, verbose=False, mode="mean_img", activate=False
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)  # MONAI 1.6 slices by lists
        before = net(batch)[0, channel]
        hidden, _ = hide(batch)
    fall = before - torch.as_tensor(hidden)[0, channel]
    return scaled(fall.clamp(min=0).cpu().numpy())


def smooth_grad(net: nn.Module, batch: Tensor, channel: int, seed: int = 0) -> Saliency:
    """Smilkov et al. 2017, equation in section 3: the gradient's size, over noisy copies, the largest of the channels.

    A few pixels have very large gradients: the hundredth part that is largest counts alike.
    """
    with torch.random.fork_rng(devices=[batch.device] if batch.device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = SmoothGrad(net, stdev_spread=NOISE, n_samples=NOISY, verbose=False)(batch.clone(), index=channel)
    size = made[0].abs().amax(dim=0).detach().cpu().numpy()
    return scaled(np.minimum(size, np.quantile(size, 0.99)))


def scaled(saliency: NDArray[Any]) -> Saliency:
    """From 0 to 1; all 0 where nothing stands out.

    Raises:
        ExplanationFailed: values that are not finite.
    """
    if not np.isfinite(saliency).all():
        raise ExplanationFailed("the network's answer is not finite on this image. Its weights have diverged.")
    found: Saliency = saliency.astype(np.float32) - np.float32(saliency.min())
    found /= np.float32(max(float(found.max()), 1e-12))
    return found


def _as_it_is(saliency: Tensor) -> Tensor:
    return saliency
