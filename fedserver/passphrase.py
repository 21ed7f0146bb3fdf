"""A person's passphrase into a key: how long it must be, and what it costs to guess one (scrypt, RFC 7914)."""

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from shared_models.errors import StateInvalid

SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**17, 8, 1  # 128 MiB; a quarter of a second
SALT_BYTES = 16
LEAST = 12


def check_passphrase(passphrase: str) -> None:
    """Raises StateInvalid for one that is too short."""
    if len(passphrase) < LEAST:
        raise StateInvalid(f"passphrase: has {len(passphrase)} characters; {LEAST} or more are needed.")


def stretched(passphrase: str, salt: bytes) -> bytes:
    """32 bytes."""
    return Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P).derive(passphrase.encode())
