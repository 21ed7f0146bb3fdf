"""Networks by name and arguments, and their weights as arrays.

No batch statistics but where norm layers stay at their site: they leak what a batch held, and differ between sites.
"""

import threading
from collections.abc import Callable, Iterator
from itertools import chain
from math import gcd, log
from typing import Any

import numpy as np
import torch
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.densenet import DenseNet121
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.efficientnet import EfficientNetBN
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from shared_models.errors import StudyInvalid, WeightsInvalid
from shared_models.mil import AttentionMil
from shared_models.model_table import FEATURES
from shared_models.seeds import seed_of
from shared_models.study import Model, Study
from shared_models.vgg import Vgg
from shared_models.weights import Arrays, Schema, difference, schema_of


def unet(model: Model, in_channels: int, out_channels: int) -> nn.Module:
    """U-Net (Ronneberger et al. 2015) as MONAI's BasicUNet: logits float32[B, out_channels, *size]."""
    net: nn.Module = BasicUNet(
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        features=model.features,
        norm=norm_words(model),
        dropout=model.dropout,
    )
    return net


def dynunet(model: Model, in_channels: int, out_channels: int) -> nn.Module:
    """nnU-Net's plain U-Net (Isensee et al. 2021) as MONAI's DynUNet: logits float32[B, out_channels, *size].

    Where lower levels are supervised, in training float32[B, 1 + levels, out_channels, *size], the answer first.
    """
    levels = model.levels
    net = DynUNet(
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[level.kernel for level in levels],
        strides=[level.stride for level in levels],
        upsample_kernel_size=[level.stride for level in levels[1:]],
        filters=[level.features for level in levels],
        dropout=model.dropout or None,
        norm_name=norm_words(model),
        deep_supervision=model.supervised > 0,
        deep_supr_num=max(1, model.supervised),
    )
    if model.supervised:
        net.register_forward_hook(_forget)
    return net


def _forget(net: nn.Module, given: Any, answer: Any) -> None:
    """Lets go of the lower levels' answers, which DynUNet keeps in a list: with them a network cannot be copied."""
    heads: Any = net.heads
    heads[:] = [torch.zeros(1)] * len(heads)


def norm_words(model: Model) -> tuple[str, dict[str, Any]]:
    """The norm layers of a network, in MONAI's words."""
    return (model.norm, {"affine": True} | ({"num_groups": model.groups} if model.norm == "group" else {}))


def residual_unet(model: Model, in_channels: int, out_channels: int) -> nn.Module:
    """U-Net with residual units (Kerfoot et al. 2019) as MONAI's UNet: logits float32[B, out_channels, *size]."""
    net: nn.Module = UNet(
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=model.features,
        strides=(2,) * (len(model.features) - 1),
        num_res_units=2,
        norm="batch",
        dropout=model.dropout,
    )
    return net


def segresnet(model: Model, in_channels: int, out_channels: int) -> nn.Module:
    """SegResNet (Myronenko 2018, without its autoencoder branch): logits float32[B, out_channels, *size]."""
    net: nn.Module = SegResNet(
        spatial_dims=model.spatial_dims,
        init_filters=model.features[0],
        in_channels=in_channels,
        out_channels=out_channels,
        dropout_prob=model.dropout or None,
        norm="batch",
    )
    return net


RESNETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
}


def resnet(model: Model, in_channels: int, outputs: int) -> nn.Module:
    """ResNet (He et al. 2016, table 1) with the stem and the names of torchvision: logits float32[B, outputs]."""
    block, layers = RESNETS[model.name]
    net: nn.Module = ResNet(
        block,
        list(layers),
        [model.width * 2**stage for stage in range(4)],
        spatial_dims=model.spatial_dims,
        n_input_channels=in_channels,
        num_classes=outputs,
        conv1_t_stride=2,  # MONAI's default of 1 costs four times as much
        bias_downsample=False,
    )
    return net


def vgg(model: Model, in_channels: int, outputs: int) -> nn.Module:
    norm = None if model.norm == "none" else lambda channels: _norm(model, channels)
    return Vgg(model.name, model.spatial_dims, in_channels, outputs, norm, model.head == "full", model.dropout)


def densenet(model: Model, in_channels: int, outputs: int) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017, table 1): logits float32[B, outputs]."""
    net: nn.Module = DenseNet121(
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        out_channels=outputs,
        dropout_prob=model.dropout,
        pretrained=False,
    )
    return net


def efficientnet(model: Model, in_channels: int, outputs: int) -> nn.Module:
    """EfficientNet-B0 (Tan & Le 2019, table 1): logits float32[B, outputs]."""
    net: nn.Module = EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        num_classes=outputs,
    )
    return net


def perceptron(model: Model, inputs: int, outputs: int) -> nn.Module:
    """Layers of `features` units over a table float32[B, inputs]; without any it is linear. Logits [B, outputs]."""
    layers: list[nn.Module] = []
    for units in model.features:
        layers += [nn.Linear(inputs, units), nn.ReLU(), nn.Dropout(model.dropout)]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def attention_mil(model: Model, in_channels: int, outputs: int) -> nn.Module:
    width, embedding, attention = model.features
    return AttentionMil(width, embedding, attention, outputs)


MAKERS: dict[str, Callable[[Model, int, int], nn.Module]] = {
    "unet": unet,
    "dynunet": dynunet,
    "residual-unet": residual_unet,
    "segresnet": segresnet,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), resnet),
    **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), vgg),
    "densenet121": densenet,
    "efficientnet-b0": efficientnet,
    "mlp": perceptron,
    "attention-mil": attention_mil,
}

DRAWING = threading.Lock()  # PyTorch's generator is one for all threads, and simulations begin several runs at once


def network(study: Study) -> nn.Module:
    """The network of a study with weights that are a function of its seed."""
    with DRAWING, torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which seeds the GPUs as well: they would drop out alike in every round
        torch.default_generator.manual_seed(seed_of(study.seed, study.name, "initial weights"))
        inputs = len(study.task.covariates) if study.table_only else max(1, len(study.channels))
        extents = study.model.spatial_dims if study.task.kind == "detection" else 0
        outputs = inputs if study.task.kind == "reconstruction" else study.task.outputs + extents
        net = MAKERS[study.model.name](study.model, inputs, outputs)
    if study.model.norm != "batch":
        _without_batch_norm(net, study.model)
    if study.task.kind == "detection":
        _hardly_anything(net, len(study.task.labels))
    batch_norms = [n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not batch_norms or study.model.norm == "batch", f"batch norm in {batch_norms}"
    return net


SUPERVISED = "deep_supervision_heads"  # of a DynUNet; its head proper is `output_block`
PRIOR = 0.01  # probability of a lesion's centre that an untrained network tells of each pixel
EXTENT = 4.0  # pixels, of its half-extents
NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def norm_names(net: nn.Module) -> frozenset[str]:
    """Names of all tensors of the norm layers, statistics of batch norm among them.

    Raises:
        StudyInvalid: the network has none.
    """
    found = {f"{at}.{n}" for at, m in net.named_modules() if isinstance(m, NORMS) for n in m.state_dict()}
    if not (names := found & _tensors(net).keys()):
        raise StudyInvalid('personal.keep = ["norm"]: the network of the study has no norm layer with weights.')
    return frozenset(names)


def head_names(net: nn.Module) -> frozenset[str]:
    """Names of the tensors of the last layer that has any: the one that makes logits of features."""
    layers = [at for at, m in net.named_modules() if any(True for _ in m.parameters(recurse=False))]
    last = [at for at in layers if not at.startswith(SUPERVISED)][-1]
    return frozenset(name for name in _tensors(net) if name.startswith(f"{last}."))


def feature_layer(net: nn.Module, model: Model) -> nn.Module:
    """The layer whose output stands for the image: the bottleneck of a U-Net, what the head of an encoder sees."""
    return net.get_submodule(FEATURES[model.name])


def _norm(model: Model, channels: int) -> nn.Module:
    """What stands in for a batch norm over `channels`."""
    if model.norm == "instance":
        kind = nn.InstanceNorm2d if model.spatial_dims == 2 else nn.InstanceNorm3d
        return kind(channels, affine=True)
    return nn.GroupNorm(gcd(model.groups, channels), channels)


def _without_batch_norm(net: nn.Module, model: Model) -> None:
    """Swaps every batch norm in place: MONAI 1.6 hands `norm` to the stem of a ResNet alone, to no EfficientNet, and
    cannot make a group norm of one channel, which its UNet ends with."""
    for module in list(net.modules()):
        for inner, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, inner, _norm(model, child.num_features))


def _hardly_anything(net: nn.Module, labels: int) -> None:
    """Lets the first `labels` channels of the answer begin at a small probability: else what is found nowhere would be
    most of the loss (Lin et al. 2017, section 4.1). The others, logarithms of half-extents, begin at a few pixels."""
    head = head_names(net)
    biases = [p for n, p in net.named_parameters() if n.endswith("bias") and (n in head or n.startswith(SUPERVISED))]
    assert biases
    with torch.no_grad():
        for bias in biases:
            bias[:labels] = -log((1 - PRIOR) / PRIOR)
            bias[labels:] = log(EXTENT)


def blocks(net: nn.Module) -> list[tuple[str, ...]]:
    """The parameters of a network by block, from the image to the answer; what holds only norms and biases belongs to
    the block before it, and so do the heads of supervised levels, which are made after the head."""
    left = {id(parameter): name for name, parameter in net.named_parameters()}
    joined: list[tuple[str, ...]] = []
    for part in _parts(net):
        found = {name: p for p in part.parameters() if (name := left.pop(id(p), ""))}
        beside = all(p.ndim < 2 or name.startswith(SUPERVISED) for name, p in found.items())
        if beside and joined:
            joined[-1] += tuple(found)
        elif found:
            joined.append(tuple(found))
    assert not left, f"in no block: {list(left.values())}"
    return joined


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Convolutions, norms, residual blocks and the like, in the order of the forward pass."""
    children = list(module.children())
    if isinstance(module, SegResNet):  # has its layers registered before its samplings, and runs them in turns
        ups = chain(*zip(module.up_samples, module.up_layers, strict=True))
        children = [module.convInit, module.down_layers, *ups, module.conv_final]
    for child in children:
        # not what inherits from them, as MONAI's convolutions with their norms do
        if type(child) in (nn.Sequential, nn.ModuleList, SkipConnection):
            yield from _parts(child)
        else:
            yield child


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor once: DynUNet lists every one of its modules under two names."""
    once = {name for name, _ in (*net.named_parameters(), *net.named_buffers())}
    return {name: t for name, t in net.state_dict().items() if name in once}


def arrays_of(net: nn.Module) -> Arrays:
    """Every tensor of the state dict, copied to the CPU."""
    return {name: t.detach().cpu().numpy().copy() for name, t in _tensors(net).items()}


def schema(net: nn.Module) -> Schema:
    return schema_of({name: t.detach().cpu().numpy() for name, t in _tensors(net).items()})


def load_arrays(net: nn.Module, arrays: Arrays) -> None:
    """Puts arrays into a network in place.

    Raises:
        WeightsInvalid: another architecture than the study names, or a value that is not finite.
    """
    if problem := difference(schema(net), schema_of(arrays)):
        raise WeightsInvalid(f"received weights: {problem}. They are not those of the study's network.")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WeightsInvalid(f"received weights: {name!r} holds NaN or infinity. Do not train on them.")
    with torch.no_grad():
        for name, tensor in _tensors(net).items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))


def initial_weights(study: Study) -> Arrays:
    return arrays_of(network(study))
