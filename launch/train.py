"""`accelerate launch launch/train.py --config mnist`, the same as `sgan-dist train --config mnist`."""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # noqa: PTH109 - your modules come first, not this folder's files

    from sgan_dist.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
