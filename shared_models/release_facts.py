"""The statements of a release: what it is and where it comes from, who has signed it, and who has approved it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from shared_models.files import canonical_json
from shared_models.onefile import MEMBER
from shared_models.parse import STRICT, Count, RunId, Sha256, SiteName, plain
from shared_models.study import Name

FORMAT: Literal["fedrelease/1"] = "fedrelease/1"
MOST_FILES = 1000

VERSION = re.compile(r"[a-z0-9][a-z0-9.-]{0,31}")
Version = Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]
Text = Annotated[str, Field(max_length=2000)]
Key32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Pem = Annotated[str, Field(max_length=8192)]
Member = Annotated[str, Field(pattern=f"^{MEMBER.pattern}$")]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its size in bytes and its SHA-256."""

    __pydantic_config__ = STRICT
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Parent:
    """What the weights go back to: a release, a run, or a file of pre-trained weights."""

    __pydantic_config__ = STRICT
    kind: Literal["release", "run", "weights"]
    name: Annotated[str, Field(max_length=128)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a release comes from.

    Attributes:
        kind: `federation`, or `simulation` by a researcher, for whom no authority vouches.
        made_at: seconds since the epoch.
        study_sha256: of the study as the hospitals approved it; study.json of the release has the plan in it.
        sites: who was counted, and in how many rounds.
        roster_epoch, roster_sha256: of the federation's roster as the release was made.
        data_cards: site -> SHA-256 of the data card that it has handed in.
        code_sha256: of the installed package; environment_sha256: of the list of all installed packages.
    """

    __pydantic_config__ = STRICT
    kind: Literal["federation", "simulation"]
    federation: Annotated[str, Field(max_length=64)]
    run: RunId
    round: Count
    made_at: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    study_sha256: Sha256
    weights_sha256: Sha256
    sites: Annotated[Mapping[SiteName, Count], Field(max_length=1000)]
    plan_sha256: Sha256 | None = None
    parents: Annotated[tuple[Parent, ...], Field(max_length=16)] = ()
    roster_epoch: Count | None = None
    roster_sha256: Sha256 | None = None
    data_cards: Annotated[Mapping[SiteName, Sha256], Field(max_length=1000)] = field(default_factory=dict)
    package: Annotated[str, Field(max_length=64)] = ""
    code_sha256: Sha256 | None = None
    environment_sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a release is known by: the SHA-256 of this as canonical JSON is the release's digest.

    Attributes:
        exports: form -> the file that holds it, or why there is none.
        tolerance: largest difference of any export's logits from those of the torch network, as it was proved.
        signer_sha256, authority_sha256: of the certificates in signature.json, as they stand there.
        approvals, approvers: how many of whom must have signed too: name -> Ed25519 key.
    """

    __pydantic_config__ = STRICT
    format: Literal["fedrelease/1"]
    name: Name
    version: Version
    title: Annotated[str, Field(max_length=200)]
    origin: Origin
    exports: Mapping[str, Text]
    tolerance: Annotated[float, Field(gt=0, le=1e-2)]
    privacy: Mapping[str, Any] | None
    signer_sha256: Sha256
    authority_sha256: Sha256
    files: Annotated[Mapping[Member, Entry], Field(max_length=MOST_FILES)]
    approvals: Annotated[int, Field(ge=0, le=100)] = 0
    approvers: Annotated[Mapping[SiteName, Key32], Field(max_length=100)] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return canonical_json(plain(self))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True)
class Signed:
    """signature.json: the signature over the manifest's digest; signer and authority are certificates, PEM."""

    __pydantic_config__ = STRICT
    manifest_sha256: Sha256
    signature: Signature64
    signer: Pem
    authority: Pem


@dataclass(frozen=True, slots=True)
class Approvals:
    """approvals.json: who has approved the release, each by a signature of the same statement."""

    __pydantic_config__ = STRICT
    signatures: Annotated[Mapping[SiteName, Signature64], Field(max_length=100)]
