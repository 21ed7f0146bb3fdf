"""Many cases through one model: each read, answered and written before the next; one that fails stops no other."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from fedclient.predict.case import Prediction, predict_case
from fedclient.predict.inputs import Inputs, Source, Unread
from fedclient.predict.model import Model
from fedclient.predict.outputs import Explanation, write_case
from fedclient.predict.table import Risk, risks
from shared_models.errors import DeviceFailed, ImageUnreadable, OrderRefused, StateInvalid, WeightsInvalid
from shared_models.files import replacing, write_json

RESULTS, INPUTS = "results.csv", "inputs.csv"  # the second says which file a case was, and stays here as they do
Explain: TypeAlias = Callable[[Prediction], Sequence[Explanation]]
COLUMNS = (
    "case", "input", "row", "status", "answer", "called", "chance", "volume_ml", "longest_axial_mm", "parts", "doubts",
    "uncertainty", "release", "seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """One case, predicted and written.

    Attributes:
        missing: format -> why it could not be made of this case.
        rows: of the table, one for each answer.
    """

    name: str
    given: int
    doubts: tuple[str, ...]
    missing: dict[str, str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Failed:
    """One case that could not be predicted on, by code and in words; the words name no file."""

    name: str
    given: int
    code: str
    why: str


def predict_all(
    model: Model,
    inputs: Inputs,
    out: Path,
    formats: Sequence[str],
    *,
    overwrite: bool = False,
    uncertainty: bool = False,
    explain: Explain | None = None,
) -> Iterator[Done | Failed]:
    """Each case as it is done; `out/CASE/` holds its results, `out/results.csv` a row for each answer at the end.

    Args:
        explain: draws why the network answers so; `fedclient.predict.explained` does, in PyTorch.

    Raises:
        StateInvalid: `out` holds results already, and `overwrite` is not said.
        WeightsInvalid: the network itself cannot be run.
        DeviceFailed: the GPU computes nothing more.
    """
    check_free(out, overwrite)
    if "csv" in formats:
        _which(inputs, out)
    with _table(out, formats) as rows:
        for each in inputs.found:
            outcome = _one(model, each, out, formats, overwrite, uncertainty, explain)
            rows.add(outcome)
            yield outcome


def predict_table(
    model: Model, tables: Sequence[Path], out: Path, formats: Sequence[str], *, overwrite: bool = False
) -> Iterator[Done | Failed]:
    """Risks by rows of tables; each table's as `out/TABLE.json`, and all in `out/results.csv`."""
    check_free(out, overwrite)
    with _table(out, formats) as rows:
        for given, path in enumerate(tables, start=1):
            told: list[dict[str, Any]] = []
            try:
                for risk in risks(model, path):
                    outcome = _risk(model, risk, given)
                    if isinstance(risk, Risk):
                        told.append({"row": risk.row, "by_day": {f"{d:g}": p for d, p in risk.by_day.items()}})
                    rows.add(outcome)
                    yield outcome
            except (ImageUnreadable, OSError) as e:
                code, why = (e.code, str(e)) if isinstance(e, ImageUnreadable) else ("FILE_MISSING", type(e).__name__)
                failed = Failed(f"table-{given}", given, code, why)
                rows.add(failed)
                yield failed
                continue
            if "json" in formats:
                head = {"release": {"name": model.name, "version": model.version, "sha256": model.digest}}
                write_json(out / f"table-{given}.json", head | {"event": model.study.task.labels[0], "rows": told})


def check_free(out: Path, overwrite: bool) -> None:
    if (out / RESULTS).exists() and not overwrite:
        raise StateInvalid(f"{out}: holds the results of another run. Give another folder with -o, or --overwrite.")


def _which(inputs: Inputs, out: Path) -> None:
    """inputs.csv: the first file of each case, for the hospital to find it again; results.csv holds no path."""
    with replacing(out / INPUTS) as file:
        lines = io.StringIO(newline="")
        table = csv.writer(lines)
        table.writerow(("case", "input", "files", "first_file"))
        for each in inputs.found:
            files = each.files if isinstance(each, Source) else ()
            table.writerow((each.name, each.given, len(files), str(files[0]) if files else ""))
        file.write(lines.getvalue().encode("utf-8", "surrogateescape"))


def _one(
    model: Model,
    source: Source | Unread,
    out: Path,
    formats: Sequence[str],
    overwrite: bool,
    uncertainty: bool,
    explain: Explain | None,
) -> Done | Failed:
    if isinstance(source, Unread):
        return Failed(source.name, source.given, source.code, source.why)
    try:
        found = predict_case(model, source, uncertainty=uncertainty)
        explained = explain(found) if explain is not None else ()
        _, missing = write_case(found, source.name, out, formats, overwrite=overwrite, explained=explained)
        return _done(found, source, missing)
    except (ImageUnreadable, OrderRefused) as e:
        return Failed(source.name, source.given, e.code, str(e))
    except StateInvalid as e:
        return Failed(source.name, source.given, "EXISTS", str(e))
    except MemoryError:
        return Failed(source.name, source.given, "INPUT_TOO_LARGE", "there is not enough memory to read it.")
    except (WeightsInvalid, DeviceFailed, OSError):  # the network, its GPU, the disk: no other case would fare better
        raise
    except Exception as e:  # a gap in a reader's doubt; its words may hold a name
        return Failed(source.name, source.given, "IMAGE_UNREADABLE", f"its reader failed on it ({type(e).__name__}).")


def _done(found: Prediction, source: Source, missing: dict[str, str]) -> Done:
    from fedclient.predict.results import rows

    return Done(source.name, source.given, tuple(each.code for each in found.doubts), missing, rows(found))


def _risk(model: Model, risk: Risk | tuple[str, int, ImageUnreadable], given: int) -> Done | Failed:
    if not isinstance(risk, Risk):
        name, _, error = risk
        return Failed(name, given, error.code, str(error))
    last = max(risk.by_day)
    row = {
        "row": risk.row, "status": "ok", "answer": f"{model.study.task.labels[0]} by day {last:g}",
        "called": int(risk.by_day[last] > 0.5), "chance": f"{risk.by_day[last]:.6f}", "release": model.stamp,
    }  # fmt: skip
    return Done(risk.name, given, (), {}, [row])


class _Rows:
    """Rows of results.csv."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self.file = file
        self.write({name: name for name in COLUMNS})

    def add(self, outcome: Done | Failed) -> None:
        shared = {"case": outcome.name, "input": outcome.given}
        rows = [{"status": outcome.code}] if isinstance(outcome, Failed) else outcome.rows
        for row in rows:
            self.write(shared | row)

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        line = io.StringIO(newline="")
        csv.DictWriter(line, COLUMNS, restval="").writerow(row)
        self.file.write(line.getvalue().encode())


@contextmanager
def _table(out: Path, formats: Sequence[str]) -> Iterator[_Rows]:
    """results.csv, there whole when the block ends without an error; no file where no table is asked for."""
    if "csv" not in formats:
        yield _Rows(None)
        return
    with replacing(out / RESULTS) as file:
        yield _Rows(file)
