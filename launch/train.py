"""Trains a semi-supervised GAN: accelerate launch launch/train.py --config configs/digits.yaml"""

import sys

from sgan_dist.preemption import catch_signals

catch_signals()  # before the heavy imports: a signal while they load must not be lost

from sgan_dist.trainer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
