"""The secrets of double masking (Bonawitz et al. 2017, section 4): agreed by pairs, one's own, and how shares travel.

Every key is bound to `context`, the digest of all that a secure sum is about (shared_models/protect/context.py), so
that what was made for one sum is noise in any other.
"""

import hashlib
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared_models.protect.prg import derive, framed

NONCE_BYTES = 12


def public_key(private: bytes) -> bytes:
    """The 32 public bytes of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes:
    """What two holders of X25519 keys, and nobody else, can know (RFC 7748, section 6.1).

    Raises:
        ValueError: `public` is weak (`is_weak`).
    """
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def is_weak(public: bytes) -> bool:
    """Whether a public key is a point of small order: all who agree with it agree on the same."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return True
    return False


def pair_mask_key(private: bytes, public: bytes, context: bytes, one: str, other: str) -> bytes:
    """Key of the mask that two sites share: one adds it, the other takes it away."""
    return derive(agree(private, public), b"sfl-secagg/1 pair mask", context, *_pair(one, other))


def self_mask_key(secret: bytes, context: bytes, site: str) -> bytes:
    """Key of the mask that a site has to itself: it hides a vector that comes after its site was given up."""
    return derive(secret, b"sfl-secagg/1 self mask", context, site.encode())


def commitment(secret: bytes, context: bytes, site: str) -> bytes:
    """What a site says of its own mask's secret beforehand, so that a forged share of it is found out."""
    return hashlib.sha256(framed(b"sfl-secagg/1 commitment", context, site.encode(), secret)).digest()


def share_digest(share: bytes, context: bytes, source: str, destination: str, kind: str) -> str:
    """What a site says of a share that it deals, to all: a share is a random number of 256 bits, so it says nothing of
    it. `kind` is `own mask` or `pair key`."""
    about = (context, source.encode(), destination.encode(), kind.encode(), share)
    return hashlib.sha256(framed(b"sfl-secagg/1 share", *about)).hexdigest()


def dealt_digests(own_mask: bytes, pair_key: bytes, context: bytes, source: str, destination: str) -> str:
    """Those of both shares that a site deals to another, one behind the other."""
    parts = ((own_mask, "own mask"), (pair_key, "pair key"))
    return "".join(share_digest(share, context, source, destination, kind) for share, kind in parts)


def channel_key(private: bytes, public: bytes, context: bytes, one: str, other: str) -> bytes:
    """Key under which two sites send each other shares through the coordinator."""
    return derive(agree(private, public), b"sfl-secagg/1 channel", context, *_pair(one, other))


def seal(key: bytes, content: bytes, about: bytes, random_bytes: Callable[[int], bytes]) -> bytes:
    """AES-256-GCM: nonce (12 bytes), then ciphertext and tag; `about` is vouched for and not sent."""
    nonce = random_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The content of what `seal` made; raises ValueError when a bit of it, of `about` or of the key is another."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about)
    except (InvalidTag, ValueError):
        raise ValueError("does not open: changed, or meant for somebody or something else") from None


def about_shares(context: bytes, source: str, destination: str) -> bytes:
    """What sealed shares are bound to: the sum, whose they are and whom they are for."""
    return framed(b"sfl-secagg/1 shares", context, source.encode(), destination.encode())


def _pair(one: str, other: str) -> tuple[bytes, bytes]:
    first, second = sorted((one, other))
    return first.encode(), second.encode()
