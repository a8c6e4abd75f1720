"""Networks: the contract, initial values, noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgan_dist.errors import UserError
from sgan_dist.gan.models import build_discriminator, build_generator
from sgan_dist.gan.models.base import data_dependent_init, dropout, gaussian_noise, normed
from sgan_dist.parallel.engine import frozen
from sgan_dist.parallel.random import GlobalRandom

CPU = torch.device("cpu")


def discriminator_of(
    name: str, image_chw: tuple[int, int, int], outputs: int, args: dict[str, Any]
) -> Any:
    """`build_discriminator`, untyped, for access to a network's own layers."""
    return build_discriminator(name, image_chw, outputs, args)


def generator_of(name: str, image_chw: tuple[int, int, int], args: dict[str, Any]) -> Any:
    """`build_generator`, untyped."""
    return build_generator(name, image_chw, args)


def an_rng(n: int) -> GlobalRandom:
    return GlobalRandom(0, "test", 0, {"all": range(n)}, CPU)


@pytest.mark.parametrize(
    ("discriminator", "generator"),
    [("tutorial", "tutorial"), ("conv_small", "dcgan"), ("dcgan", "dcgan"), ("mlp", "mlp")],
)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_pairs_keep_the_contract(
    discriminator: str, generator: str, shape: tuple[int, int, int]
) -> None:
    d = discriminator_of(discriminator, shape, 11, {})
    g = generator_of(generator, shape, {})
    images = g(g.latent(an_rng(6)))
    assert images.shape == (6, *shape) and images.abs().max() <= 1
    logits, features = d(images, an_rng(6))
    assert logits.shape == (6, 11) and len(features) == 6 and features.dim() == 2


@pytest.mark.parametrize("family", ["conv_small", "dcgan"])
def test_joining_batches_changes_nothing_for_the_discriminator(family: str) -> None:
    d = discriminator_of(family, (1, 28, 28), 10, {"width": 4}).double()
    images = torch.rand(8, 1, 28, 28, dtype=torch.float64)
    joined = d(images).logits
    apart = torch.cat([d(images[:3]).logits, d(images[3:]).logits])
    assert torch.allclose(joined, apart, atol=1e-14)


@pytest.mark.parametrize("family", ["conv_small", "dcgan"])
def test_all_randomness_comes_from_the_rng(family: str) -> None:
    d = discriminator_of(family, (1, 28, 28), 10, {"width": 4})
    images = torch.rand(8, 1, 28, 28)
    assert torch.equal(d(images).logits, d(images).logits)
    assert torch.equal(d(images, an_rng(8)).logits, d(images, an_rng(8)).logits)
    assert not torch.equal(d(images, an_rng(8)).logits, d(images).logits)


def test_conv_small_is_the_papers_but_for_its_width() -> None:
    d = discriminator_of("conv_small", (3, 32, 32), 10, {"width": 96})
    layers = [
        d.conv1,
        *(m for b in (d.block1, d.block2, d.block3) for m in b if hasattr(m, "weight")),
    ]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (96, 3, 3, 3), (96, 96, 3, 3), (96, 96, 3, 3),
        (192, 96, 3, 3), (192, 192, 3, 3), (192, 192, 3, 3),
        (192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1),
    ]  # fmt: skip
    with pytest.raises(UserError, match="9x9 pixels or more, and the dataset's are 8x32"):
        discriminator_of("conv_small", (1, 8, 32), 10, {})


@pytest.mark.parametrize("noisy", [False, True])
def test_data_dependent_init_standardizes_every_layer(noisy: bool) -> None:
    d = discriminator_of("dcgan", (1, 28, 28), 10, {"width": 4})
    images = torch.rand(200, 1, 28, 28) * 2 - 1

    def rng() -> GlobalRandom | None:
        rows = {"all": range(200)}
        return GlobalRandom(0, "init", 0, rows, torch.device("cpu")) if noisy else None

    data_dependent_init(d, images, rng())
    outputs: list[Tensor] = []
    for layer in (d.conv1, d.conv4, d.head):
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
    d(images, rng())
    for out in outputs:
        axes = [a for a in range(out.dim()) if a != 1]
        assert torch.allclose(out.mean(axes), torch.zeros(out.shape[1]), atol=1e-4)
        assert torch.allclose(out.std(axes), torch.ones(out.shape[1]), atol=1e-2)


def test_init_leaves_other_layers_alone() -> None:
    from torch.nn.utils.parametrizations import spectral_norm

    network: Any = nn.Sequential(
        spectral_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), normed(nn.Linear(2704, 5, bias=False))
    )
    before = network[0].parametrizations.weight.original.clone()
    images = torch.rand(50, 1, 28, 28)
    data_dependent_init(network.eval(), images)
    assert torch.equal(network[0].parametrizations.weight.original, before)
    assert torch.allclose(network(images).std(0, correction=0), torch.ones(5), atol=1e-4)


def test_the_improved_gan_trains_scales_in_the_last_layer_only() -> None:
    d = discriminator_of("mlp", (1, 28, 28), 10, {"sizes": (30, 20)})
    frozen = [name for name, p in d.named_parameters() if not p.requires_grad]
    assert frozen == [f"layers.{i}.parametrizations.weight.original0" for i in range(2)]


def test_the_improved_gan_starts_with_rows_as_long_as_the_papers() -> None:
    d = discriminator_of("mlp", (1, 28, 28), 10, {})
    for layer in (*d.layers, d.head):
        rows = layer.parametrizations.weight.original1.norm(dim=1)
        assert torch.allclose(rows.mean(), torch.tensor(0.1 * layer.in_features**0.5), rtol=0.05)


def test_the_tutorials_batch_norm_normalizes_parts_separately() -> None:
    d = discriminator_of("tutorial", (1, 28, 28), 10, {"dropout": 0}).double()
    real = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    fakes = 5 * torch.rand(4, 1, 28, 28, dtype=torch.float64)
    joined = GlobalRandom(0, "x", 0, {"unlabeled": range(6), "fake": range(4)}, CPU)
    both = d(torch.cat([real, fakes]), joined).logits
    averages = d.norm2.running_mean.clone()
    separate = d(real, GlobalRandom(0, "x", 0, {"unlabeled": range(6)}, CPU)).logits
    assert torch.allclose(both[:6], separate)
    # running averages follow the real part, and stand still in a frozen network
    fresh = discriminator_of("tutorial", (1, 28, 28), 10, {"dropout": 0}).double()
    fresh.load_state_dict(d.state_dict())
    with frozen(fresh):
        fresh(real, GlobalRandom(0, "x", 0, {"unlabeled": range(6)}, CPU))
    assert torch.equal(fresh.norm2.running_mean, d.norm2.running_mean)
    assert not torch.equal(averages, d.norm2.running_mean)


def test_freezing_restores_what_was_trained() -> None:
    d = discriminator_of("mlp", (1, 28, 28), 10, {"sizes": (30, 20)})
    before = [p.requires_grad for p in d.parameters()]
    with frozen(d):
        assert not any(p.requires_grad for p in d.parameters())
    assert [p.requires_grad for p in d.parameters()] == before


def test_noise_and_dropout() -> None:
    x = torch.ones(2000, 10)
    assert gaussian_noise(x, 0.3, None) is x and dropout(x, 0.3, None) is x
    noisy = gaussian_noise(x, 0.3, an_rng(2000))
    assert abs((noisy - x).std() - 0.3) < 0.01
    dropped = dropout(x, 0.25, an_rng(2000))
    assert abs((dropped == 0).float().mean() - 0.25) < 0.02
    assert torch.allclose(dropped[dropped > 0], torch.tensor(1 / 0.75))


def test_a_users_own_model_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_network.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self, image_chw, outputs, depth):\n"
        "        super().__init__()\n"
        "        self.depth = depth\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert discriminator_of("user_network:Own", (1, 28, 28), 10, {"depth": 3}).depth == 3


def test_the_generator_says_which_sizes_it_makes() -> None:
    with pytest.raises(UserError, match="divisible by 4"):
        generator_of("dcgan", (1, 30, 30), {})
