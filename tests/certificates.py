"""A root and certificates that it vouches for, as C2PA wants them: self-signed ones it refuses."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


class Authority:
    """Writes root.pem into a folder, and pairs of a certificate chain and its key."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._issue("Root", self._key, 365, is_root=True)
        self.root.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def pair(self, name: str, days: float = 90, vouched: bool = True) -> dict[str, str]:
        """Settings for a certificate that expires in so many days. vouched: by the root, and not by itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(name, key, days, vouched=vouched)
        chain, secret = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        own = certificate.public_bytes(serialization.Encoding.PEM)
        chain.write_bytes(own + self.root.read_bytes() if vouched else own)
        encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        secret.write_bytes(key.private_bytes(*encoding))
        return {"C2PA_CERT": str(chain), "C2PA_KEY": str(secret)}

    def _issue(
        self, name: str, key: ec.EllipticCurvePrivateKey, days: float, is_root: bool = False, vouched: bool = True
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        by_itself = is_root or not vouched
        signer = key if by_itself else self._key
        signs = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        usage = x509.KeyUsage(True, key_cert_sign=is_root, crl_sign=is_root, decipher_only=False, **signs)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(name) if by_itself else self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(is_root, None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if not is_root:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return builder.sign(signer, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests")]
    )
