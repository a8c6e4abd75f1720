"""Trains on your own images: a folder for each class, of which a few images are labeled.

    python examples/own_images.py FOLDER [--train.steps=2000 ...]

FOLDER/CLASS/NAME.png (or .jpg) are labeled images, FOLDER/unlabeled/NAME.png the others, of any size.
They become WebDataset tars in FOLDER.tars, a tenth of the labeled images for validation and a tenth
for the test; the index in FOLDER.data scales them to 28 x 28, gray. Then a run trains on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from webdataset.writer import TarWriter

from sgan_dist import UserError, evaluate, index_shards, load_config, train

SUFFIXES = (".png", ".jpg", ".jpeg")


def write_tar(path: Path, images: list[tuple[Path, int | None]]) -> str:
    """Writes images with their class numbers, or None, as a WebDataset tar; returns its path."""
    with TarWriter(str(path), encoder=False, mtime=0) as writer:  # same images, same bytes
        for number, (image, label) in enumerate(images):
            extension = image.suffix.lower().removeprefix(".")
            sample = {"__key__": f"{number:06d}", extension: image.read_bytes()}
            if label is not None:
                sample["cls"] = str(label).encode()
            writer.write(sample)
    return str(path)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/own_images.py FOLDER [--SECTION.SETTING=VALUE ...]")
    folder, *settings = Path(sys.argv[1]), *sys.argv[2:]
    tars, data = folder.with_name(f"{folder.name}.tars"), folder.with_name(f"{folder.name}.data")
    tars.mkdir(exist_ok=True)
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in SUFFIXES)
    names = sorted({file.parent.name for file in files} - {"unlabeled"})
    (tars / "classes.txt").write_text("\n".join(names) + "\n")
    images = [
        (file, None if file.parent.name == "unlabeled" else names.index(file.parent.name))
        for file in files
    ]
    labeled = [image for image in images if image[1] is not None]
    held_out = labeled[::5]  # every fifth of each class, as they are sorted
    training = [image for image in images if image not in held_out]

    def patterns(name: str, part: list[tuple[Path, int | None]]) -> list[str]:
        return [write_tar(tars / f"{name}.tar", part)]

    try:
        index_shards(
            unlabeled=patterns("unlabeled", training),
            labeled=patterns("labeled", [image for image in training if image[1] is not None]),
            validation=patterns("validation", held_out[::2]),
            test=patterns("test", held_out[1::2]),
            out=data,
            image_size=28,
            gray=True,
            class_names=tars / "classes.txt",
        )
        config = load_config("digits", "--data.source=null", f"--data.root={data}", *settings)
        train(config)
        print(evaluate(config.directory).table())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":  # index_shards starts processes, which import this file
    main()
