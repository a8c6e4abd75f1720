"""Compares finished runs in a table, a CSV file and a plot: python launch/collect.py RUNS..."""

import sys

from sgan_dist.collect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
