"""A release is made: every form of the network, proof that all of them answer alike, and the signed manifest.

Nothing is published unless the answers agree: the folder takes its name only after it has been signed, and opened as a
hospital would open it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedserver.publish import bundle
from fedserver.publish.card import Words, markdown, write_card
from fedserver.publish.exports import to_onnx, to_torchscript
from shared_models import parity
from shared_models.calibration import temperatures_of
from shared_models.errors import ReleaseInvalid
from shared_models.files import private_folder, sync_folder, write_atomic, write_json
from shared_models.identity import Credential
from shared_models.release import (
    CALIBRATION,
    FORMAT,
    ONNX,
    STUDY,
    TORCHSCRIPT,
    WEIGHTS,
    Manifest,
    Origin,
    Trust,
    open_release,
    seal,
)
from shared_models.runtimes import Runner, network_of, onnx_runner, torch_runner, torchscript_runner
from shared_models.study import Study, canonical
from shared_models.weights import Arrays, save_arrays

NO_BUNDLE = "none: the network sees a table, and a MONAI bundle is of a network that sees an image"
BUNDLE_README = """## How to run it with MONAI

Images lie in INPUT, as CASE.nii.gz or, of several channels, as CASE/CHANNEL.nii.gz; answers go to OUTPUT.

    pip install monai pytorch-ignite fire nibabel scipy
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir INPUT --output_dir OUTPUT

Run that in this folder, once `fedclient verify` has checked the release: MONAI's configurations can run code.
`scripts/` holds the preprocessing that the network was trained with.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a release is made from.

    Attributes:
        study: as it was trained, plan inside.
        card: as fedserver/publish/card.py makes it; `words` are what a person said for it.
        signer, authority: who signs, and the certificate (PEM) of who vouches for that.
        trust: what is known of that authority (PEM: see `read_authority`), by which the release is opened once made.
        members: further files of the release by name: fingerprint.json, calibration.json, evidence/...
        approvals, approvers: how many of whom must approve before anybody opens it.
    """

    study: Study
    weights: Arrays
    version: str
    origin: Origin
    signer: Credential = field(repr=False)
    authority: bytes
    trust: bytes
    card: Mapping[str, Any]
    words: Words = field(default_factory=Words)
    privacy: Mapping[str, Any] | None = None
    members: Mapping[str, bytes] = field(default_factory=dict)
    approvals: int = 0
    approvers: Mapping[str, str] = field(default_factory=dict)


def make_release(recipe: Recipe, folder: Path) -> Manifest:
    """Makes the release as `folder`, whole or not at all.

    Raises:
        ReleaseInvalid: `folder` is there already, or an export does not answer as the network does.
    """
    if folder.exists():
        raise ReleaseInvalid(f"{folder}: is there already. Choose another folder or another version.")
    private_folder(folder.parent)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        manifest = _fill(recipe, part)
        trust = Trust((recipe.trust,), research=recipe.origin.kind == "simulation")
        if not recipe.approvals:  # nobody has approved it yet, and so nobody can open it
            open_release(part, trust)
        part.replace(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return manifest


def _fill(recipe: Recipe, folder: Path) -> Manifest:
    study = recipe.study
    by = temperatures_of(study, json.loads(recipe.members.get(CALIBRATION, b"null")))
    write_atomic(folder / STUDY, canonical(study))
    save_arrays(folder / WEIGHTS, recipe.weights)
    net = network_of(study, folder / WEIGHTS)
    free = to_onnx(net, study, folder / ONNX)
    to_torchscript(net, study, folder / TORCHSCRIPT)
    forms: dict[str, Runner] = {
        ONNX: onnx_runner(folder / ONNX),
        TORCHSCRIPT: torchscript_runner(folder / TORCHSCRIPT),
    }
    write_card(folder, recipe.card)
    if not study.table_only:
        bundle.write_bundle(net, study, folder, recipe.version, bundle_words(recipe), by)
        forms[bundle.STATE] = bundle.bundle_runner(folder)
        forms[bundle.SCRIPT] = torchscript_runner(folder / bundle.SCRIPT)
    prove(folder, study, torch_runner(net), forms, by)
    for name, content in recipe.members.items():
        write_atomic(folder / name, content)
    manifest = Manifest(
        format=FORMAT,
        name=study.name,
        version=recipe.version,
        title=study.title or study.name,
        origin=recipe.origin,
        exports=exports_of(study, free),
        tolerance=parity.TOLERANCE,
        privacy=recipe.privacy,
        signer_sha256="0" * 64,
        authority_sha256="0" * 64,
        files={},
        approvals=recipe.approvals,
        approvers=recipe.approvers,
    )
    return seal(folder, manifest, recipe.signer, recipe.authority)


def prove(
    folder: Path,
    study: Study,
    network: Runner,
    forms: Mapping[str, Runner],
    temperatures: NDArray[np.float32] | None,
) -> None:
    """Writes parity.safetensors and parity.json; raises ReleaseInvalid for the first form that answers otherwise."""
    cases = parity.made_up_cases(study)
    wanted = [parity.answer(study, case, network(case.inputs), temperatures) for case in cases]
    figures = parity.compared(study, cases, wanted, forms, temperatures)
    parity.save_cases(folder, cases, wanted)
    write_json(folder / parity.FIGURES, {"tolerance": parity.TOLERANCE, "cases": len(cases), "forms": figures})


def bundle_words(recipe: Recipe) -> dict[str, Any]:
    """What MONAI's metadata and documents say in words."""
    words, told = recipe.words, recipe.card
    performance = told["performance"]
    return {
        "description": told["what_it_does"],
        "intended_use": f"{told['intended_use']}. {told['not_for']}",
        "authors": told["authors"],
        "copyright": words.copyright or "not known",
        "data_source": words.data_source or f"patients of {len(recipe.origin.sites)} sites; no image has left them",
        "eval_metrics": {
            f"{performance['measure']} {label}": part["all_cases"]["value"]
            for label, part in performance["labels"].items()
            if part["all_cases"] and part["all_cases"]["value"] is not None
        },
        "licence": words.licence or "No licence was stated. All rights reserved by who made the release.\n",
        "data_licence": "No image is part of this bundle, and none has left the site that holds it.\n",
        "readme": f"{markdown(told)}\n{BUNDLE_README}",
    }


def exports_of(study: Study, free: bool) -> dict[str, str]:
    """Form -> its file, or why there is none."""
    edges = "batch and edges are free" if free else "the batch is free"
    return {
        "safetensors": WEIGHTS,
        "onnx": f"{ONNX}; {edges}",
        "torchscript": TORCHSCRIPT,
        "monai": NO_BUNDLE if study.table_only else f"{bundle.FOLDER}/",
    }
