"""Signatures of published folders: over the checksums, in the OpenSSF model signing format (a Sigstore bundle)."""

import os
from pathlib import Path
from typing import Any

from ...editing.errors import RequestError, VerifyError, one_line
from ..files.written import sync
from .manifest import SIGNATURE, SUMS, verify_folder

EXTRA = "signatures need the package model-signing; run: pip install 'excise[sign]'"


def sign_folder(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Sign a published folder's checksums, which cover every file; returns the signature's path.

    Args:
        private_key: An elliptic curve key (P-256, P-384 or P-521) as PEM.

    Raises:
        RequestError: The key cannot be used.
        VerifyError: The folder is not as it was published.
    """
    verify_folder(folder)
    config = _config("signing")
    try:
        # model_signing annotates the password as text but needs bytes.
        config.use_elliptic_key_signer(private_key=private_key, password=password.encode() if password else None)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"{private_key.name} cannot be used as a private key ({one_line(error, 120)}); make one with "
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
        ) from error
    # The signature is made outside the folder, so that a failure leaves the folder as it was published.
    partial, path = folder.with_name(f".{folder.name}.{SIGNATURE}"), folder / SIGNATURE
    try:
        config.sign(folder / SUMS, partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_signature(folder: Path, public_key: Path) -> None:
    """Check that the owner of a key signed the folder's present checksums.

    Raises:
        RequestError: The key cannot be used.
        VerifyError: There is no signature, or it was made with another key or for other checksums.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        raise VerifyError(
            f"{folder.name} has no signature ({SIGNATURE}), so its publisher is unknown; sign it, or verify without a "
            "key"
        )
    config = _config("verifying")
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"{public_key.name} cannot be used as a public key ({one_line(error, 120)}); make one with "
            "`openssl ec -in key.pem -pubout -out public.pem`"
        ) from error
    try:
        config.verify(folder / SUMS, path)
    except Exception as error:  # a dozen kinds of several libraries, none of which leaves the signature valid
        reason = one_line(error, 120)
        raise VerifyError(
            f"{folder.name} was not signed with this key as it is now ({reason}); "
            "ask its owner for the key, or fetch it again"
        ) from error


def _config(kind: str) -> Any:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise RequestError(EXTRA) from error
    return signing.Config() if kind == "signing" else verifying.Config()
