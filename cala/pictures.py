"""From a folder that somebody put together by hand to a batch of triplets, and an audit that names every hole."""
import os
from pathlib import Path

import numpy as np
from PIL import Image
from PIL import ImageFile
from PIL import ImageOps

from .errors import CalaError


def _eight_bits(image):
    "Grey pictures of 16 or 32 bits a pixel as 8 bits; PIL's own conversion cuts all above 255."
    values = np.asarray(image).astype(np.float64)
    scale = 257 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1
    if image.mode == "F" and values.max(initial=0) <= 1: scale = 1 / 255
    return Image.fromarray(np.clip(values / scale, 0, 255).round().astype(np.uint8))

def _over_white(image):
    "A picture with transparency, laid on white paper."
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)

MAX_PIXELS = 89_478_485  # where PIL begins to warn of decompression bombs

def _decode(path):
    "The picture at `path` as upright 8-bit RGB, or whatever PIL raised."
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing LAVIS sets it, for the whole process
    with Image.open(path) as opened:
        if opened.width * opened.height > MAX_PIXELS: raise ValueError(f"{opened.width:,} x {opened.height:,} pixels are too many")
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"): image = _eight_bits(image)
    if image.has_transparency_data: image = _over_white(image)
    return image.convert("RGB")

def read_picture(
    path: str | Path,  # a picture file of any kind that PIL knows
) -> Image.Image:      # RGB, upright, 8 bits a channel
    "Decode a picture; `CalaError` names one that is not there or cannot be decoded."
    if not os.path.isfile(path): raise CalaError(f"no picture {path}; cala-check lists all that are missing")
    try: return _decode(path)
    except Exception as error:  # OSError, SyntaxError, struct.error, ...: PIL's plugins raise what they like
        raise CalaError(f"{path} cannot be decoded ({error}); fetch it again or remove it") from None
