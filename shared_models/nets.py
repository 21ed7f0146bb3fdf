"""Networks by name and arguments, and their weights as arrays.

No batch statistics but where norm layers stay at their site: they leak what a batch held, and differ between sites.
"""

from typing import Any

import numpy as np
import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from torch import Tensor, nn

from shared_models.errors import StudyInvalid, WeightsInvalid
from shared_models.seeds import seed_of
from shared_models.study import Model, Study
from shared_models.weights import Arrays, Schema, difference, schema_of


def unet(model: Model, in_channels: int, out_channels: int) -> nn.Module:
    """U-Net (Ronneberger et al. 2015) as MONAI's BasicUNet: logits float32[B, out_channels, *size]."""
    net: nn.Module = BasicUNet(
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        features=model.features,
        norm=_norm(model),
        dropout=model.dropout,
    )
    return net


def dynunet(model: Model, in_channels: int, out_channels: int) -> nn.Module:
    """nnU-Net's plain U-Net (Isensee et al. 2021) as MONAI's DynUNet: logits float32[B, out_channels, *size]."""
    levels = model.levels
    net: nn.Module = DynUNet(
        spatial_dims=model.spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[level.kernel for level in levels],
        strides=[level.stride for level in levels],
        upsample_kernel_size=[level.stride for level in levels[1:]],
        filters=[level.features for level in levels],
        dropout=model.dropout or None,
        norm_name=_norm(model),
    )
    return net


def _norm(model: Model) -> tuple[str, dict[str, Any]]:
    """The norm layers of a network, in MONAI's words."""
    return (model.norm, {"affine": True} | ({"num_groups": model.groups} if model.norm == "group" else {}))


def network(study: Study) -> nn.Module:
    """The network of a study with weights that are a function of its seed."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which seeds the GPUs as well: they would drop out alike in every round
        torch.default_generator.manual_seed(seed_of(study.seed, study.name, "initial weights"))
        make = {"unet": unet, "dynunet": dynunet}[study.model.name]
        net = make(study.model, max(1, len(study.channels)), len(study.task.labels))
    batch_norms = [n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not batch_norms or study.model.norm == "batch", f"batch norm in {batch_norms}"
    return net


NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
FEATURES = {"unet": "down_4", "dynunet": "bottleneck"}


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
    last = [at for at, m in net.named_modules() if any(True for _ in m.parameters(recurse=False))][-1]
    return frozenset(name for name in _tensors(net) if name.startswith(f"{last}."))


def feature_layer(net: nn.Module, model: Model) -> nn.Module:
    """The layer whose output stands for the image: the bottleneck of a U-Net.

    Raises:
        StudyInvalid: a network of which none is known.
    """
    if model.name not in FEATURES:
        raise StudyInvalid(f'train.moon_mu: no feature layer is known of model.name = "{model.name}".')
    return net.get_submodule(FEATURES[model.name])


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
