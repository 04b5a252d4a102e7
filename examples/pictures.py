"""Ask about a picture, about two at once and about a clip. With a folder as argument, also save what is asked about."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from ernie45 import ErnieModel

PAPER, RED, BLUE = (248, 248, 248), (220, 30, 35), (40, 90, 225)
WIDTH, HEIGHT = 112, 84


def draw(shape: str, colour: tuple[int, int, int], x: float, y: float) -> Image.Image:
    """One shape with its centre at these shares of the width and height; at twice the size first, for smooth edges."""
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), PAPER)
    x, y, radius = 2 * WIDTH * x, 2 * HEIGHT * y, 0.34 * HEIGHT
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        side = 0.8 * radius
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    return image.reduce(2)


circle = draw("circle", RED, 0.17, 0.19)
square = draw("square", BLUE, 5 / 6, 1 / 2)
clip = [draw("square", BLUE, 0.2 + 0.11 * place, 1 / 2) for place in range(6)]

with ErnieModel.from_pretrained("ernie45/tiny-vl") as model:
    question = {"role": "user", "content": [circle, "What shape is this?"]}
    print(*model.preview([question]))
    reply = model.chat([question], temperature=0)
    print("shape:", reply.text)

    # The picture goes with the history, and is not encoded again.
    again = [question, reply.message, {"role": "user", "content": "Where is the shape?"}]
    print("place:", model.chat(again, temperature=0).text)

    both = {"role": "user", "content": [circle, square, "What colour is the shape in Picture 2?"]}
    print("second:", model.chat([both], temperature=0).text)

    moving = {"type": "video", "video": clip}
    print("clip: ", end="")
    for chunk in model.stream_chat(
        [{"role": "user", "content": [moving, "What moved, and which way?"]}], temperature=0
    ):
        print(chunk.text, end="", flush=True)
    print()

if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
    circle.save(folder / "circle.png")
    square.save(folder / "square.png")
    clip[0].save(folder / "clip.gif", save_all=True, append_images=clip[1:], duration=300, loop=0)
