"""A research release of a simulated run: whole, with card and exports, and of nobody who is known."""

import tempfile
from pathlib import Path

from fedserver.checkpoint import RunFolder
from fedserver.publish.card import Words
from fedserver.publish.making import make_release
from fedserver.publish.of_run import Maker, recipe_of
from fedserver.registry import copy_out
from shared_models.identity import issue_signer, new_authority
from shared_models.provenance import check_provenance
from shared_models.release import SUFFIX, Manifest, Trust, file_name, open_release

NAME = "research simulation"


def research_release(run: RunFolder, out: Path, version: str, words: Words, single_file: bool) -> tuple[Path, Manifest]:
    """Makes the release of a simulated run as `out`/NAME-VERSION, or one file of it.

    The key that signs it is made for it and forgotten: the signature shows that nothing was changed since, and not
    who made it.
    """
    authority = new_authority(NAME)
    maker = Maker("simulation", NAME, issue_signer(authority), authority.certificate, authority.certificate)
    recipe = recipe_of(run, version, maker, words)
    with tempfile.TemporaryDirectory(prefix=".fedsim-release-", dir=_there(out)) as scratch:
        made = Path(scratch) / "release"
        manifest = make_release(recipe, made)
        check_provenance(open_release(made, Trust(research=True)), ())
        to = out / (file_name(manifest) + (SUFFIX if single_file else ""))
        return copy_out(made, to, single_file), manifest


def _there(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
