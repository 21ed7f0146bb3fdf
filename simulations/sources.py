"""Which folders and rows of tables are the sites of a simulation, each in its own layout."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedclient.data.layouts.peek import peek
from fedclient.data.listing import LAYOUTS, fitting_layouts, layout_of, sites_in
from fedclient.data.where import Where
from fedclient.site import DATA_FILE, UNIT, read_data_file
from shared_models.errors import ManifestInvalid, StateInvalid, StudyInvalid
from shared_models.files import write_atomic
from simulations.engine import NodeConfig
from simulations.fixtures.datasets import Progress, write_data_set
from simulations.phantoms import PhantomPlan, site_names

CAVITY = '\n[structures]\ncavity = "background"\n'  # studies of the tumour leave what was resected out of it


def sites_at(data: Sequence[Path], layout: str, most: int | None) -> dict[str, Where]:
    """Site -> where its data lies, at most `most` of them.

    Several folders are a site each. One folder is

    - if folders in it hold a data.toml: those, a site each;
    - if it is a data set: one site, or those that its table names;
    - else, if all folders in it are data sets: those, a site each.

    A folder of BraTS and of DICOM looks like one data set of either; as its folders differ, they are sites.

    Args:
        layout: of every folder whose data.toml does not say; `auto` finds it by what the folder holds.

    Raises:
        ManifestInvalid: no data set, or folders of which some are none.
        StudyInvalid: fewer sites than were asked for, or names that cannot be told apart.
    """
    if len(data) > 1:
        named = {folder.resolve().name: _where(folder, layout) for folder in data}
        if len(named) < len(data):
            raise StudyInvalid("--data: two folders have one name, and a site is called after its folder. Rename one.")
    else:
        named = _of_one(data[0], layout)
    if most is not None and most > len(named):
        told = ", ".join(named) if len(named) > 1 else "one site"
        raise StudyInvalid(f"{data[0]}: has {len(named)} sites ({told}), {most} were asked for.")
    slugs = {name: re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:48] for name in named}
    if len({*slugs.values()}) < len(slugs) or not all(slugs.values()):
        raise StudyInvalid(
            f"{data[0]}: sites {', '.join(named)} are too alike. Name them with letters, digits, - and _."
        )
    chosen = {slugs[name]: where for name, where in named.items()}
    return dict(list(chosen.items())[:most])


def write_sites(folder: Path, layout: str, plan: PhantomPlan, progress: Progress) -> Path:
    """A folder of data sets in one layout, each with a data.toml that makes it a site; or one data set for one site.

    Raises:
        StudyInvalid: a layout that is not written here.
        StateInvalid: a folder that holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StateInvalid(f"{folder}: is not empty. Give a new folder, so that no data of yours is mixed with it.")
    names = site_names(plan)
    of = plan.train + plan.val + plan.test
    told = f"layout = {json.dumps(layout)}\n" + CAVITY * (layout == "brats-2024")
    for number, name in enumerate(names):
        place = folder / name if len(names) > 1 else folder
        further = partial(_further, progress, number * of, len(names) * of)
        write_data_set(
            place,
            layout,
            patients=of,
            slices=plan.slices,
            size=plan.size,
            site=name,
            seed=plan.seed,
            progress=further,
        )
        write_atomic(place / DATA_FILE, told.encode())
    return folder


def _further(progress: Progress, before: int, of: int, done: int, _: int) -> None:
    progress(before + done, of)


def config_of(where: Where) -> dict[str, str | int]:
    """What a simulated node is told of its data; `fedclient.site.open_site` reads it."""
    return {
        "data": str(where.folder),
        "manifest-site": where.sites[0] if where.sites else "",
        "layout": where.layout,
        "structures": json.dumps(dict(where.structures)),
        "apart": where.name,
    }


def pooled(nodes: Sequence[NodeConfig]) -> NodeConfig:
    """What a node that has the data of all the others is told."""
    if nodes[0].get("chosen"):  # made-up sites: what they were made of
        return {**nodes[0], "chosen": ""}
    if len({node["data"] for node in nodes}) == 1:
        return {**nodes[0], "manifest-site": UNIT.join(str(node["manifest-site"]) for node in nodes)}
    keys = config_of(Where(Path())).keys()
    return {**nodes[0], "pooled": json.dumps([{key: node[key] for key in keys} for node in nodes])}


def _of_one(folder: Path, layout: str) -> dict[str, Where]:
    below = [folder / name for name in peek(folder).folders]
    described = [path for path in below if (path / DATA_FILE).exists()]
    if not described:
        whole = _where(folder, layout, "")
        if whole.layout != "auto" or _is_one(folder, below):
            names = sites_in(whole)
            return {name: replace(whole, sites=(name,)) for name in names} or {"site": whole}
        described = [path for path in below if fitting_layouts(path)]
    strange = sorted(path.name for path in below if path not in described)
    if described and strange:
        raise ManifestInvalid(
            f"{folder}: {len(described)} folders in it are data sets, and {', '.join(strange)} not. Take these out, or "
            f"name the others with a --data each."
        )
    if not described:
        layout_of(Where(folder))  # says what is wrong
    return {path.name: _where(path, layout) for path in described}


def _is_one(folder: Path, below: Sequence[Path]) -> bool:
    """Whether a folder is a data set itself, and does not only look like one for what the data sets in it hold."""
    whole = fitting_layouts(folder)
    if not all(LAYOUTS[name].deep for name in whole):
        return True
    parts = [set(fitting_layouts(path)) for path in below]
    return bool(whole) and all(part <= {*whole, "pacs"} for part in parts) and not (len(whole) > 1 and all(parts))


def _where(folder: Path, layout: str, name: str | None = None) -> Where:
    told = read_data_file(folder)
    return Where(
        folder=folder,
        layout=layout if told.layout == "auto" else told.layout,
        structures=told.structures,
        name=folder.resolve().name if name is None else name,
    )
