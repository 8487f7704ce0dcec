"""python -m bench.sheet: docs/sheet.png, what can be asked for, drawn over HTTP."""

import base64
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw

from tests.conftest import ROOT, ServerProcess

SIDE, TEXT, GAP = 128, 14, 8  # pixels
APPLE = {"prompt": "a red apple on a blue background", "seed": 7}
PIZZA = {"prompt": "a slice of pizza on a teal background", "seed": 3}
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # the grid of 4 steps
SCALES = (0.4, 0.7, 1.0, 1.3)
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
Cell = tuple[str, Image.Image]


def main() -> None:
    """Draw it."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"CATALOG": str(ROOT / "docs" / "models.example.toml"), "MODEL": "example"}
        with ServerProcess(Path(folder) / "log", COMPILE="1", **settings) as server:
            _sheet(_rows(server.url)).save(ROOT / "docs" / "sheet.png", optimize=True)


def _rows(url: str) -> list[list[Cell]]:
    def draw(caption: str, **fields: Any) -> Cell:
        answer = httpx.post(f"{url}/generate", json=fields, timeout=120)
        answer.raise_for_status()
        return caption, Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["b64_json"])))

    plain = draw("plain, 4 steps", **APPLE, steps=4)
    image, mask = plain[1], Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((28, 28, 100, 100), fill=255)
    over = {"image": _base64(image)}
    return [
        [plain, draw("6 steps", **APPLE, steps=6)]
        + [draw(f"{name}, 8 steps", **APPLE, variant=name, steps=8) for name in ("ancestral", "karras")],
        *_styled(url, draw),
        [("over this", image), *(draw(f"strength {each:g}", **PIZZA, **over, strength=each) for each in STRENGTHS)],
        [("over this", image), ("mask", mask), draw("inpainted", **PIZZA, **over, mask=_base64(mask))],
        [draw(f"guidance {each:g}", **PIZZA, guidance_scale=each) for each in GUIDANCE]
        + [draw("3, and not teal", **PIZZA, guidance_scale=3, negative_prompt="a teal background")],
    ]


def _styled(url: str, draw: Callable[..., Cell]) -> list[list[Cell]]:
    names = [each["id"] for each in httpx.get(f"{url}/v1/loras", timeout=60).json()["data"]]
    return [
        [draw(f"{name} {scale:g}", **APPLE, loras=[{"name": name, "scale": scale}]) for scale in SCALES]
        for name in names
    ]


def _base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    wide, high = SIDE + GAP, SIDE + TEXT + GAP
    sheet = Image.new("RGB", (max(map(len, rows)) * wide + GAP, len(rows) * high + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (caption, image) in enumerate(cells):
            left, top = GAP + column * wide, GAP + row * high
            pen.text((left, top), caption, "black")
            sheet.paste(image, (left, top + TEXT))
    return sheet


if __name__ == "__main__":
    main()
