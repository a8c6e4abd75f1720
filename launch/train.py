"""`accelerate launch launch/train.py --config mnist`, the same as `sgan-dist train --config mnist`."""

import sys

from sgan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
