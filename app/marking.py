"""Content Credentials: pictures signed with the operator's certificate (C2PA), and which marks of AI a file has."""

import io
import json
import logging
from datetime import UTC, date, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from app import errors
from app.errors import Problem
from app.images import MEDIA_TYPES, SOURCE, encode

WARN = timedelta(days=14)  # before the certificate expires
SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # 200 KB of each file, and 30 ms
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}  # C2PA 2.2, 13.2.1

log = logging.getLogger("app.marking")


class Signer:
    """Signs files of pictures; from any thread. expires: of the certificate."""

    def __init__(self, certificates: Path, key: Path) -> None:
        """certificates: a PEM file, the signer's own first, then those that vouch for it. key: a PEM file. Raises
        ValueError with a sentence, unless a signature can be made now."""
        try:
            import c2pa
            from cryptography import x509
        except ImportError:
            raise ValueError("C2PA needs the extra c2pa: pip install 'sdxl-lightning-server[c2pa]'") from None
        chain, secret = _read(certificates), _read(key)
        try:
            own = x509.load_pem_x509_certificates(chain)[0]
        except ValueError:
            raise ValueError(f"{certificates} holds no certificate in PEM") from None
        self.expires = own.not_valid_after_utc
        if own.issuer == own.subject:
            raise ValueError(f"the certificate in {certificates} is self-signed: C2PA wants one that others vouch for")
        if self.expires < datetime.now(UTC):
            raise ValueError(f"the certificate in {certificates} expired on {self.expires:%Y-%m-%d}")
        self._manifest = json.dumps(_manifest())
        self._warned: date | None = None
        try:
            info = c2pa.C2paSignerInfo(_algorithm(secret), chain, secret, None)
            self._context = c2pa.Context.from_dict(SETTINGS, c2pa.Signer.from_info(info))
            self._sign(encode(bytes(3), 1, 1, "png", 90, {}), "image/png")
        except Exception as error:
            raise ValueError(f"C2PA cannot sign with {certificates} and {key}: {error}") from None

    def sign(self, file: bytes, media_type: str) -> bytes:
        """The same picture with a signed manifest in it. Raises Problem: it is never sent without."""
        self.warn()
        try:
            if datetime.now(UTC) > self.expires:
                raise ValueError("the certificate has expired")
            return self._sign(file, media_type)
        except Exception as error:
            log.exception("a picture could not be signed")
            raise Problem(errors.UNSIGNED) from error

    def _sign(self, file: bytes, media_type: str) -> bytes:
        import c2pa

        signed = io.BytesIO()
        with c2pa.Builder(self._manifest, self._context) as builder:
            builder.sign(media_type, io.BytesIO(file), signed)
        return signed.getvalue()

    def warn(self) -> None:
        """Once a day, from two weeks before the certificate expires."""
        now = datetime.now(UTC)
        if now > self.expires - WARN and self._warned != now.date():
            self._warned = now.date()
            log.warning("the certificate that signs pictures expires on %s: from then on none is sent", self.expires)


def verify(path: Path, anchors: Path | None) -> tuple[list[str], bool]:
    """A sentence per kind of mark; and whether there is one, and none is broken. anchors: PEM, of those who are
    trusted. Raises ValueError with a sentence."""
    file = _read(path)
    try:
        with Image.open(io.BytesIO(file), formats=["PNG", "JPEG", "WEBP"]) as image:
            kind = str(image.format).lower()
            xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or ""
    except OSError:
        raise ValueError(f"{path} is no PNG, JPEG or WebP") from None
    is_marked = SOURCE in (xmp.decode(errors="replace") if isinstance(xmp, bytes) else str(xmp))
    iptc = "IPTC: made by a trained model" if is_marked else "IPTC: no mark"
    c2pa, is_whole = _verify_c2pa(file, MEDIA_TYPES[kind], anchors)
    return [iptc, f"C2PA: {c2pa}"], is_whole if is_whole is not None else is_marked


def _verify_c2pa(file: bytes, media_type: str, anchors: Path | None) -> tuple[str, bool | None]:
    """What to say, and whether the file is whole; None where it has no manifest."""
    try:
        import c2pa
    except ImportError:
        return "not looked at; that needs the extra c2pa", None
    trust = {"trust": {"trust_anchors": _read(anchors).decode()}} if anchors else {}
    context = c2pa.Context.from_dict({"verify": OFFLINE, **trust})
    try:
        with c2pa.Reader(media_type, io.BytesIO(file), context=context) as manifests:
            found = json.loads(manifests.json())
    except c2pa.C2paError as error:
        if "ManifestNotFound" in str(error):
            return "no manifest", None
        return f"not valid: {error}", False
    state, manifest = found["validation_state"], found["manifests"][found["active_manifest"]]
    by = manifest.get("signature_info", {})
    who = f"signed by {by.get('common_name')} ({by.get('issuer')})"
    if state not in ("Valid", "Trusted"):
        codes = {fault["code"] for fault in found.get("validation_status", ())} - {"signingCredential.untrusted"}
        return f"not valid: {', '.join(sorted(codes))}; {who}", False
    is_ai = SOURCE in json.dumps(manifest)
    says = "made by a trained model" if is_ai else "it does not say that a model made it"
    known = "trusted" if state == "Trusted" else "but nobody trusted vouches for the signer"
    return f"valid, {known}; {who}; {says}", is_ai


def _manifest() -> dict[str, Any]:
    created = {"action": "c2pa.created", "digitalSourceType": SOURCE}
    return {
        "claim_generator_info": [{"name": "sdxl-lightning-server", "version": version("sdxl-lightning-server")}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _algorithm(secret: bytes) -> bytes:
    """What C2PA calls the signatures of a key."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(secret, None)
    if isinstance(key, EllipticCurvePrivateKey):
        return ALGORITHMS[key.curve.name].encode()
    return b"ps256" if isinstance(key, RSAPrivateKey) else b"ed25519"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
