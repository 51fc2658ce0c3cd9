"""Read a picture file, of any kind that PIL knows, as upright RGB with eight bits a channel."""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .errors import CalaError

MAX_PIXELS = 89_478_485  # above this PIL warns of a decompression bomb
PICTURE_FOLDERS = ("", "images", "image_data", "img_raw", "resized_image", "resized_images", "COCO2017_unlabeled")


def read_picture(
    path: str | Path,  # a picture file
    root: str | Path | None = None,  # links must not lead out of this folder; None: links are not checked
) -> Image.Image:  # RGB, upright, 8 bits a channel, transparent parts on white
    "Decode a picture; a `CalaError` names a file that is missing or cannot be decoded."
    if fault := find_picture_fault(path, root):
        raise CalaError(fault)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # LAVIS sets it on import: truncated pictures would be read as half grey
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width:,} x {opened.height:,} pixels are too many")
            image = ImageOps.exif_transpose(opened)
            if not is_deep(image):
                return make_rgb(image)
    except MemoryError:  # the picture may be whole
        raise
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error and others
        raise CalaError(f"{path} cannot be decoded ({error}); download it again or remove it") from None
    return make_rgb(image)  # not above: a fault in cala's own arithmetic is not one of the file


def is_deep(
    image: Image.Image,
) -> bool:
    "True for grey values of 16 or 32 bits."
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def make_rgb(
    image: Image.Image,  # of any mode
) -> Image.Image:  # RGB, 8 bits a channel, transparent parts on white
    "A picture as the models read it."
    if is_deep(image):
        return reduce_to_eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reduce_to_eight_bits(
    image: Image.Image,  # grey, of 16 or 32 bits a pixel
) -> Image.Image:  # grey, of 8 bits a pixel
    "Scale grey values to 0..255; PIL's own conversion sets every value above 255 to 255."
    values = np.asarray(image).astype(np.float64)
    largest = values.max(initial=0)
    if image.mode == "F" and largest <= 1:
        scale = 255
    elif image.mode.startswith("I;16") or largest > 255:
        scale = 1 / 257
    else:
        scale = 1
    return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8))


def shorten_path(
    path: str | Path,  # of any length; a damaged annotation file may hold a very long name
    longest: int = 300,  # characters
) -> str:
    "A path for a message, without its middle if it is too long."
    text = str(path)
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}...{text[-half:]}"


def find_picture_fault(
    path: str | Path,  # where a picture should be
    root: str | Path | None = None,  # links must not lead out of this folder; None: links are not checked
) -> str:  # empty if nothing is wrong
    "Why a file cannot be a picture, as far as can be seen without reading it."
    if not os.path.isfile(path):
        return f"no picture {shorten_path(path)}; cala-check lists all that are missing"
    if root is not None and escapes_root(path, root):
        return (
            f"{path} is a link out of {root}; give --follow-links if you trust it, or put the picture itself there "
            "(cp -rL copies a folder of links as a folder of files)"
        )
    if os.path.getsize(path) == 0:
        return f"{path} is empty (0 bytes); download it again"
    return ""


def escapes_root(
    path: str | Path,  # of a picture
    root: str | Path,  # the data set's folder
) -> bool:
    """True if links lead from the data set's folder to a picture elsewhere.

    A link that stands for a whole folder of pictures (train, img_raw/train) is the user's own and is followed. A link
    further below may have come with a stranger's archive."""
    path, root = Path(path), Path(root)
    folders = path.relative_to(root).parts[:-1]
    depth = 2 if folders and folders[0] in PICTURE_FOLDERS else 1
    homes = [root.joinpath(*folders[:count]) for count in range(min(depth, len(folders)) + 1)]
    real = Path(os.path.realpath(path)) if path.is_symlink() else resolve_folder(path.parent.absolute()) / path.name
    return not any(real.is_relative_to(resolve_folder(home.absolute())) for home in homes)


@lru_cache(maxsize=4096)
def resolve_folder(folder: Path) -> Path:
    "The folder with its links followed; looked up once."
    return Path(os.path.realpath(folder))
