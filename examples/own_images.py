"""Trains on your own images: a folder for each class, of which a few images are labeled.

    python examples/own_images.py FOLDER [--train.steps=2000 ...]

FOLDER/CLASS/NAME.png are labeled images, FOLDER/unlabeled/NAME.png the others, of any size and
format. FOLDER.data becomes the dataset: 28 x 28, gray, a fifth of the labeled images for the test and
some for validation. Then a run trains on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sgan_dist import UserError, evaluate, load_config, prepare, train


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/own_images.py FOLDER [--SECTION.SETTING=VALUE ...]")
    folder, *settings = Path(sys.argv[1]), *sys.argv[2:]
    data = folder.with_name(f"{folder.name}.data")
    try:
        prepare(f"folder:{folder}", data, image_size=(28, 28), gray=True)
        config = load_config("digits", "--data.source=null", f"--data.root={data}", *settings)
        train(config)
        print(evaluate(config.directory).table())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":  # prepare may start processes, which import this file
    main()
