"""From a short secret to keys (HKDF-SHA256) and to masks as long as a model (AES-256-CTR).

A key of a mask is derived for one context and one pair of sites and never used again, so the counter begins at 0.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

CHUNK = 1 << 16  # elements masked at once: 256 KiB of vector and of keystream stay in the cache (1 MiB: 5 % slower)
_ZEROS = memoryview(bytes(4 * CHUNK))
_SLACK = 16  # `update_into` of cryptography wants room for a block more than it writes


def framed(*parts: bytes) -> bytes:
    """`parts` joined so that no other parts give the same bytes: each behind its length (8 bytes, big-endian)."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def hkdf(secret: bytes, info: bytes, salt: bytes | None = None, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)


def derive(secret: bytes, *context: bytes) -> bytes:
    """A key of 32 bytes that is good for `context` alone."""
    return hkdf(secret, framed(*context))


def keystream(key: bytes, counter: bytes = bytes(16)) -> CipherContext:
    """AES-256 in counter mode (NIST SP 800-38A, 6.5): what it makes of zeros is the mask."""
    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()


class Masks:
    """Masks that are laid upon one vector as it goes by in blocks, each added or taken away.

    An element of a mask is 4 bytes of keystream, little-endian. `apply` goes on where it ended.
    """

    def __init__(self, keys: Iterable[tuple[bytes, int]]) -> None:
        """`keys`: 32 bytes each, and +1 or -1."""
        self._streams = [(keystream(key), np.add if sign > 0 else np.subtract) for key, sign in keys]
        self._bytes = bytearray(4 * CHUNK + _SLACK)
        self._words = np.frombuffer(self._bytes, "<u4", CHUNK)

    def apply(self, block: NDArray[np.uint32]) -> None:
        """Changes `block`, modulo 2**32."""
        for at in range(0, block.size, CHUNK):
            part = block[at : at + CHUNK]
            zeros, words = _ZEROS[: 4 * part.size], self._words[: part.size]
            for stream, onto in self._streams:
                stream.update_into(zeros, self._bytes)
                onto(part, words, out=part)
