"""What a hospital's node knows of itself: `site.toml` in a deployment, a few words of a simulation's node."""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedclient.data.quota import GIB, QUOTA_GIB
from fedclient.data.where import Where
from fedclient.limits import Limits
from fedclient.policy import Policy
from fedclient.release_policy import Releases
from fedclient.serving.settings import Serve
from shared_models.errors import StateInvalid
from shared_models.files import read_json, write_atomic
from shared_models.identity import load_secret
from shared_models.parse import ESCAPES, STRICT, parse, plain, read_toml

if TYPE_CHECKING:
    from fedclient.data.cases import Listing, Split  # with the image readers, which half of the commands need not

DATA_FILE = "data.toml"
UNIT = "\x1f"  # ASCII's unit separator, between the sites of a simulated node: a manifest's names may hold commas
UNSET = {  # keys that have no value unless a hospital gives one: an example, and what it means
    "manifest_site": '"NAME"  # which site of a table that lists several',
    "most_epsilon": "8.0  # that one study may spend of a patient's privacy in all its rounds; else the whole budget",
    "memory_gib": "16.0  # of main memory, for each process that trains or prepares images; else no limit",
    "order_s": "3600.0  # longest that an order may take, in seconds; else until nobody takes its answer any more",
}
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]


@dataclass(frozen=True, slots=True)
class Data:
    """`[data]`: where the images are.

    Attributes:
        folder: only read.
        manifest_site: which site of a manifest that lists several.
        layout: how the folder is laid out (`fedclient check` names it); `auto` finds it by what it holds.
        structures: names of segments, regions or labels in the files -> a label of the study, background or ignore.
        labelled: the labels that this site's masks have, where a study has more of them; none named are all.
    """

    __pydantic_config__ = STRICT
    folder: str
    manifest_site: str | None = None
    layout: str = "auto"
    structures: dict[str, str] = field(default_factory=dict)
    labelled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DataFile:
    """`data.toml` in a folder that is a site of a simulation: what `[data]` of site.toml says in a deployment."""

    __pydantic_config__ = STRICT
    layout: str = "auto"
    structures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compute:
    """`[compute]`: `device` is auto (the first GPU, else CPU), cpu or cuda:N; `threads` 0 leaves it to PyTorch.

    Attributes:
        processes: that prepare images side by side; 0 is one for each core, at most 8.
    """

    __pydantic_config__ = STRICT
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    processes: Annotated[int, Field(ge=0, le=256)] = 0


@dataclass(frozen=True, slots=True)
class Cache:
    """`[cache]`: the most that preprocessed images may take up; the least recently used go first."""

    __pydantic_config__ = STRICT
    quota_gib: Annotated[float, Field(gt=0, le=1e6)] = QUOTA_GIB


@dataclass(frozen=True, slots=True)
class PrivacyPolicy:
    """`[privacy]`: an order can be stricter, never looser; the budget over all studies is set by `fedclient budget`.

    Attributes:
        required: nothing is trained, scored or counted for a study that is not differentially private.
        most_epsilon: that one study may spend in all its rounds, at the delta of the budget.
    """

    __pydantic_config__ = STRICT
    required: bool = False
    most_epsilon: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, slots=True)
class SiteFile:
    """`site.toml`: owned by the hospital, never sent."""

    __pydantic_config__ = STRICT
    name: Name
    coordinator: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")]
    federation: str
    data: Data
    compute: Compute = field(default_factory=Compute)
    policy: Policy = field(default_factory=Policy)
    cache: Cache = field(default_factory=Cache)
    privacy: PrivacyPolicy = field(default_factory=PrivacyPolicy)
    serve: Serve = field(default_factory=Serve)
    limits: Limits = field(default_factory=Limits)
    releases: Releases = field(default_factory=Releases)


def _always() -> None:
    """Work under way goes on."""


@dataclass(slots=True)
class Once:
    """What holds for a site as it was opened, which is for one order: the training goes by the listing that the gate
    has looked at."""

    listing: "Listing | None" = None


@dataclass(frozen=True, slots=True)
class Site:
    """One institution at work.

    Attributes:
        folder: where the node keeps its own: cache, finished work, blobs.
        manifest_sites: the rows of the manifest that are this site's; none named are all of a manifest of one site.
        salt: secret of the site that case keys and splits are derived with.
        apart, pooled, chosen, dealt: of a simulation; see `Where`, where `apart` is `name`.
        hidden: of a simulation; keys of training cases that take part as if nobody had labelled them.
        processes: that prepare images side by side.
        quota_bytes: the most that the cache may take up.
        deployed: tensors travel as blobs, and finished work is kept for an order that comes again.
        policy: what the hospital allows; asked in a deployment.
        simulated_sums: of a simulation; see `sums`.
        go_on: called between the steps of work under way; raises OrderRefused once it may not go on.
        once: shared by copies of this site.
    """

    name: str
    folder: Path
    data: Path
    manifest_sites: tuple[str, ...]
    device: str
    threads: int
    smallest_count: int
    salt: str
    deployed: bool
    coordinator: str = ""
    layout: str = "auto"
    structures: Mapping[str, str] = field(default_factory=dict)
    apart: str = ""
    pooled: tuple[Where, ...] = ()
    chosen: frozenset[str] | None = None
    dealt: Mapping[str, "Split"] = field(default_factory=dict)
    processes: int = 1
    policy: Policy = field(default_factory=Policy)
    go_on: Callable[[], None] = _always
    quota_bytes: int = int(QUOTA_GIB * GIB)
    labelled: tuple[str, ...] = ()
    privacy: PrivacyPolicy = field(default_factory=PrivacyPolicy)
    limits: Limits = field(default_factory=Limits)
    simulated_sums: Path | None = None
    hidden: frozenset[str] = frozenset()
    once: Once = field(default_factory=Once, repr=False, compare=False)

    @property
    def sums(self) -> Path:
        """Where the roster, the identity key and the secure sums lie."""
        return self.folder if self.simulated_sums is None else self.simulated_sums

    @property
    def where(self) -> Where:
        return Where(
            self.data, self.manifest_sites, self.layout, self.structures, self.apart, self.pooled, self.chosen,
            self.dealt,
        )  # fmt: skip


def read_site_file(folder: Path) -> SiteFile:
    path = folder / "site.toml"
    if not path.exists():
        raise StateInvalid(f"{path}: is missing, so {folder} is no site folder. Run `fedclient join INVITE` first.")
    return parse(SiteFile, read_toml(path), str(path))


def read_data_file(folder: Path) -> DataFile:
    """What a folder's data.toml says; the defaults where there is none.

    Raises:
        StudyInvalid: a wrong key or type.
    """
    path = folder / DATA_FILE
    return parse(DataFile, read_toml(path), str(path)) if path.exists() else DataFile()


def check_data(site: Path, folder: str) -> None:
    """Raises StateInvalid where the data folder of site.toml has gone since the site joined."""
    if not Path(folder).is_dir():
        escaped = "" if folder.isprintable() else ESCAPES
        raise StateInvalid(
            f"{folder}: the data folder is not there. Mount it, or set `folder` under [data] in {site / 'site.toml'}."
            f"{escaped}"
        )


def site_toml(site: SiteFile) -> str:
    """The text of a site file; every key that a hospital may set stands in it, one without a value as a comment."""
    tables = plain(site)
    lines = [f"{key} = {_toml(tables.pop(key))}" for key in ("name", "coordinator", "federation")]
    for table, values in tables.items():
        lines += ["", f"[{table}]"]
        lines += [f"# {k} = {UNSET[k]}" if v is None else f"{k} = {_toml(v)}" for k, v in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML escapes and JSON does not
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(held)}" for key, held in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)


def secret(path: Path) -> str:
    """The site's own secret for case keys, made on first use; of two processes that make it, both get the first one's.

    Raises:
        StateInvalid: a file that others may read, or that holds no such secret. Another one would give every case
            another key and split.
    """
    if not path.exists():
        made = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.made")
        write_atomic(made, os.urandom(32).hex().encode())
        try:
            with suppress(FileExistsError):
                os.link(made, path)  # whole, and only where there is none yet
        finally:
            made.unlink()
    kept = load_secret(path)
    if not re.fullmatch(rb"[0-9a-f]{64}", kept):
        raise StateInvalid(f"{path}: holds no secret of 64 hexadecimal digits. Restore it from your backup.")
    return kept.decode()


def open_site(node_config: Mapping[str, object]) -> Site:
    """The site behind a Flower node: by its folder in a deployment, by what the engine says in a simulation."""
    if "site-dir" in node_config:
        folder = Path(str(node_config["site-dir"]))
        file = read_site_file(folder)
        return Site(
            name=file.name,
            folder=folder,
            data=Path(file.data.folder),
            manifest_sites=(file.data.manifest_site,) if file.data.manifest_site else (),
            device=file.compute.device,
            threads=file.compute.threads,
            smallest_count=file.policy.smallest_count,
            salt=secret(folder / "secrets" / "case-keys"),
            deployed=True,
            coordinator=file.coordinator,
            layout=file.data.layout,
            structures=file.data.structures,
            processes=file.compute.processes or min(8, len(os.sched_getaffinity(0))),
            policy=file.policy,
            quota_bytes=int(file.cache.quota_gib * GIB),
            labelled=file.data.labelled,
            privacy=file.privacy,
            limits=file.limits,
        )
    where = _where(node_config)
    return Site(
        name=str(node_config["site"]),
        folder=Path(str(node_config["work"])),
        data=where.folder,
        manifest_sites=where.sites,
        device=str(node_config.get("device", "auto")),
        threads=int(str(node_config.get("threads", 0))),
        smallest_count=1,
        salt="simulation",
        deployed=False,
        layout=where.layout,
        structures=where.structures,
        apart=where.name,
        pooled=tuple(_where(each) for each in json.loads(str(node_config.get("pooled", "[]")))),
        chosen=_chosen(node_config),
        dealt=_dealt(node_config),
        simulated_sums=Path(str(node_config["sums"])) if "sums" in node_config else None,
        hidden=_hidden(node_config),
    )


def _chosen(node_config: Mapping[str, object]) -> frozenset[str] | None:
    """The keys of a made-up site's cases, as the simulation has written them."""
    if not node_config.get("chosen"):
        return None
    return frozenset(read_json(Path(str(node_config["chosen"])))["sites"][node_config["part"]])


def _dealt(node_config: Mapping[str, object]) -> Mapping[str, "Split"]:
    """Key of a case -> its split, as the simulation has written them."""
    if not node_config.get("dealt"):
        return {}
    dealt: Mapping[str, Split] = read_json(Path(str(node_config["dealt"])))["splits"]
    return dealt


def _hidden(node_config: Mapping[str, object]) -> frozenset[str]:
    """The keys of cases whose labels a simulation hides."""
    if not node_config.get("hidden"):
        return frozenset()
    return frozenset(read_json(Path(str(node_config["hidden"])))["hidden"])


def _where(node_config: Mapping[str, object]) -> Where:
    """The data of a simulated node."""
    return Where(
        folder=Path(str(node_config["data"])),
        sites=tuple(filter(None, str(node_config.get("manifest-site", "")).split(UNIT))),
        layout=str(node_config.get("layout", "auto")),
        structures=json.loads(str(node_config.get("structures", "{}"))),
        name=str(node_config.get("apart", "")),
    )
