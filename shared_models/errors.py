"""Every failure a person may meet, in one tree; a message says what, where, and how to mend.

* FederationError
  - StudyInvalid          study.toml, site.toml or an answer to a prompt that cannot be used
  - ImageUnreadable       a file that is not the image its manifest says
  - ManifestInvalid       a manifest.csv that does not describe a data set
  - WeightsInvalid        tensors that are not the ones agreed on
  - OrderRefused          an order that this site does not carry out (its `code` travels, its words stay)
  - UpdateRejected        a site's reply that must not touch the global model
    - AnswerForged        a message that is not the answer that was waited for, whoever sent it
  - RoundPaused           too few sites for a round, for as long as the study allows to wait
  - SumAborted            a secure sum that cannot be had, of which nothing was revealed
  - EnrolmentFailed       an invite, a key or a certificate that is not accepted
  - TransferFailed        a blob that could not be brought over whole
  - ProcessFailed         a process of ours that could not be started or kept alive
  - StateInvalid          a federation, site or run folder that is not what it should be
  - ReleaseInvalid        a release that is not whole, not as it was signed, or of nobody who is trusted here
  - ExplanationFailed     an answer of a network that cannot be explained
  - DeviceFailed          a GPU that computes nothing more for this process
"""


class FederationError(Exception):
    """Root of the tree; a command prints its message and exits with 1."""


class StudyInvalid(FederationError):
    """A study or site file that cannot be used."""


class ImageUnreadable(FederationError):
    """A file that is not the image its manifest says.

    Attributes:
        code: upper-case word of the catalogue of findings (`SERIES_GAP`, `DICOM_CODEC_MISSING`, ...).
    """

    def __init__(self, message: str, code: str = "IMAGE_UNREADABLE") -> None:
        super().__init__(message)
        self.code = code


class ManifestInvalid(FederationError):
    """A manifest, or another table about cases, that does not describe a data set.

    Attributes:
        code: upper-case word of the catalogue of findings.
    """

    def __init__(self, message: str, code: str = "MANIFEST_INVALID") -> None:
        super().__init__(message)
        self.code = code


class WeightsInvalid(FederationError):
    """Tensors whose names, shapes or dtypes are not the ones agreed on."""


class OrderRefused(FederationError):
    """An order that this site does not carry out.

    Attributes:
        code: upper-case word that the coordinator may see; the message itself stays at the site.
        keys: of the site's policy that the study breaks; their names travel, what they say does not.
        accused: the site whose message in a secure sum is at fault, where the coordinator has to know it.
    """

    def __init__(self, code: str, message: str, keys: tuple[str, ...] = (), accused: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.keys = keys
        self.accused = accused


class UpdateRejected(FederationError):
    """A site's reply that must not touch the global model.

    Attributes:
        code: upper-case word for status and metrics (`UPDATE_NONFINITE`, `UPDATE_SCHEMA`, ...).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class AnswerForged(UpdateRejected):
    """A message that is not the answer that was waited for; of the site that was asked it says nothing.

    Codes: `MESSAGE_INVALID`, `ENVELOPE_INVALID`, `OTHER_SITE`, `BAD_SIGNATURE`, `OTHER_STUDY`, `OTHER_RUN`,
    `STALE_ROUND`, `OTHER_WEIGHTS`, `OTHER_KIND`, `OTHER_ATTEMPT`, `REPLAYED`, `CONTENT_CHANGED`.
    """


class RoundPaused(FederationError):
    """A round that lacks its quorum, for as long as the study allows to wait."""


class SumAborted(FederationError):
    """A secure sum that cannot be had; what the coordinator holds of it says nothing of any site.

    Attributes:
        code: upper-case word for status and metrics (`SUM_BELOW_THRESHOLD`, `SUM_MASK_RESIDUE`, ...).
        culprits: sites that have lied, beyond doubt.
    """

    def __init__(self, code: str, message: str, culprits: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.culprits = culprits


class EnrolmentFailed(FederationError):
    """An invite, key or certificate that is not accepted."""


class TransferFailed(FederationError):
    """A blob that could not be brought over whole."""


class ProcessFailed(FederationError):
    """A process of ours that could not be started or kept alive."""


class StateInvalid(FederationError):
    """A federation, site or run folder that is not what it should be."""


class ReleaseInvalid(FederationError):
    """A release that is not whole, not as it was signed, or of nobody who is trusted here.

    Attributes:
        file: the member of the release that is wrong, with `/` between folders; empty where it is the whole.
    """

    def __init__(self, message: str, file: str = "") -> None:
        super().__init__(message)
        self.file = file


class ReleaseRetired(ReleaseInvalid):
    """A release that its federation has retired."""


class ExplanationFailed(FederationError):
    """An answer of a network that cannot be explained."""


class DeviceFailed(FederationError):
    """A GPU that computes nothing more for this process."""
