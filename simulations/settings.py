"""Named settings of a comparison: each is changes to study.toml, joined with `+`, and checked by the study's parser."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from shared_models.errors import StudyInvalid
from shared_models.parse import parse, plain, read_toml
from shared_models.study import Study

Changes = Mapping[str, Any]
SGD: Changes = {"optimizer": "sgd", "momentum": 0.0, "moments": "restart"}  # no momentum, so no moments to keep

SETTINGS: Mapping[str, Changes] = {
    "study": {},  # as it stands
    # at the server
    "fedavg": {"strategy": {"name": "fedavg"}},
    "uniform": {"strategy": {"weighting": "uniform"}},
    "inverse-variance": {"strategy": {"weighting": "inverse_variance"}},
    "fedavgm": {"strategy": {"name": "fedavgm", "momentum": 0.9}},
    "fedadam": {"strategy": {"name": "fedadam"}},
    "fedyogi": {"strategy": {"name": "fedyogi"}},
    "fedadagrad": {"strategy": {"name": "fedadagrad", "beta1": 0.0}},  # as Reddi et al. 2021 have it
    "median": {"strategy": {"robust": "median", "weighting": "uniform"}},
    "trimmed-mean": {
        "strategy": {"robust": "trimmed_mean", "malicious": 1, "weighting": "uniform"},
        "rounds": {"quorum": 3},
    },
    "multi-krum": {
        "strategy": {"robust": "multi_krum", "malicious": 1, "weighting": "uniform"},
        "rounds": {"quorum": 5},
    },
    "norm-bound": {"strategy": {"robust": "norm_bound"}},
    "centred-clip": {"strategy": {"robust": "centred_clip", "weighting": "uniform"}},
    # at the site
    "fedprox": {"train": {"proximal_mu": 0.01}},
    "fedsgd": {"train": SGD},
    "scaffold": {"train": {**SGD, "scaffold": True}, "strategy": {"weighting": "uniform"}},
    "fednova": {"train": {"optimizer": "sgd", "moments": "restart"}, "strategy": {"normalise_steps": True}},
    "moon": {"train": {"moon_mu": 1.0}},
    "moments": {"train": {"moments": "kept"}},
    "sharpness": {"train": {"sharpness_rho": 0.05}},
    # a model of the site's own
    "fedbn": {"personal": {"keep": ["norm"]}},
    "fedper": {"personal": {"keep": ["head"]}},
    "fedrep": {"personal": {"keep": ["head"], "head_epochs": 1}},
    "ditto": {"personal": {"ditto_lambda": 0.1}},
    "apfl": {"personal": {"apfl_alpha": 0.5, "apfl_adaptive": True}},
    "fine-tune": {"personal": {"fine_tune_epochs": 4, "fine_tune_rate": 0.3}},
}
NAME = re.compile(r"[a-z0-9][a-z0-9+-]{0,39}")
TAKEN = re.compile(r"pooled|local(-.*)?|.*-without-.*")


def settings_named(
    names: Sequence[str], files: Sequence[Path], sets: Sequence[str]
) -> tuple[dict[str, Changes], Changes]:
    """Name -> changes, of the settings asked for; and the changes to the study itself, its baselines included.

    Args:
        names: of the table, of a file, or of `sets`; `fedprox+ditto` is both together.
        files: TOML with a table for each setting, in which the tables of study.toml stand.
        sets: `KEY=VALUE` for the study itself, `NAME:KEY=VALUE` for a setting, with a TOML value; a new name begins
            from the study as it stands.

    Raises:
        StudyInvalid: an unknown or unfit name, two that change one key differently, or text that is no TOML.
    """
    known: dict[str, Changes] = dict(SETTINGS)
    for file in files:
        for name, changes in read_toml(file).items():
            if not isinstance(changes, dict):
                raise StudyInvalid(f"{file}: `{name}` is no table. Write [{name}.train] and the like.")
            known[_fit(name)] = changes
    whole: Changes = {}
    for text in sets:
        of, changes = _assignment(text)
        if of is None:
            whole = merged(whole, changes)
        else:
            known[_fit(of)] = merged(known.get(of, {}), changes)
    found: dict[str, Changes] = {}
    for name in names:
        parts = [_fit(name)] if name in known else name.split("+")
        strange = [part for part in parts if part not in known]
        if strange:
            raise StudyInvalid(
                f"--strategies: {strange[0]!r} is not known. Known: {', '.join(known)}; add one with "
                f"--set NAME:KEY=VALUE or --settings FILE."
            )
        joined: Changes = {}
        for part in parts:
            joined = merged(joined, known[part], name)
        found[_fit(name)] = joined
    return found, whole


def changed(study: Study, name: str, changes: Changes) -> Study:
    """The study under a setting; the study's own parser checks the whole.

    Raises:
        StudyInvalid: a wrong key, type, range or combination.
    """
    return parse(Study, merged(plain(study), changes), f"study {study.name!r} with setting {name!r}")


def merged(base: Changes, over: Changes, together: str = "") -> dict[str, Any]:
    """Tables within tables joined; `over` wins, or with a name in `together` two unlike values are refused."""
    out = deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value, together)
        elif together and key in out and out[key] != value:
            raise StudyInvalid(
                f"--strategies {together!r}: two of its parts set `{key}`, to {json.dumps(out[key])} and to "
                f"{json.dumps(value)}. Choose one with --set NAME:KEY=VALUE."
            )
        else:
            out[key] = deepcopy(value)
    return out


def _assignment(text: str) -> tuple[str | None, Changes]:
    key, equals, value = text.partition("=")
    name, colon, path = key.rpartition(":")
    try:
        if not equals or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", path.strip()):
            raise tomllib.TOMLDecodeError
        return (name.strip() if colon else None), tomllib.loads(f"{path.strip()} = {value}")
    except tomllib.TOMLDecodeError:
        raise StudyInvalid(
            f"--set {text!r}: write KEY=VALUE or NAME:KEY=VALUE with a key of study.toml and a TOML value, for example "
            f"""train.proximal_mu=0.1 or 'bn:personal.keep=["norm"]'."""
        ) from None


def _fit(name: str) -> str:
    if not NAME.fullmatch(name) or TAKEN.fullmatch(name):
        raise StudyInvalid(
            f"setting {name!r}: a name has up to 40 lower-case letters, digits, - and +, and is not pooled, local, or "
            f"one with -without-."
        )
    return name
