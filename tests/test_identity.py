"""Certificates, node keys, signatures and key files: what each is good for, and what is refused."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from shared_models.errors import EnrolmentFailed, StateInvalid
from shared_models.identity import (
    check_site_name,
    fingerprint_words,
    identity_public_key,
    issue_server,
    issue_signer,
    issue_site,
    load_secret,
    new_authority,
    new_site_keys,
    node_public_key,
    node_public_pem,
    read_certificate,
    request_certificate,
    save_secret,
    sign,
    split_address,
    stated,
    verify,
)
from shared_models.words import WORDS

AUTHORITY = new_authority("Test federation")
KEYS = new_site_keys()


def load(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def csr(name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def test_the_authority_lives_ten_years_and_signs_leaves_only() -> None:
    ca = load(AUTHORITY.certificate)
    assert 3649 <= (ca.not_valid_after_utc - datetime.now(UTC)).days <= 3650
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)


def test_a_server_certificate_names_its_hosts_and_loopback() -> None:
    server = load(issue_server(AUTHORITY, ["fed.example.org", "10.1.2.3"]).certificate)
    server.verify_directly_issued_by(load(AUTHORITY.certificate))
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1", "::1"]
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_site_certificate_is_a_client_of_that_name_for_ninety_days() -> None:
    pem = issue_site(AUTHORITY, request_certificate("north", KEYS.tls), "north")
    site = load(pem)
    site.verify_directly_issued_by(load(AUTHORITY.certificate))
    assert list(site.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert not site.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    facts = read_certificate(pem)
    assert facts.name == "north"
    assert facts.serial == f"{site.serial_number:x}"
    assert facts.fingerprint == site.fingerprint(hashes.SHA256()).hex()
    assert 89 <= timedelta(seconds=facts.expires_at_s - datetime.now(UTC).timestamp()).days <= 90
    assert read_certificate(ssl.PEM_cert_to_DER_cert(pem.decode())) == facts


def test_extensions_that_a_request_asks_for_are_not_taken_over() -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    site = load(issue_site(AUTHORITY, greedy, "north"))
    assert not site.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_request_for_another_name_is_refused() -> None:
    with pytest.raises(EnrolmentFailed, match="the invite is for 'north'"):
        issue_site(AUTHORITY, request_certificate("south", KEYS.tls), "north")


def test_a_request_signed_by_another_key_is_refused() -> None:
    der = bytearray(
        x509.load_pem_x509_csr(request_certificate("north", KEYS.tls)).public_bytes(serialization.Encoding.DER)
    )
    other = bytes(x509.load_pem_x509_csr(request_certificate("north", new_site_keys().tls)).signature)
    own = bytes(x509.load_pem_x509_csr(ssl_pem(bytes(der))).signature)
    if len(own) != len(other):  # DER integers vary by a byte; flip a bit instead
        der[-1] ^= 1
    else:
        der[-len(own) :] = other
    with pytest.raises(EnrolmentFailed, match="not by the key it carries"):
        issue_site(AUTHORITY, ssl_pem(bytes(der)), "north")


def ssl_pem(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()


def test_a_request_with_a_weak_key_or_no_request_at_all_is_refused() -> None:
    with pytest.raises(EnrolmentFailed, match="P-256 or P-384"):
        issue_site(AUTHORITY, csr("north", rsa.generate_private_key(65537, 2048)), "north")
    with pytest.raises(EnrolmentFailed, match="cannot be read"):
        issue_site(AUTHORITY, b"nonsense", "north")


def test_flower_reads_the_node_key() -> None:
    key = serialization.load_ssh_private_key(KEYS.node, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert node_public_key(KEYS.node).startswith(b"ecdsa-sha2-nistp384 ")
    assert b"BEGIN PUBLIC KEY" in node_public_pem(node_public_key(KEYS.node))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda line: line + b" comment", "text around it"),
        (lambda line: b"nonsense", "cannot be read"),
        (
            lambda line: (
                ed25519.Ed25519PrivateKey.generate()
                .public_key()
                .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            ),
            "NIST curve",
        ),
    ],
)
def test_a_node_key_that_flower_would_not_take_is_refused(change, why: str) -> None:
    with pytest.raises(EnrolmentFailed, match=why):
        node_public_pem(change(node_public_key(KEYS.node)))


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_signature_holds_for_its_content_purpose_and_key_alone(content: bytes, other: bytes) -> None:
    public = identity_public_key(KEYS.identity)
    signature = sign(KEYS.identity, "update", content)
    assert verify(public, signature, "update", content)
    assert verify(public, signature, "update", other) == (content == other)
    assert not verify(public, signature, "study", content)
    assert not verify(identity_public_key(new_site_keys().identity), signature, "update", content)
    assert not verify(public, signature[:-1], "update", content)
    assert not verify(b"short", signature, "update", content)


def test_fingerprint_words_are_eight_of_256_different_ones() -> None:
    assert len(WORDS) == len(set(WORDS)) == 256
    digest = read_certificate(AUTHORITY.certificate).fingerprint
    spoken = fingerprint_words(digest).split()
    assert bytes(WORDS.index(word) for word in spoken) == bytes.fromhex(digest)[:8]


def test_keys_are_not_in_any_repr() -> None:
    shown = repr(AUTHORITY) + repr(KEYS)
    for secret in (AUTHORITY.key, KEYS.tls, KEYS.node, KEYS.identity):
        body = secret.splitlines()[1].decode()
        assert body not in shown
    assert "PRIVATE" not in shown


def test_a_key_file_is_ours_alone_or_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "x.key"
    save_secret(path, KEYS.identity)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_secret(path) == KEYS.identity
    path.chmod(0o640)
    with pytest.raises(StateInvalid, match="chmod 600"):
        load_secret(path)


def test_a_key_file_of_another_user_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_secret(tmp_path / "x.key", KEYS.identity)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(StateInvalid, match="belongs to user id"):
        load_secret(tmp_path / "x.key")
    with pytest.raises(StateInvalid, match="cannot be read"):
        load_secret(tmp_path / "none.key")


@pytest.mark.parametrize("name", ["", "North", "a/b", "..", "a" * 33, "a b", "a\n", "-north"])
def test_site_names_are_plain(name: str) -> None:
    with pytest.raises(EnrolmentFailed, match="lower-case letters"):
        check_site_name(name)


def test_addresses_are_host_and_port() -> None:
    assert split_address("fed.example.org:8443") == ("fed.example.org", 8443)
    assert split_address("[2001:db8::1]:443") == ("2001:db8::1", 443)
    for wrong in ("fed.example.org", "https://fed:1", "fed:0", "fed:70000", ":1", "a b:1"):
        with pytest.raises(EnrolmentFailed, match="host:port"):
            split_address(wrong)
    for slip in ("fed..example.org:1", ".fed:1", f"fed.{'a' * 64}:1"):
        with pytest.raises(EnrolmentFailed, match="1 to 63 characters between two dots"):
            split_address(slip)
    assert split_address(f"fed.{'a' * 63}.:1") == (f"fed.{'a' * 63}.", 1)


def test_a_statement_is_the_coordinator_s_if_its_authority_vouches_for_the_key_that_signed_it() -> None:
    signer = issue_signer(AUTHORITY)
    said = sign(signer.key, "plan", b"content")
    assert stated(AUTHORITY.certificate, signer.certificate, said, "plan", b"content")
    assert not stated(AUTHORITY.certificate, signer.certificate, said, "plan", b"other content")
    assert not stated(AUTHORITY.certificate, signer.certificate, said, "release", b"content")
    assert not stated(new_authority("Test federation").certificate, signer.certificate, said, "plan", b"content")
    usage = load(signer.certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [use.dotted_string for use in usage] == ["1.3.6.1.5.5.7.3.36"]


def test_nobody_else_of_the_federation_can_make_a_statement_of_the_coordinator() -> None:
    said = sign(KEYS.identity, "plan", b"content")
    others = [
        issue_site(AUTHORITY, request_certificate("north", KEYS.tls), "north"),
        issue_server(AUTHORITY, ["fed.example.org"]).certificate,
        AUTHORITY.certificate,
        issue_signer(AUTHORITY).certificate,
        b"-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n",
        b"",
    ]
    assert not any(stated(AUTHORITY.certificate, other, said, "plan", b"content") for other in others)
