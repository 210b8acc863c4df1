"""A picture from the network, for whoever asks for it by name: nothing else here opens an URL."""

from __future__ import annotations

import urllib.request

from PIL import Image

from vlkd_jax.data.images import open_image
from vlkd_jax.errors import RecordError

MAX_BYTES = 20 * 2**20


def fetch(url: str, max_bytes: int = MAX_BYTES, seconds: float = 10.0) -> Image.Image:
    """The picture at an http or https URL, upright, RGB.

    Args:
      max_bytes: of its file; no more is read.
      seconds: without a byte after which it is given up.

    Raises:
      RecordError: another kind of URL, no answer, too large, or no picture.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise RecordError("image not found", f"{url}: not an http or https URL")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vlkd_jax"})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            data = answer.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise RecordError("image not found", f"{url}: {reason}; check the address, or save the picture") from error
    if len(data) > max_bytes:
        raise RecordError("image too large", f"{url}: more than {max_bytes:,} bytes; save a smaller one")
    try:
        return open_image(data)
    except RecordError as error:
        raise RecordError(error.reason, f"{url}: {error}") from error
