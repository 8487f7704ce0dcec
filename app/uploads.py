"""Pictures that clients send: strangers' files to pixels, within limits, and those pixels back under what was drawn."""

import base64
import hashlib
import io
from dataclasses import dataclass, field

from anyio import CapacityLimiter, to_thread
from PIL import Image, ImageOps

from app import errors
from app.errors import Problem

FORMATS = ("PNG", "JPEG", "WEBP")
ANIMATED = ("PNG", "WEBP")  # a JPEG of several pictures is a camera's, and its first is the picture
MOST_PIXELS = 4096 * 4096  # of a file: 50 MB as RGB
MOST_SCANS = (
    100  # of a progressive JPEG, which has about ten: thousands would fit, and each takes a pass over all pixels
)
WHITE = 127  # a mask is drawn anew above this: diffusers binarizes at a half

Image.MAX_IMAGE_PIXELS = None  # our own limit is lower, and Pillow's warns on stderr
_threads = CapacityLimiter(2)  # files decoded at a time: each may take 0.2 GB


@dataclass(frozen=True)
class Bitmap:
    """Pixels, row by row: width x height x 3 bytes of RGB, or of a mask width x height bytes, 255 where it is drawn
    anew and 0 elsewhere. Shown and compared by its digest."""

    width: int
    height: int
    pixels: bytes = field(repr=False, compare=False)
    digest: str


async def read(
    image: str | bytes | None, mask: str | bytes | None, size: tuple[int, int] | None = None
) -> tuple[Bitmap | None, Bitmap | None]:
    """Both as pixels, decoded in a thread. Files, or base64 of them. size: width and height to be resized to; as they
    are if None. Raises Problem, with the field's name, for what is no valid picture or mask."""
    if image is None and mask is None:
        return None, None

    def decode() -> tuple[Bitmap | None, Bitmap | None]:
        drawn_over = None if image is None else picture(open_file(image, "image"), size)
        return drawn_over, None if mask is None else stencil(open_file(mask, "mask"), size)

    return await to_thread.run_sync(decode, limiter=_threads)


def open_file(file: str | bytes, name: str) -> Image.Image:
    """A picture in whatever mode its file has, upright, wholly decoded. file: its bytes, or base64 of them. name: of
    the field. Raises Problem."""
    if isinstance(file, str):
        try:
            file = base64.b64decode(file, validate=True)
        except ValueError:
            raise Problem(errors.INVALID, f"{name} is no base64", name) from None
    if file.count(b"\xff\xda") > MOST_SCANS and file.startswith(b"\xff\xd8"):
        raise Problem(errors.INVALID, f"{name} is a JPEG of more than {MOST_SCANS} scans", name)
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            detail = f"{name} has {image.width} x {image.height} pixels, and at most {MOST_PIXELS} are decoded"
            raise Problem(errors.INVALID, detail, name)
        if image.format in ANIMATED and getattr(image, "is_animated", False):
            raise Problem(errors.INVALID, f"{name} is animated; send one picture", name)
        return ImageOps.exif_transpose(image)  # which loads it
    except (Problem, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise Problem(errors.INVALID, f"{name} is no whole PNG, JPEG or WebP file", name) from error


def picture(image: Image.Image, size: tuple[int, int] | None = None) -> Bitmap:
    """RGB, on white where it is transparent; resized to width and height if those are given."""
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return _bitmap(image if size is None else image.resize(size, Image.Resampling.LANCZOS))


def stencil(image: Image.Image, size: tuple[int, int] | None = None, name: str = "mask") -> Bitmap:
    """A mask of 0 and 255, which is drawn anew; resized to width and height if those are given. Raises Problem where
    nothing is white, or something transparent: some programs mean by that what is drawn anew, and others what stays."""
    image = _eight_bits(image)
    opaque = image.convert("RGBA").getchannel("A").histogram()[255]
    if opaque < image.width * image.height:
        raise Problem(errors.INVALID, f"{name} is transparent in places; make it black, and white where to draw", name)
    image = image.convert("L")
    if size is not None:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image = image.point([255 if value > WHITE else 0 for value in range(256)])
    if image.getbbox() is None:
        raise Problem(errors.INVALID, f"{name} has nothing white, so there is nothing to draw", name)
    return _bitmap(image)


def keep(drawn: bytes, image: Bitmap, mask: Bitmap) -> bytes:
    """What was drawn, height x width x 3 bytes, with the image's own pixels where the mask is black."""
    size = image.width, image.height
    new, old = (Image.frombytes("RGB", size, pixels) for pixels in (drawn, image.pixels))
    return Image.composite(new, old, Image.frombytes("L", size, mask.pixels)).tobytes()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its high byte, as Pillow reads colours of 16 bits; convert() would cut it off at 255."""
    return image.point(lambda value: value * (1 / 256)).convert("L") if image.mode.startswith("I") else image


def _bitmap(image: Image.Image) -> Bitmap:
    pixels = image.tobytes()
    return Bitmap(image.width, image.height, pixels, hashlib.sha256(pixels).hexdigest())
