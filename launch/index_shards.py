"""Index tars: python launch/index_shards.py PATTERN ... --labeled PATTERN ... --out DIR"""

import sys

from sgan_dist.data.tars import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
