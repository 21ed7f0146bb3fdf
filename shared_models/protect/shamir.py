"""A secret of 32 bytes in shares: any `threshold` of them give it back, fewer say nothing of it (Shamir 1979)."""

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**256 + 297  # the first above 2**256: every 32 bytes are an element of its field, private keys as they are
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(
    secret: bytes, threshold: int, places: Sequence[int], random_bytes: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Place -> share (33 bytes, big-endian): a random polynomial of degree `threshold - 1` with `secret` at 0.

    Raises:
        ValueError: not 32 bytes, places that are not different whole numbers above 0, or fewer than `threshold`.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, this one {len(secret)}")
    if not 1 <= threshold <= len(places) or len(set(places)) < len(places) or min(places) < 1:
        raise ValueError(f"threshold {threshold} of places {sorted(places)}: they must be different and enough")
    # 48 bytes for each coefficient: what the remainder prefers is beyond 2**-127
    above = [int.from_bytes(random_bytes(48), "big") % PRIME for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "big"), *above]
    return {place: _at(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in places}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind `shares` (place -> share), by Lagrange's formula at 0.

    With fewer shares than the threshold, or a forged one, the result is another 32 bytes or a ValueError: whoever asks
    compares it with what is publicly known of the secret.
    """
    total = 0
    for place, share in shares.items():
        over = under = 1
        for other in shares:
            if other != place:
                over, under = over * other % PRIME, under * (other - place) % PRIME
        total = (total + int.from_bytes(share, "big") * over * pow(under, -1, PRIME)) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise ValueError("these shares are of no secret of 32 bytes")
    return total.to_bytes(SECRET_BYTES, "big")


def _at(coefficients: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value
