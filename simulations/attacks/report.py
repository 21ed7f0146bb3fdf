"""What `fedsim attack` writes: report.json, report.html with the pictures in it, and each strip as a PNG file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedclient.worth_page import environment
from fedserver.plots import new_figure, png
from shared_models.files import write_atomic, write_json
from shared_models.study import Study, sha256
from simulations.attacks.finding import Finding, Strip

GOOD = ("holds", "succeeds, as it must")


def numbers(study: Study, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything but the pictures, for machines."""
    return {
        "study": study.name,
        "study_sha256": sha256(study),
        "privacy": None if study.protect.privacy is None else asdict(study.protect.privacy),
        "holds": not any(finding.missed for finding in findings),
        "shown": all(finding.shown for finding in findings),
        "attacks": [
            {
                "attack": finding.attack,
                "title": finding.title,
                "setting": finding.setting,
                "shown": finding.shown,
                "verdict": finding.verdict,
                "seconds": round(finding.seconds, 1),
                "rows": [asdict(row) for row in finding.rows],
            }
            for finding in findings
        ],
    }


def write_all(study: Study, findings: Sequence[Finding], out: Path) -> dict[str, str]:
    """Writes the files; what each is -> its path."""
    pictures: dict[str, list[str]] = {}
    written: dict[str, str] = {}
    for finding in findings:
        for number, strip in enumerate(finding.strips):
            content, path = strip_png(strip), out / f"{finding.attack}-{number + 1}.png"
            write_atomic(path, content)
            written[f"pictures of {finding.attack}"] = str(path)
            pictures.setdefault(finding.attack, []).append(base64.b64encode(content).decode())
    write_json(out / "report.json", numbers(study, findings))
    write_atomic(out / "report.html", page(study, findings, pictures).encode())
    return {"report": str(out / "report.html"), "numbers": str(out / "report.json"), **written}


def page(study: Study, findings: Sequence[Finding], pictures: Mapping[str, Sequence[str]]) -> str:
    text: str = (
        environment("simulations")
        .get_template("attacks.html")
        .render(study=study, privacy=study.protect.privacy, findings=findings, pictures=pictures, good=GOOD)
    )
    return text


def strip_png(strip: Strip) -> bytes:
    """The pictures of a strip side by side, with their captions."""
    figure = new_figure(1.9 * len(strip.pictures), 2.5)
    for place, (caption, picture) in enumerate(strip.pictures.items(), start=1):
        axes = figure.add_subplot(1, len(strip.pictures), place)
        axes.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(caption.replace(": ", ":\n").replace(", ", ",\n"), fontsize=7)
        axes.set_axis_off()
    return png(figure)


def table(study: Study, findings: Sequence[Finding]) -> Table:
    """A line for each figure, and in a word whether it is as it must be."""
    drawn = Table(title=f"Attacks on {study.name}")
    for name, side in (("attack", "left"), ("against", "left"), ("figure", "left"), ("found", "right"),
                       ("must be", "left"), ("", "left")):  # fmt: skip
        drawn.add_column(name, justify="right" if side == "right" else "left")
    for finding in findings:
        for number, row in enumerate(finding.rows):
            last, word = number == len(finding.rows) - 1, _coloured(finding.word(row))
            drawn.add_row(
                finding.attack if number == 0 else "", row.against, row.figure, row.told, row.must, word,
                end_section=last,
            )  # fmt: skip
    return drawn


def _coloured(word: str) -> str:
    return f"[{'green' if word in GOOD else 'red'}]{word}[/]" if word else ""
