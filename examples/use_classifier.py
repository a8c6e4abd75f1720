"""Classifies image files with the classifier of a finished run.

    python examples/use_classifier.py runs/digits/classifier.safetensors digit.png other.png

Prints the class and its probability for each file. Images of another size
are scaled and cropped as `sgan-dist prepare --image_size` does it.
"""

import sys
from pathlib import Path

import numpy as np

from sgan_dist import UserError, load_classifier
from sgan_dist.data.images import decode


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/use_classifier.py CLASSIFIER IMAGE...")
    path, *files = sys.argv[1:]
    try:
        classifier = load_classifier(path)
    except UserError as error:
        sys.exit(f"error: {error}")
    channels, height, width = classifier.image_chw
    images = [
        decode(Path(file).read_bytes(), (height, width, channels), "shorter") for file in files
    ]
    probabilities = classifier.predict(np.stack(images))  # uint8 (n, H, W, C) -> (n, N)
    for file, p in zip(files, probabilities, strict=True):
        print(f"{file}: {classifier.class_names[int(p.argmax())]} ({float(p.max()):.1%})")


if __name__ == "__main__":
    main()
