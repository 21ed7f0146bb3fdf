"""Text from people and from the wire into frozen dataclasses; past this file nobody sees a raw value.

A dataclass states its own rules with `Annotated[int, Field(gt=0)]`; pydantic reads them here, forbids keys that it
does not know, and every complaint names the place, the key, what was found and what is allowed.
"""

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from shared_models.errors import FederationError, StudyInvalid

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", frozen=True)  # every parsed dataclass: __pydantic_config__ = STRICT
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
# pydantic holds half a kilobyte for each wrong element of a sequence: of what comes over the wire the first is enough
Counts = Annotated[tuple[int, ...], Field(fail_fast=True)]
# A character of text that people write and others read: no control or direction mark, line break or invisible one, but
# for those that Persian, Indic scripts and emoji are spelled with (zero-width joiners, variation selector)
SHOWN = r"(?:[^\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]|[\x{200C}\x{200D}\x{FE0F}])"
ESCAPES = r""" Within "..." a \ begins an escape: write paths with /, or within '...'."""
Line = Annotated[str, Field(max_length=200, pattern=f"^{SHOWN}*$")]


def printable(text: str) -> str:
    """`text` without what a terminal would obey or not show."""
    return "".join(c if c.isprintable() else " " for c in text)


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # building one costs a millisecond, messages come by the thousand


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def parse(kind: type[T], value: object, where: str, error: type[FederationError] = StudyInvalid) -> T:
    """`value` (plain dicts and lists) as the dataclass `kind`.

    Raises:
        error: the first three complaints, each with `where`, the key, what was found and what is allowed.
    """
    # By way of JSON, where pydantic's strict mode takes lists for tuples and tables for dataclasses, and no "5" for 5
    return _validated(kind, json.dumps(value, default=lambda other: [type(other).__name__, str(other)]), where, error)


def parse_json(kind: type[T], text: str | bytes, where: str, error: type[FederationError] = StudyInvalid) -> T:
    """The same from JSON, for messages; duplicate or unknown keys and wrong types are refused."""
    parsed = _validated(kind, text, where, error)
    json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where, error))
    return parsed


def _validated(kind: type[T], text: str | bytes, where: str, error: type[FederationError]) -> T:
    try:
        parsed: T = _adapter(kind).validate_json(text, strict=True)
        return parsed
    except ValidationError as e:
        raise error("\n".join(_complaint(kind, dict(c), where) for c in e.errors()[:3])) from None


def _once(pairs: list[tuple[str, Any]], where: str, error: type[FederationError]) -> dict[str, Any]:
    """Refuses a key that stands twice in one object: two readers may each believe another one."""
    doubled = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if doubled:
        raise error(f"{where}: `{doubled[0]}` stands there twice. Keep one.")
    return dict(pairs)


def plain(value: object) -> Any:
    """A dataclass as plain dicts, lists and numbers, ready for JSON; the inverse of `parse`."""
    return _adapter(type(value)).dump_python(value, mode="json")


def schema_of(kind: Any) -> dict[str, Any]:
    """The layout of a parsed dataclass as JSON Schema."""
    return dict(_adapter(kind).json_schema())


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; a missing or broken file is a StudyInvalid that names the line."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise StudyInvalid(
            f"{path}: there is no such file. Check the path, or use the name of a ready study."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise StudyInvalid(f"{path}: not TOML: {e}. Mend that line.{_escape_hint(text, str(e))}") from None
    except (OSError, ValueError) as e:  # ValueError: a path that no system can have
        raise StudyInvalid(
            f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}). Give the path of a file that you may read."
        ) from None


def _escape_hint(text: str, error: str) -> str:
    """How a path of Windows is written, where the line that is no TOML has a backslash."""
    number = re.search(r"at line (\d+)", error)
    line = text.split("\n")[int(number[1]) - 1] if number else ""
    return ESCAPES if "\\" in line else ""


def _complaint(kind: type[object], found: Mapping[str, Any], where: str) -> str:
    names = [str(part) for part in found["loc"] if not (isinstance(part, str) and part in _tags(kind))]
    names = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    key = ".".join(names)
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known(kind, names[:-1])
        hint = did_you_mean(names[-1], known)
        return f"{where}: `{key}` is not a key here.{hint} Allowed: {', '.join(known) or 'none'}."
    if found["type"] in ("missing", "missing_argument"):
        return f"{where}: `{key}` is missing. Add it."
    if found["type"] == "json_invalid":
        return f"{where}: is no JSON."  # its text may hold secrets and is not repeated
    says = str(found["msg"]).removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
    if found["type"] == "string_pattern_mismatch" and SHOWN in found["ctx"]["pattern"]:
        says = "visible characters on one line"
    if found["type"] == "value_error":
        return f"{where}: {f'`{key}`: ' if key else ''}{says}."
    shown = repr(found["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{where}: {f'`{key}` is' if key else 'is'} {shown}; allowed: {says}."


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """` Did you mean ...?` for the one of `known` that `word` is nearest to; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def _known(kind: type[object], path: list[str]) -> list[str]:
    """Field names of the table at `path` below the dataclass `kind`."""
    for name in path:
        for part in _dataclasses_of(kind):
            hints = {f.name: f.type for f in fields(part)}
            if name in hints:
                kind = hints[name]  # type: ignore[assignment]
                break
    return sorted({f.name for part in _dataclasses_of(kind) for f in fields(part)})


def _dataclasses_of(kind: object) -> list[Any]:
    if isinstance(kind, type) and is_dataclass(kind):  # pydantic's validators are dataclasses too
        return [kind]
    return [found for arg in get_args(kind) for found in _dataclasses_of(arg)]


def _tags(kind: object) -> set[str]:
    """Names that pydantic puts into a location for the members of a union; they are no keys of the file."""
    if is_dataclass(kind):
        return {tag for f in fields(kind) for tag in _tags(f.type)}
    parts = _dataclasses_of(kind)
    return {p.__name__ for p in parts} if len(parts) > 1 else set()
