"""The gate: each mistake in a user's network is one sentence, before a run begins."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sgan_dist.config import Config, load_config
from sgan_dist.errors import UserError
from sgan_dist.gan.gate import check_networks
from sgan_dist.gan.models import DISCRIMINATORS
from sgan_dist.parallel.backends import open_backend
from tests.gan import odd_networks

HWC = (28, 28, 1)


def config_for(*options: str) -> Config:
    return load_config("digits", "--run_dir=unused", *options)


def own(part: str, name: str) -> tuple[str, str]:
    return f"--model.{part}=tests.gan.odd_networks:{name}", f"--model.{part}_args={{}}"


def check(*options: str, hwc: tuple[int, int, int] = HWC) -> None:
    config = config_for(*options)
    check_networks(config, hwc, 10, open_backend(config))


def generators() -> tuple[object, str]:
    """The states of Python's and numpy's random generators."""
    return random.getstate(), str(np.random.get_state(legacy=False))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ReturnsATuple", r"ReturnsATuple returns a tuple, and must return .*DiscriminatorOutput"),
        ("ReturnsLogits", r"returns a tensor \(6, 10\), and must return .*DiscriminatorOutput"),
        ("TakesNoRng", r"TakesNoRng.forward must take \(images, rng\), and does not"),
        ("NeedsRng", r"NeedsRng.forward must take \(images\), and does not .*rng"),
        ("OneLogitTooFew", r"logits \(6, 9\) for 6 images, and must return \(6, 10\)"),
        ("FeatureMaps", r"features \(6, 8, 6, 6\) for 6 images, .*average or flatten"),
        ("Lazy", r"Lazy has lazy layers, .*give their sizes"),
        ("LegacyWeightNorm", r"cannot be copied.*parametrizations\.weight_norm in place of"),
        ("TorchDropout", r"draws random numbers from torch's own generator.*`rng` of forward"),
        ("DropoutInEvaluation", r"torch's own generator.*leave them out in evaluation"),
        ("StochasticDepth", r"draws random numbers from Python's own generator"),
        ("NumpyNoise", r"draws random numbers from numpy's own generator"),
        ("CountsForwards", r"gives two outputs for the same inputs and random numbers"),
        ("TorchBatchNorm", r"depends on the other images of the batch.*GlobalBatchNorm"),
        ("MinibatchDiscrimination", r"depends on the other images of the batch"),
        ("ZeroInit", r"depends on the other images of the batch"),
        ("RunningSum", r"depends on the other images of the batch"),
        ("CentersInEvaluation", r"depends on the other images of the batch"),
        ("OnlyGetsState", r"has get_extra_state but no set_extra_state"),
        ("HoldsALock", r"cannot be copied, .* lock"),
        ("Unused", r"does not use its parameters forgotten\.weight, forgotten\.bias: remove"),
        ("NoGradient", r"passes no gradient to its inputs"),
        ("PickledState", r"get_extra_state gives a set as _extra_state.*without pickle"),
    ],
)
def test_a_mistake_in_a_discriminator_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(*own("discriminator", name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoLatent", r"NoLatent has no method latent\(rng\).*rng\.normal"),
        ("FlatLatent", r"FlatLatent.latent returns a tensor \(10,\), and must return a tensor"),
        ("TorchLatent", r"torch's own generator.*take them from the `rng` of latent"),
        ("ChannelsLast", r"returns a tensor \(2, 28, 28, 1\).*must return images \(2, 1, 28, 28\)"),
        ("Unbounded", r"returns values that are not in \[-1, 1\].*tanh"),
        ("NoisyGenerator", r"torch's own generator.*draw them in latent\(rng\)"),
        ("BatchNormGenerator", r"depends on the other images of the batch.*GlobalBatchNorm"),
        ("ZeroInitGenerator", r"depends on the other images of the batch"),
        ("UnusedInGenerator", r"does not use its parameters forgotten\.weight"),
    ],
)
def test_a_mistake_in_a_generator_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(*own("generator", name))


@pytest.mark.parametrize(
    "name",
    ["Plain", "Counting", "Tied", "ExtraState", "TensorState", "Spectral", "Half", "Compiled",
     "OwnBatchNorm", "OtherTuple"],
)  # fmt: skip
def test_an_odd_network_passes_and_moves_no_generator(name: str) -> None:
    config = config_for(*own("discriminator", name), *own("generator", "PlainGenerator"))
    before = generators()
    check_networks(config, HWC, 10, open_backend(config))
    assert generators() == before


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("form", ["implied", "explicit"])
def test_the_networks_of_this_package_pass(name: str, form: str) -> None:
    network = (f"--model.discriminator={name}", "--model.discriminator_args={}")
    check(*network, f"--loss.form={form}", hwc=(32, 32, 3))


def test_half_precision_parameters_are_said_to_be_trained_in_full(
    log: pytest.LogCaptureFixture,
) -> None:
    check(*own("discriminator", "Half"))
    assert "Half has parameters of torch.float16: they are trained in torch.float32" in log.text


def test_an_error_in_a_network_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match=r"helper\(\) takes 1 positional argument") as error:
        check(*own("discriminator", "Buggy"))
    assert Path(error.traceback[-1].path).name == Path(odd_networks.__file__).name


def test_batch_norm_in_d_is_refused_with_accumulation() -> None:
    with pytest.raises(
        UserError, match=r"batch\.accumulation is 2, and the discriminator has batch"
    ):
        check(*own("discriminator", "OwnBatchNorm"), "--batch.accumulation=2")


def test_a_module_that_seeds_at_import_changes_no_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_that_seeds.py").write_text(
        "import random, numpy, torch\n"
        "random.seed(0), numpy.random.seed(0), torch.manual_seed(0)\n"
        "from tests.gan.odd_networks import Plain\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = ("--model.discriminator=own_that_seeds:Plain", "--model.discriminator_args={}")
    config = config_for(*name, "--seed=5")
    before = generators()
    check_networks(config, HWC, 10, open_backend(config))
    assert generators() == before
    assert torch.initial_seed() == 5


def test_a_module_that_parses_arguments_at_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_script.py").write_text(
        "import argparse\nargparse.ArgumentParser().parse_args(['-x'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"own_script\.py ends the program when it is imported"):
        check("--model.discriminator=own_script:D", "--model.discriminator_args={}")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("raise SystemExit(2)\n")
    with pytest.raises(UserError, match=r"own_package/__init__\.py ends the program"):
        check("--model.discriminator=own_package.net:D", "--model.discriminator_args={}")


def test_a_name_that_another_file_has_is_shown_with_that_file() -> None:
    with pytest.raises(UserError, match=r"wave has no class D: it is .*wave\.py; .*rename yours"):
        check("--model.discriminator=wave:D", "--model.discriminator_args={}")


def test_a_network_that_needs_images_is_refused_where_a_rank_has_none() -> None:
    config = config_for(*own("discriminator", "NeedsImages"), "--batch.fake=7")
    backend = open_backend(config)
    check_networks(config, HWC, 10, backend)
    backend.world_size = 8
    with pytest.raises(UserError, match=r"NeedsImages fails on a batch of 0 images .*give larger"):
        check_networks(config, HWC, 10, backend)


@pytest.mark.slow
def test_the_networks_of_this_package_need_no_images() -> None:
    for name in ("dcgan", "mlp", "tutorial", "conv_small"):
        generator = "dcgan" if name == "conv_small" else name
        pair = (f"--model.discriminator={name}", f"--model.generator={generator}")
        empty = ("--model.discriminator_args={}", "--model.generator_args={}")
        config = config_for(*pair, *empty, "--batch.fake=7")
        backend = open_backend(config)
        backend.world_size = 8
        check_networks(config, HWC, 10, backend)
