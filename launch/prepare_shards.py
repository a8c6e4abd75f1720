"""Prepare a dataset: python launch/prepare_shards.py --source digits --out data/digits."""

import sys

from sgan_dist.data.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
