"""A release's network as a MONAI bundle: metadata, a configuration that its runner takes, weights, words.

Written by MONAI's specification 0.2 of a bundle. The preprocessing in it is a copy of the file that trained the
network; what MONAI calls a configuration can run code, which is why no command of ours ever reads one.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle.config_parser import ConfigParser
from numpy.typing import NDArray
from torch import nn

import shared_models
from fedserver.publish.exports import to_state_dict
from shared_models import nets
from shared_models.files import write_atomic, write_json
from shared_models.parse import plain
from shared_models.release import BUNDLE_SCRIPT, BUNDLE_STATE, TORCHSCRIPT
from shared_models.runtimes import Runner, torch_runner
from shared_models.study import MODALITIES, Study

FOLDER = "bundle"
METADATA, INFERENCE = f"{FOLDER}/configs/metadata.json", f"{FOLDER}/configs/inference.json"
STATE, SCRIPT = BUNDLE_STATE, BUNDLE_SCRIPT
SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
PLANES = 32  # shown to the network at once


def write_bundle(
    net: nn.Module,
    study: Study,
    folder: Path,
    version_name: str,
    words: Mapping[str, Any],
    temperatures: NDArray[np.float32] | None,
) -> None:
    """Writes `folder`/bundle; model.ts of the release is there already.

    Args:
        temperatures: of the release, by which the bundle's answers are calibrated too.
        words: description, intended_use, authors, copyright, data_source, eval_metrics, licence, readme, data_licence.
    """
    bundle = folder / FOLDER
    write_json(folder / METADATA, metadata(study, version_name, words))
    write_json(folder / INFERENCE, inference(study, temperatures))
    (bundle / "models").mkdir(mode=0o700, exist_ok=True)
    to_state_dict(net, folder / STATE)
    shutil.copyfile(folder / TORCHSCRIPT, folder / SCRIPT)
    write_atomic(bundle / "LICENSE", str(words["licence"]).encode())
    write_atomic(bundle / "docs/README.md", str(words["readme"]).encode())
    write_atomic(bundle / "docs/data_license.txt", str(words["data_licence"]).encode())
    own = Path(str(shared_models.__file__)).parent
    write_atomic(bundle / "scripts/__init__.py", b"")
    write_atomic(bundle / "scripts/preprocess.py", (own / "preprocess.py").read_bytes())
    write_atomic(bundle / "scripts/steps.py", (own / "bundle_steps.py").read_bytes())


def bundle_runner(folder: Path) -> Runner:
    """The network as the bundle's configuration defines it, with the weights of its model.pt."""
    parser = ConfigParser()
    parser.read_config(str(folder / INFERENCE))
    parser["bundle_root"] = str(folder / FOLDER)
    parser["device"] = "cpu"
    net: nn.Module = parser.get_parsed_content("network_def")
    net.load_state_dict(torch.load(folder / STATE, map_location="cpu", weights_only=True))
    return torch_runner(net.eval())


def metadata(study: Study, version_name: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """metadata.json, by MONAI's schema of 25 July 2024."""
    task, dims = study.task, study.model.spatial_dims
    names = study.channels or (MODALITIES[study.modality],)
    kind = {"segmentation": "segmentation", "classification": "classification"}.get(task.kind, "regression")
    outputs = output_names(study)
    pixelwise = task.kind == "segmentation"
    return {
        "schema": SCHEMA,
        "version": version_name,
        "changelog": {version_name: "first of this version; the release's manifest names what it follows from"},
        "monai_version": version("monai"),
        "pytorch_version": str(torch.__version__).partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            name: version(name) for name in ("scipy", "nibabel", "pytorch-ignite") if _installed(name)
        },
        "name": study.title or study.name,
        "task": f"{task.kind} of {', '.join(task.answers)} in {dims}-D",
        **{key: words[key] for key in ("description", "intended_use", "authors", "copyright", "data_source")},
        "eval_metrics": words["eval_metrics"],
        "data_type": "nibabel" if study.modality != "xray" else "png or nibabel",
        "image_classes": ", ".join(names),
        "pred_classes": ", ".join(outputs),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if study.modality == "ct" else "magnitude",
                    "modality": MODALITIES[study.modality],
                    "num_channels": len(names),
                    "spatial_shape": list(study.preprocess.size),
                    "dtype": "float32",
                    "value_range": value_range(study),
                    "is_patch_data": study.preprocess.fit == "patches",
                    "channel_def": {str(n): name for n, name in enumerate(names)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image" if pixelwise else "probabilities",
                    "format": kind,
                    "num_channels": task.outputs,
                    "spatial_shape": list(study.preprocess.size) if pixelwise else [],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": study.preprocess.fit == "patches",
                    "channel_def": {str(n): name for n, name in enumerate(outputs)},
                }
            },
        },
    }


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def value_range(study: Study) -> list[float]:
    """Of what the network sees; empty where it is each image's own."""
    plan = study.preprocess
    if plan.intensity == "window":
        return [0.0, 1.0]
    if plan.mean is not None and plan.deviation is not None:
        return [(edge - plan.mean) / plan.deviation for edge in plan.window_hu]
    return []


def output_names(study: Study) -> list[str]:
    """What each channel of the answer stands for."""
    task = study.task
    if task.kind == "prognosis":
        return [f"{task.labels[0]} by day {days:g}" for days in task.intervals_days]
    background = ["background"] if task.kind == "segmentation" and task.exclusive else []
    return [*background, *task.answers]


def inference(study: Study, temperatures: NDArray[np.float32] | None) -> dict[str, Any]:
    """inference.json: NIfTI in DATASET_DIR (CASE.nii.gz, or CASE/CHANNEL.nii.gz), answers in OUTPUT_DIR."""
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "preprocess": plain(study.preprocess),
        "network_def": network_def(study),
        "network": "$@network_def.to(@device)",
        "datalist": _datalist(study),
        "preprocessing": {"_target_": "Compose", "transforms": _before(study)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False},
        "inferer": {"_target_": "scripts.steps.ByCase", "inner": _inferer(study)},
        "postprocessing": {"_target_": "Compose", "transforms": _after(study, temperatures)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "initialize": [
            "$@network_def.load_state_dict("
            "torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True))"
        ],
        "run": ["$@evaluator.run()"],
    }


def network_def(study: Study) -> dict[str, Any] | str:
    """MONAI's own class where the network is one; else TorchScript, whose norm layers no argument of MONAI's gives."""
    model, channels = study.model, max(1, len(study.channels))
    common = {"spatial_dims": model.spatial_dims, "in_channels": channels, "out_channels": study.task.outputs}
    norm = list(nets.norm_words(model))
    if model.name == "unet" and model.norm != "batch":
        features = list(model.features)
        return {"_target_": "BasicUNet", **common, "features": features, "norm": norm, "dropout": model.dropout}
    if model.name == "dynunet" and model.norm != "batch":
        levels = model.levels
        return {
            "_target_": "DynUNet",
            **common,
            "kernel_size": [list(level.kernel) for level in levels],
            "strides": [list(level.stride) for level in levels],
            "upsample_kernel_size": [list(level.stride) for level in levels[1:]],
            "filters": [level.features for level in levels],
            "dropout": model.dropout or None,
            "norm_name": norm,
        }
    return "$torch.jit.load(@bundle_root + '/models/model.ts', map_location='cpu')"


def _datalist(study: Study) -> str:
    if not study.channels:
        return "$[{'image': f} for f in sorted(glob.glob(@dataset_dir + '/*')) if os.path.isfile(f)]"
    files = ", ".join(f"d + '/{channel}.nii.gz'" for channel in study.channels)
    return f"$[{{'image': [{files}]}} for d in sorted(glob.glob(@dataset_dir + '/*')) if os.path.isdir(d)]"


def _before(study: Study) -> list[dict[str, Any]]:
    load: dict[str, Any] = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
    if study.modality == "xray":  # rows stay rows: MONAI turns pictures by a quarter otherwise
        load["reader"] = {"_target_": "PILReader", "reverse_indexing": False}
    turned = [{"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}] if study.modality != "xray" else []
    seen = {"_target_": "scripts.steps.Preprocessed", "plan": "@preprocess", "by_folder": bool(study.channels)}
    return [load, *turned, seen]


def _inferer(study: Study) -> dict[str, Any]:
    if study.preprocess.fit != "patches":
        return {"_target_": "SimpleInferer"}
    overlap = 0.5 if study.evaluate.overlap is None else study.evaluate.overlap
    return {
        "_target_": "SlidingWindowInferer",
        "roi_size": list(study.preprocess.size),
        "sw_batch_size": PLANES if study.model.spatial_dims == 2 else study.train.batch_size,
        "overlap": overlap,
        "mode": "gaussian",
    }


def _after(study: Study, temperatures: NDArray[np.float32] | None) -> list[dict[str, Any]]:
    """Probabilities, on the image's own grid, and what is decided by them; calibrated where they are told."""
    task = study.task
    softmax = task.exclusive
    chances = {"_target_": "Activationsd", "keys": "pred", "sigmoid": not softmax, "softmax": softmax}
    if task.kind != "segmentation":
        if softmax:  # of a case: examples first, as Activations wants a channel first
            chances["dim"] = 1
        told = {"_target_": "scripts.steps.Told", "out": "@output_dir", "names": output_names(study)}
        by = [] if temperatures is None else temperatures.tolist()
        cooled = [{"_target_": "scripts.steps.Tempered", "temperatures": by}] if by else []
        return [*cooled, chances, told | ({"survival": True} if task.kind == "prognosis" else {})]
    if softmax:
        chances["dim"] = 1
    decided: dict[str, Any] = {"_target_": "AsDiscreted", "keys": "pred"}
    decided |= {"argmax": True} if softmax else {"threshold": study.evaluate.threshold}
    saved = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "mask",
        "separate_folder": False,
        "output_dtype": "$torch.uint8",
        "resample": False,
    }
    return [chances, {"_target_": "scripts.steps.Restored"}, decided, saved]
