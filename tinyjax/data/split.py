"""The train/held-out split: by a hash of the content, so that equal documents never land on both sides."""

import hashlib

DIGEST_BYTES = 16


def digest(text: bytes) -> bytes:
    """Return the content hash of a document's UTF-8 bytes: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def is_heldout(text: str, share: float) -> bool:
    """Return whether a document is held out; a function of its text alone, true for about `share` of all texts."""
    return digest_is_heldout(digest(text.encode()), share)


def digest_is_heldout(content: bytes, share: float) -> bool:
    """Return `is_heldout` of the document with this content hash. A larger share only adds documents."""
    return int.from_bytes(content[:8], "big") < share * 2**64
