"Generated traffic signs: three classes with free captions, as a newcomer's own data."

import csv
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

RED = (190, 20, 30)
CAPTIONS = dict(
    stop=("A stop sign, red with eight sides.", "Stop: a red sign with a white band."),
    limit=("A limit sign, a white circle.", "Speed limit: a circle with a red edge."),
)
CAPTIONS["yield"] = ("A yield sign, a white triangle.", "Yield: a triangle with a red edge.")


def _polygon(centre, radius, sides, turn):
    angles = [turn + 2 * math.pi * k / sides for k in range(sides)]
    x, y = centre
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def draw_sign(
    name,  # 'stop', 'yield' or 'limit'
    rng,  # of the `random` module: place, size and background
    size=96,
):
    "A sign somewhere on a plain background."
    background = tuple(rng.randint(90, 200) for _ in range(3))
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    x, y = (size / 2 + rng.randint(-10, 10) for _ in range(2))
    radius = rng.randint(24, 36)
    if name == "stop":
        draw.polygon(_polygon((x, y), radius, 8, math.pi / 8), fill=RED)
        band = (x - 0.6 * radius, y - 0.15 * radius, x + 0.6 * radius, y + 0.15 * radius)
        draw.rectangle(band, fill="white")
    elif name == "yield":
        draw.polygon(_polygon((x, y), radius, 3, math.pi / 2), fill="white", outline=RED, width=6)
    else:
        circle = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(circle, fill="white", outline=RED, width=7)
        draw.rectangle((x - 5, y - 10, x + 5, y + 10), fill="black")
    return image


def write_signs(
    folder,
    n=60,
    seed=0,
    name="signs.csv",
):  # the table's path: columns image, caption, label
    "Draw signs into a folder, with a table beside them."
    folder, rng = Path(folder), random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        label = list(CAPTIONS)[i % 3]
        file = f"images/{i:03}.png"
        draw_sign(label, rng).save(folder / file)
        rows.append((file, rng.choice(CAPTIONS[label]), label))
    with open(folder / name, "w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("image", "caption", "label"), *rows])
    return folder / name
