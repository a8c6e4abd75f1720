"""Classifies image files with the classifier of a finished run.

    python examples/use_classifier.py runs/digits/classifier.safetensors digit.png other.png

Prints the class and its probability for each file. Images of another size are scaled.
"""

import sys

import numpy as np
from PIL import Image

from sgan_dist import UserError, load_classifier


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/use_classifier.py CLASSIFIER IMAGE...")
    path, *files = sys.argv[1:]
    try:
        classifier = load_classifier(path)
    except UserError as error:
        sys.exit(f"error: {error}")
    channels, height, width = classifier.image_chw
    images = np.stack([read(file, channels, height, width) for file in files])
    probabilities = classifier.predict(images)  # uint8 (n, H, W, C) -> (n, N)
    for file, p in zip(files, probabilities, strict=True):
        print(f"{file}: {classifier.class_names[int(p.argmax())]} ({float(p.max()):.1%})")


def read(file: str, channels: int, height: int, width: int) -> np.ndarray:
    """An image file as uint8 (H, W, C)."""
    image = Image.open(file).convert("L" if channels == 1 else "RGB").resize((width, height))
    return np.asarray(image).reshape(height, width, channels)


if __name__ == "__main__":
    main()
