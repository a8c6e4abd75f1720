"""Training from Python: a short run on the embedded digits, then its test error.

    python examples/api.py                                  # 200 steps, half a minute on 2 cores
    python examples/api.py --train.steps=50 --seed=1        # any setting, as for `sgan-dist train`

Call it twice: the second call finds the run finished and trains nothing.
"""

import logging
import sys

from sgan_dist import UserError, evaluate, load_config, train


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the progress of the run
    try:
        config = load_config("digits", "--train.steps=200", "--run_dir=runs/example", *sys.argv[1:])
        summary = train(config)
        print(f"test error after {summary['step']} steps: {summary['test_error']:.2%}")
        print(f"calibration error: {evaluate(config.directory).calibration_error:.2%}")
    except UserError as error:  # one sentence, with the fix
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
