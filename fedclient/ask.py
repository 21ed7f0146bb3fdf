"""One question to a coordinator about a site's standing, and its answer or its refusal in its own words."""

import http.client
import json
import ssl
from contextlib import closing

from shared_models.errors import EnrolmentFailed
from shared_models.parse import printable
from shared_models.transfer import connect

TIMEOUT_S = 45.0  # the coordinator waits up to 20 s for its SuperLink
MOST_BYTES = 64 << 10


class TurnedAway(EnrolmentFailed):
    """The coordinator's refusal, in its own words.

    Attributes:
        status: of HTTP.
        words: what it said, without where.
    """

    def __init__(self, where: str, status: int, words: str) -> None:
        super().__init__(f"{where} (HTTP {status}): {words}")
        self.status, self.words = status, words


def ask(
    address: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None = None, most: int = MOST_BYTES
) -> bytes:
    """The content of a successful answer; raises TurnedAway with what the coordinator says, else EnrolmentFailed."""
    where = f"coordinator at {address}"
    try:
        with closing(connect(address, context, TIMEOUT_S)) as connection:
            headers = {"content-type": "application/json"} if body else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read(most)
    except ssl.SSLCertVerificationError as error:
        raise EnrolmentFailed(
            f"{where}: its certificate is not good for this address ({error.verify_message}). "
            "Check the address and this machine's clock."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise EnrolmentFailed(
            f"{where}: cannot be reached ({str(error) or type(error).__name__}). "
            "Check the address, the firewall, HTTPS_PROXY, and that `fedserver serve` runs; then try again."
        ) from error
    if response.status == 200:
        return content
    try:
        told = str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        told = response.reason
    raise TurnedAway(where, response.status, printable(told[:500]))  # of a peer not yet known, bound for a terminal
