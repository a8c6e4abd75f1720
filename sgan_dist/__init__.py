"""Distributed semi-supervised GAN training: the discriminator is the classifier that is kept.

Importing this package is free of heavy imports, so that signal handlers can be installed first.
The entry points are `sgan_dist.config.parse` and `sgan_dist.trainer.fit`.
"""

__version__ = "0.1.0"
