"""Pictures that clients send to POST /generate: drawn over as diffusers does, or refused by the field's name."""

import base64
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from models.grid import starts
from models.schedule import make_schedule
from tests.conftest import PLAIN, eventually
from tests.models import oracle

PROMPT = "yellow banana, green background"
ASK = {"prompt": PROMPT, "seed": 3}
IMAGE, MASK = (Image.fromarray(each.numpy()) for each in (oracle.IMAGE, oracle.MASK))
WHITE = oracle.MASK.numpy() > 0


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PNG, MASK_PNG = file(IMAGE), file(MASK)


def post(server, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json={**ASK, **fields}, timeout=120, verify=PLAIN)


def drawn(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = base64.b64decode(response.json()["images"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def theirs(variant: str, seed: int, strength: float, mask: bool = False) -> np.ndarray:
    row = oracle.FAMILY.variants[variant]
    path = starts(row.steps[0])[strength]
    timesteps = tuple(make_schedule(row, row.steps[0]).table[list(path), 0].tolist())
    return (oracle.draw_over(variant, PROMPT, seed, strength, timesteps, mask, "np") * 255).round().int().numpy()


@pytest.mark.parametrize(
    ("steps", "asked", "used"),
    [(1, 0.3, 0.25), (1, None, 0.75), (2, 0.75, 0.75), (2, 0.5, 0.5), (4, 0.99, 0.75), (4, 1, 1.0), (8, 0.9, 0.875)],
)
def test_a_served_picture_drawn_over_is_diffusers_and_tells_its_strength(server, steps, asked, used):
    response = post(server, steps=steps, image=b64(PNG), strength=asked)
    assert abs(drawn(response) - theirs(f"{steps}step-unet", 3, used)).max() <= 1
    answer = response.json()
    assert (answer["strength"], len(answer["batch_sizes"])) == (used, len(starts(steps)[used]))


@pytest.mark.parametrize(("strength", "used"), [(None, 1.0), (0.5, 0.5)])
def test_an_inpainted_picture_is_diffusers_where_the_mask_is_white_and_the_image_where_it_is_black(
    server, strength, used
):
    ours = drawn(post(server, steps=4, image=b64(PNG), mask=b64(MASK_PNG), strength=strength))
    assert abs(ours - theirs("4step-unet", 3, used, mask=True))[WHITE].max() <= 1
    assert (ours[~WHITE] == oracle.IMAGE.numpy()[~WHITE]).all()


def test_pictures_of_all_kinds_in_flight_together_are_those_drawn_alone(server):
    kinds = [{}, {"image": b64(PNG)}, {"image": b64(PNG), "mask": b64(MASK_PNG)}]
    asked = [{**kinds[k % 3], "seed": k // 3, **({"strength": 0.5} if k % 2 and k % 3 else {})} for k in range(12)]
    alone = [drawn(post(server, **fields)) for fields in asked]
    server.wait_for_batches()
    with ThreadPoolExecutor(len(asked)) as pool:
        with server.stopped_engine():
            answers = [pool.submit(post, server, timeout=120, **fields) for fields in asked]
            assert eventually(lambda: server.in_engine() == len(asked), 15)
        responses = [answer.result() for answer in answers]
    for response, expected in zip(responses, alone, strict=True):
        assert (drawn(response) == expected).all()
    assert max(max(response.json()["batch_sizes"]) for response in responses) > 1


def test_several_pictures_over_one_image_have_consecutive_seeds(server):
    answer = post(server, image=b64(PNG), n=3, seed=5).json()
    last = base64.b64decode(answer["images"][2]["b64_json"])
    alone = drawn(post(server, image=b64(PNG), seed=7))
    assert (np.asarray(Image.open(io.BytesIO(last))) == alone).all()


def test_a_form_means_what_json_means(server):
    fields = {"prompt": PROMPT, "seed": "3", "steps": "2", "strength": "0.5", "variant": "2step-unet", "size": "null"}
    files = {"image": ("a b.png", PNG, "image/png"), "mask": ("m", MASK_PNG)}
    response = httpx.post(f"{server.url}/generate", data=fields, files=files, timeout=60, verify=PLAIN)
    as_json = post(server, steps=2, strength=0.5, image=b64(PNG), mask=b64(MASK_PNG))
    assert response.status_code == 422  # size is text, and "null" is no size
    del fields["size"]
    response = httpx.post(f"{server.url}/generate", data=fields, files=files, timeout=60, verify=PLAIN)
    assert (drawn(response) == drawn(as_json)).all()


def test_a_bare_picture_tells_its_strength_too(server):
    body = {**ASK, "image": b64(PNG), "strength": 0.6}
    bare = httpx.post(f"{server.url}/generate", json=body, headers={"accept": "image/png"}, timeout=60, verify=PLAIN)
    assert bare.headers["x-strength"] == "0.5"
    assert "Denoising strength: 0.5" in Image.open(io.BytesIO(bare.content)).text["parameters"]


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return file(IMAGE.transpose(Image.Transpose.ROTATE_90), exif=exif)


SEE_THROUGH = IMAGE.convert("RGBA")
SEE_THROUGH.putalpha(MASK)
GREY = IMAGE.convert("L")
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("data", "like"),
    [
        (file(IMAGE, "WEBP", lossless=True), IMAGE),
        (oriented(6), IMAGE),  # 6: shown rotated by 90 degrees clockwise
        (file(SEE_THROUGH), Image.composite(IMAGE, Image.new("RGB", IMAGE.size, "white"), MASK)),
        (file(GREY), GREY.convert("RGB")),
        (file(DEEP), GREY.convert("RGB")),
        (file(IMAGE.quantize(64)), IMAGE.quantize(64).convert("RGB")),
        (file(IMAGE, "JPEG", quality=95), Image.open(io.BytesIO(file(IMAGE, "JPEG", quality=95)))),
        (file(IMAGE.convert("CMYK"), "JPEG"), Image.open(io.BytesIO(file(IMAGE.convert("CMYK"), "JPEG")))),
    ],
    ids=["webp", "exif", "alpha", "grey", "grey of 16 bits", "palette", "jpeg", "cmyk"],
)
def test_every_kind_of_file_is_seen_as_it_is_shown(server, data, like):
    ours, plain = (
        drawn(post(server, steps=1, strength=0.25, image=b64(each))) for each in (data, file(like.convert("RGB")))
    )
    assert (ours == plain).all()


def bomb(width: int, height: int) -> bytes:
    """A PNG of that many pixels, of one colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 22), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan many times over."""
    jpeg = file(IMAGE, "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:start] + jpeg[start:-2] * count + b"\xff\xd9"


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(3):
        info.add_text(f"k{number}", "x" * (2 << 20), zip=True)
    return file(IMAGE, pnginfo=info)


ANIMATED = [file(IMAGE, kind, save_all=True, append_images=[GREY.convert("RGB")]) for kind in ("WEBP", "PNG")]
HALF = Image.new("L", (128, 128))
HALF.putpixel((3, 3), 255)  # between the pixels that the model looks at

BAD_PICTURES = [
    ("image", {"image": ""}),
    ("image", {"image": "%%%"}),
    ("image", {"image": "https://example.com/x.png"}),
    ("image", {"image": "data:image/png;base64," + b64(PNG)}),
    ("image", {"image": 7}),
    ("image", {"image": [b64(PNG)]}),
    ("image", {"image": b64(b"\x89PNG\r\n\x1a\n")}),
    ("image", {"image": b64(PNG[:-3000])}),
    ("image", {"image": b64(file(IMAGE, "JPEG")[:-500])}),
    ("image", {"image": b64(file(IMAGE, "WEBP")[:-100])}),
    ("image", {"image": b64(PNG[:60] + b"\xff" * 40 + PNG[100:])}),
    ("image", {"image": b64(file(IMAGE, "GIF"))}),
    ("image", {"image": b64(file(IMAGE, "BMP"))}),
    ("image", {"image": b64(file(IMAGE, "TIFF"))}),
    ("image", {"image": b64(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>")}),
    ("image", {"image": b64(ANIMATED[0])}),
    ("image", {"image": b64(ANIMATED[1])}),
    ("image", {"image": b64(bomb(100_000, 100_000))}),
    ("image", {"image": b64(bomb(4096, 4097))}),
    ("image", {"image": b64(bomb(2**31 - 1, 2**31 - 1))}),
    ("image", {"image": b64(scans(101))}),
    ("image", {"image": b64(text_bomb())}),
    ("image", {"image": b64(file(IMAGE.resize((64, 64))))}),
    ("image", {"image": b64(file(IMAGE.resize((128, 120))))}),
    ("width", {"image": b64(file(IMAGE.resize((64, 64)))), "width": 64, "height": 64}),
    ("image", {"image": b64(file(IMAGE.resize((64, 64)))), "width": 128, "height": 128}),
    ("mask", {"mask": b64(MASK_PNG)}),
    ("mask", {"image": b64(PNG), "mask": b64(file(MASK.resize((64, 64))))}),
    ("mask", {"image": b64(PNG), "mask": b64(file(Image.new("L", (128, 128))))}),
    ("mask", {"image": b64(PNG), "mask": b64(file(Image.new("L", (128, 128), 127)))}),
    ("mask", {"image": b64(PNG), "mask": b64(file(HALF))}),
    ("mask", {"image": b64(PNG), "mask": b64(file(SEE_THROUGH))}),
    ("mask", {"image": b64(PNG), "mask": b64(MASK_PNG[:-80])}),
    ("strength", {"strength": 0.5}),
    ("strength", {"image": b64(PNG), "strength": 0}),
    ("strength", {"image": b64(PNG), "strength": 1.01}),
    ("strength", {"image": b64(PNG), "strength": "0.5"}),
    ("strength", {"image": b64(PNG), "strength": True}),
    ("strength", {"image": b64(PNG), "strength": 0.2}),
    ("strength", {"image": b64(PNG), "strength": 0.12, "steps": 8}),
    ("strength", {"image": b64(PNG), "strength": 0.24, "steps": 1}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_PICTURES)
def test_a_bad_picture_is_a_422_that_names_its_field(server, field, fields):
    response = post(server, **fields)
    assert (response.status_code, response.json().get("field")) == (422, field), response.text


def test_a_strength_below_the_first_start_is_told_what_is_possible(server):
    assert "0.25, 0.5, 0.75, 1" in post(server, image=b64(PNG), strength=0.1).json()["detail"]


def form(*parts: tuple[str, str, bytes], boundary: str = "xyz", end: str = "--") -> tuple[bytes, dict[str, str]]:
    """name, the rest of its Content-Disposition, value."""
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{rest}\r\n\r\n'.encode() + value + b"\r\n"
        for name, rest, value in parts
    )
    return body + f"--{boundary}{end}\r\n".encode(), {"content-type": f"multipart/form-data; boundary={boundary}"}


PROMPT_PART = ("prompt", "", b"a red apple")
IMAGE_PART = ("image", '; filename="x.png"', PNG)


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("prompt", [PROMPT_PART, PROMPT_PART]),
        ("image", [PROMPT_PART, IMAGE_PART, IMAGE_PART]),
        ("nothing", [PROMPT_PART, ("nothing", "", b"")]),
        ("pictures", [PROMPT_PART, ("pictures", '; filename="x"', PNG)]),
        ("prompt", [IMAGE_PART]),
        ("prompt", [("prompt", '; filename="x"', b"a red apple")]),
        ("prompt", [("prompt", "", b"caf\xe9")]),
        ("steps", [PROMPT_PART, ("steps", "", b"4.0")]),
        ("steps", [PROMPT_PART, ("steps", "", b"four")]),
        ("steps", [PROMPT_PART, ("steps", "", b"true")]),
        ("steps", [PROMPT_PART, ("steps", "", b"")]),
        ("seed", [PROMPT_PART, ("seed", "", b'"7"')]),
        ("strength", [PROMPT_PART, IMAGE_PART, ("strength", "", b"NaN")]),
        ("image", [PROMPT_PART, ("image", "", b"not base64")]),
    ],
)
def test_a_form_is_as_strict_as_json(server, field, parts):
    body, headers = form(*parts)
    response = httpx.post(f"{server.url}/generate", content=body, headers=headers, timeout=60, verify=PLAIN)
    assert (response.status_code, response.json().get("field")) == (422, field), response.text


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", form()[1]),
        form(PROMPT_PART, end=""),
        (form(PROMPT_PART)[0], {"content-type": "multipart/form-data"}),
        (form(PROMPT_PART)[0], {"content-type": "multipart/form-data; boundary=other"}),
        form(PROMPT_PART, boundary="x" * 300),
        form(PROMPT_PART, *[(f"f{k}", "", b"1") for k in range(65)]),
        (form(PROMPT_PART)[0].replace(b' name="prompt"', b""), form()[1]),
        form(("prompt", "\r\nContent-Transfer-Encoding: uuencode", b"x")),
    ],
)
def test_what_is_no_whole_form_is_a_422(server, body, headers):
    response = httpx.post(f"{server.url}/generate", content=body, headers=headers, timeout=60, verify=PLAIN)
    assert response.status_code == 422, response.text


def test_a_large_body_holds_no_more_values_than_a_small_one(server):
    body = b'{"prompt": "x", "image": "", "n": [' + b"1," * 70_000 + b"1]}"
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/generate", content=body, headers=headers, timeout=60, verify=PLAIN)
    assert (response.status_code, "too many values" in response.text) == (422, True)


def test_a_bad_picture_takes_no_neighbour_with_it_and_none_is_on_disk_or_in_the_log(server):
    assert post(server, image=b64(PNG), steps=1).status_code == 200
    assert b64(PNG)[:40] not in server.log.read_text()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "https://behind.a.proxy", "sec-fetch-site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_a_form_of_a_foreign_page_which_no_browser_asks_about_first_is_refused(server, sent, status):
    body, headers = form(PROMPT_PART, ("steps", "", b"1"))
    response = httpx.post(f"{server.url}/generate", content=body, headers={**headers, **sent}, timeout=60, verify=PLAIN)
    assert response.status_code == status


def test_a_form_of_the_servers_own_page_is_served(server):
    body, headers = form(PROMPT_PART, ("steps", "", b"1"))
    own = {**headers, "origin": server.url}
    response = httpx.post(f"{server.url}/generate", content=body, headers=own, timeout=60, verify=PLAIN)
    assert response.status_code == 200
