"""``mirip-fast demo``: the whole tool on generated pictures, without a download."""

from __future__ import annotations

import colorsys
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.files import write_csv

from .options import PATH

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_COMMANDS = (
    ("embed", "data", "--backbone", "tiny-random", "--image-size", "224"),
    ("train", "--head-only", "--name", "demo"),
    ("evaluate",),
    ("rank", "portfolio", "--html", "report.html"),
)

TIERS = ("S", "A", "B", "C")
_SHARES = (0.15, 0.30, 0.35, 0.20)
_KOREAN = ("정물", "풍경", "추상", "습작")


@click.command("demo")
@click.argument("folder", type=PATH, default=Path("demo"))
@click.pass_context
def demo_command(context: click.Context, folder: Path) -> None:
    """Make a small sample portfolio in FOLDER and run embed, train, evaluate and rank on it.

    Uses the built-in untrained backbone: it shows how the tool works, not what it can do. FOLDER/report.html
    is the page to look at.
    """
    from mirip_fast.errors import DataError

    if folder.exists() and any(folder.iterdir()) and not (folder / "data").is_dir():
        raise DataError(
            f"{folder} holds something else; give another folder: mirip-fast demo FOLDER"
        )
    started = time.monotonic()
    click.echo(f"Drawing sample pictures in {folder}/data and {folder}/portfolio …")
    click.echo(
        "The better the tier, the cleaner the colours and the less noise: even an untrained backbone tells\n"
        "these apart, so the accuracy below is high. It says nothing about works that people graded."
    )
    make_sample(folder / "data")
    make_portfolio(folder / "portfolio")
    group = context.find_root().command
    before = Path.cwd()
    os.chdir(folder)
    try:
        for arguments in _COMMANDS:
            click.secho(f"\n$ mirip-fast {' '.join(arguments)}", bold=True)
            group.main(list(arguments), prog_name="mirip-fast", standalone_mode=False)
    finally:
        os.chdir(before)
    click.echo(f"\nThe demo took {time.monotonic() - started:.0f} s. Everything is in {folder}/.")
    click.echo(f"Look at the sorted pictures: open {folder}/report.html in a browser.")
    click.echo(
        "Go on with your own works: mirip-fast embed YOUR_FOLDER, in a folder of your choice."
    )


def make_sample(folder: Path, *, n: int = 240, seed: int = 0, size: int = 160) -> None:
    """Draw ``n`` graded pictures: ``images/`` and ``metadata.csv`` with tier, tier_score and group.

    Args:
        folder: made if missing; files of an earlier call are replaced.
        n: number of pictures; three of each invented artist at most share a group.
        seed: another seed draws other pictures.
        size: side in pixels.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    tiers = rng.permutation(np.repeat(np.arange(4), _counts(n)))
    rows = []
    for number, tier in enumerate(tiers):
        quality = float(np.clip(1 - (tier + rng.uniform(0, 1)) / 4, 0, 1))
        korean = f"_{_KOREAN[number % 4]}" if number % 5 == 0 else ""
        name = f"work_{number:03d}{korean}.jpg"
        draw_picture(quality, rng, size).save(images / name, quality=92)
        rows.append(
            {
                "image_id": f"work_{number:03d}",
                "filename": name,
                "tier": TIERS[tier],
                "tier_score": f"{quality:.3f}",
                "group": f"artist_{number // 3:03d}",
            }
        )
    write_csv(folder / "metadata.csv", list(rows[0]), rows)


def make_portfolio(folder: Path, *, n: int = 12, seed: int = 1, size: int = 160) -> None:
    """Draw ``n`` ungraded pictures of all qualities; the file names tell nothing."""
    import numpy as np

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, quality in enumerate(rng.permutation(np.linspace(0.05, 0.95, n))):
        draw_picture(float(quality), rng, size).save(folder / f"piece_{number:02d}.jpg", quality=92)


def draw_picture(quality: float, rng: np.random.Generator, size: int) -> Image.Image:
    """A still life of shapes; ``quality`` in 0–1 is what a grader should see."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    hue = rng.uniform()
    image = Image.new("RGB", (size, size), _colour(hue, 0.25, 0.95 - 0.35 * (1 - quality)))
    canvas = ImageDraw.Draw(image)
    horizon = int(size * rng.uniform(0.55, 0.7))
    canvas.rectangle((0, horizon, size, size), fill=_colour(hue + 0.05, 0.45, 0.35 + 0.3 * quality))
    for _ in range(int(rng.integers(5, 9))):
        # Good pictures keep to neighbouring hues with one complement; bad ones take any, and muddy them.
        spread = rng.normal(0, 0.04 + 0.3 * (1 - quality)) + (0.5 if rng.uniform() < 0.2 else 0)
        value = np.clip(rng.normal(0.55, 0.08 + 0.25 * quality), 0.1, 1)
        fill = _colour(hue + spread, 0.25 + 0.6 * quality, float(value))
        radius = size * rng.uniform(0.06, 0.2)
        x, y = rng.uniform(0.1, 0.9) * size, horizon + rng.uniform(-0.25, 0.15) * size
        box = (x - radius, y - radius, x + radius, y + radius)
        shape = rng.integers(3)
        if shape == 0:
            canvas.ellipse(box, fill=fill)
        elif shape == 1:
            canvas.rectangle(box, fill=fill)
        else:
            canvas.polygon(
                (x, y - radius, x + radius, y + radius, x - radius, y + radius), fill=fill
            )
    image = image.filter(ImageFilter.GaussianBlur(2.5 * (1 - quality)))
    noise = rng.normal(0, 4 + 26 * (1 - quality), (size, size, 1))
    pixels = np.clip(np.asarray(image, dtype=np.float32) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _counts(n: int) -> list[int]:
    counts = [max(2, round(n * share)) for share in _SHARES]
    counts[2] += n - sum(counts)
    return counts


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(1, saturation), min(1, value))
    return round(red * 255), round(green * 255), round(blue * 255)
