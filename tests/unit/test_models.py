"""Networks: the contract, batch norm, first values, noise, averaging, augmentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sgan_dist import ema
from sgan_dist.augment import augment
from sgan_dist.config import AugmentConfig, EmaConfig
from sgan_dist.distributed import GlobalBatchNorm
from sgan_dist.errors import UserError
from sgan_dist.models import build_discriminator, build_generator
from sgan_dist.models.base import data_dependent_init, dropout, gaussian_noise, normed
from sgan_dist.noise import Draw, Rows
from sgan_dist.players import frozen

CPU = torch.device("cpu")


def a_draw(n: int) -> Draw:
    return Draw(0, "test", 0, {"all": Rows.of(n, 0, 1)}, CPU)


@pytest.mark.parametrize(
    ("discriminator", "generator"),
    [("book", "book"), ("conv_small", "dcgan"), ("dcgan", "dcgan"), ("mlp", "mlp")],
)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_pairs_keep_the_contract(
    discriminator: str, generator: str, shape: tuple[int, int, int]
) -> None:
    d = build_discriminator(discriminator, shape, 11, {})
    g = build_generator(generator, shape, {})
    images = g(g.latent(a_draw(6)))
    assert images.shape == (6, *shape) and images.abs().max() <= 1
    logits, features = d(images, a_draw(6))
    assert logits.shape == (6, 11) and len(features) == 6 and features.dim() == 2


@pytest.mark.parametrize("family", ["conv_small", "dcgan"])
def test_joining_batches_changes_nothing_for_the_discriminator(family: str) -> None:
    d = build_discriminator(family, (1, 28, 28), 10, {"width": 4}).double()
    images = torch.rand(8, 1, 28, 28, dtype=torch.float64)
    joined = d(images).logits
    apart = torch.cat([d(images[:3]).logits, d(images[3:]).logits])
    assert torch.allclose(joined, apart, atol=1e-14)


@pytest.mark.parametrize("family", ["conv_small", "dcgan"])
def test_randomness_comes_from_the_draw_alone(family: str) -> None:
    d = build_discriminator(family, (1, 28, 28), 10, {"width": 4})
    images = torch.rand(8, 1, 28, 28)
    assert torch.equal(d(images).logits, d(images).logits)
    assert torch.equal(d(images, a_draw(8)).logits, d(images, a_draw(8)).logits)
    assert not torch.equal(d(images, a_draw(8)).logits, d(images).logits)


@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 3, 4)])
def test_batch_norm_is_torchs_own_on_one_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()
    ours = GlobalBatchNorm(5).double()
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    a = (3 * torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    b = a.detach().clone().requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    (ours(a) * weights).sum().backward()
    (theirs(b) * weights).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-12)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad)
    assert torch.allclose(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(a), theirs(b))


def test_conv_small_is_the_papers_but_for_its_width() -> None:
    d = build_discriminator("conv_small", (3, 32, 32), 10, {"width": 96})
    layers = [
        d.conv1,
        *(m for b in (d.block1, d.block2, d.block3) for m in b if hasattr(m, "weight")),
    ]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (96, 3, 3, 3), (96, 96, 3, 3), (96, 96, 3, 3),
        (192, 96, 3, 3), (192, 192, 3, 3), (192, 192, 3, 3),
        (192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1),
    ]  # fmt: skip
    with pytest.raises(UserError, match="9x9 pixels or more, and these are 8x32"):
        build_discriminator("conv_small", (1, 8, 32), 10, {})


@pytest.mark.parametrize("noisy", [False, True])
def test_data_dependent_init_standardizes_every_layer(noisy: bool) -> None:
    d = build_discriminator("dcgan", (1, 28, 28), 10, {"width": 4})
    images = torch.rand(200, 1, 28, 28) * 2 - 1

    def draw() -> Draw | None:
        rows = {"all": Rows(200, 0, 200)}
        return Draw(0, "init", 0, rows, torch.device("cpu")) if noisy else None

    data_dependent_init(d, images, draw())
    found = []
    for layer in (d.conv1, d.conv4, d.head):
        layer.register_forward_hook(lambda _m, _i, out: found.append(out.detach()))
    d(images, draw())
    for out in found:
        axes = [a for a in range(out.dim()) if a != 1]
        assert torch.allclose(out.mean(axes), torch.zeros(out.shape[1]), atol=1e-4)
        assert torch.allclose(out.std(axes), torch.ones(out.shape[1]), atol=1e-2)


def test_init_leaves_other_layers_alone() -> None:
    from torch.nn.utils.parametrizations import spectral_norm

    network = nn.Sequential(
        spectral_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), normed(nn.Linear(2704, 5, bias=False))
    )
    before = network[0].parametrizations.weight.original.clone()
    images = torch.rand(50, 1, 28, 28)
    data_dependent_init(network.eval(), images)
    assert torch.equal(network[0].parametrizations.weight.original, before)
    assert torch.allclose(network(images).std(0, correction=0), torch.ones(5), atol=1e-4)


def test_the_improved_gan_trains_scales_in_the_last_layer_only() -> None:
    d = build_discriminator("mlp", (1, 28, 28), 10, {"sizes": (30, 20)})
    frozen = [name for name, p in d.named_parameters() if not p.requires_grad]
    assert frozen == [f"layers.{i}.parametrizations.weight.original0" for i in range(2)]


def test_the_improved_gan_starts_with_rows_as_long_as_the_papers() -> None:
    d = build_discriminator("mlp", (1, 28, 28), 10, {})
    for layer in (*d.layers, d.head):
        rows = layer.parametrizations.weight.original1.norm(dim=1)
        assert torch.allclose(rows.mean(), torch.tensor(0.1 * layer.in_features**0.5), rtol=0.05)


def test_the_books_batch_norm_normalizes_parts_apart() -> None:
    d = build_discriminator("book", (1, 28, 28), 10, {"dropout": 0}).double()
    real = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    fakes = 5 * torch.rand(4, 1, 28, 28, dtype=torch.float64)
    joined = Draw(0, "x", 0, {"unlabeled": Rows.of(6, 0, 1), "fake": Rows.of(4, 0, 1)}, CPU)
    both = d(torch.cat([real, fakes]), joined).logits
    averages = d.norm2.running_mean.clone()
    alone = d(real, Draw(0, "x", 0, {"unlabeled": Rows.of(6, 0, 1)}, CPU)).logits
    assert torch.allclose(both[:6], alone)
    # running averages follow the real part, and stand still in a frozen network
    fresh = build_discriminator("book", (1, 28, 28), 10, {"dropout": 0}).double()
    fresh.load_state_dict(d.state_dict())
    with frozen(fresh):
        fresh(real, Draw(0, "x", 0, {"unlabeled": Rows.of(6, 0, 1)}, CPU))
    assert torch.equal(fresh.norm2.running_mean, d.norm2.running_mean)
    assert not torch.equal(averages, d.norm2.running_mean)


def test_freezing_restores_what_was_trained() -> None:
    d = build_discriminator("mlp", (1, 28, 28), 10, {"sizes": (30, 20)})
    before = [p.requires_grad for p in d.parameters()]
    with frozen(d):
        assert not any(p.requires_grad for p in d.parameters())
    assert [p.requires_grad for p in d.parameters()] == before


def test_noise_and_dropout() -> None:
    x = torch.ones(2000, 10)
    assert gaussian_noise(x, 0.3, None) is x and dropout(x, 0.3, None) is x
    noisy = gaussian_noise(x, 0.3, a_draw(2000))
    assert abs((noisy - x).std() - 0.3) < 0.01
    dropped = dropout(x, 0.25, a_draw(2000))
    assert abs((dropped == 0).float().mean() - 0.25) < 0.02
    assert torch.allclose(dropped[dropped > 0], torch.tensor(1 / 0.75))


def test_ema_half_life_is_in_images() -> None:
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.zeros_(average.weight), nn.init.ones_(network.weight)
    config = EmaConfig(half_life=1000, rampup=0)
    for step in range(1, 11):
        ema.update(average, network, 100 * step, 100, config)
    assert torch.allclose(average.weight, torch.tensor(0.5))


def test_ema_follows_closely_at_first() -> None:
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.zeros_(average.weight), nn.init.ones_(network.weight)
    ema.update(average, network, 100, 100, EmaConfig(half_life=1e9, rampup=0.1))
    assert average.weight.item() > 0.99


def test_no_augmentation_returns_the_images_themselves() -> None:
    images = torch.rand(4, 1, 28, 28)
    assert augment(images, AugmentConfig(), a_draw(4)) is images


def test_translation_moves_whole_pixels_at_most() -> None:
    images = torch.full((400, 1, 28, 28), -1.0)
    images[:, :, 14, 14] = 1
    moved = augment(images, AugmentConfig(translate=2), a_draw(400)).add(1).squeeze(1)
    rows = (moved.sum(2) * torch.arange(28)).sum(1) / moved.sum((1, 2))
    assert 11.9 <= rows.min() < 12.2 and 15.8 < rows.max() <= 16.1
    assert torch.allclose(moved.sum((1, 2)), torch.full((400,), 2.0), atol=1e-4)


def test_augmentation_is_differentiable() -> None:
    images = torch.rand(4, 1, 28, 28, requires_grad=True)
    config = AugmentConfig(rotation=10, scale=0.1, shear=0.1, translate=2)
    augment(images, config, a_draw(4)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_rotation_turns_by_at_most_the_angle() -> None:
    images = torch.full((300, 1, 28, 28), -1.0)
    images[:, :, 13:15, 24] = 1  # on the horizontal axis, 10.5 px right of the centre
    turned = augment(images, AugmentConfig(rotation=20), a_draw(300)).add(1).squeeze(1)
    mass = turned.sum((1, 2))
    y = (turned.sum(2) * (torch.arange(28) - 13.5)).sum(1) / mass
    x = (turned.sum(1) * (torch.arange(28) - 13.5)).sum(1) / mass
    angles = torch.atan2(y, x).rad2deg()
    assert angles.abs().max() < 21 and angles.min() < -17 and angles.max() > 17
    assert torch.allclose((x**2 + y**2).sqrt(), torch.full((300,), 10.5), atol=0.3)


def test_flip_mirrors_the_share_of_images_that_it_says() -> None:
    images = torch.rand(2000, 1, 8, 8)
    flipped = augment(images, AugmentConfig(flip=0.25), a_draw(2000))
    mirrored = (flipped - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    kept = (flipped - images).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ kept).all() and abs(mirrored.float().mean() - 0.25) < 0.03


def test_thickness_grows_and_shrinks_strokes_by_at_most_its_part_of_a_pixel() -> None:
    images = torch.full((400, 1, 28, 28), -1.0)
    images[:, :, :, 10:14] = 1  # a bar, 4 pixels wide
    changed = augment(images, AugmentConfig(thickness=0.5), a_draw(400))
    widths = changed.add(1).div(2).sum(3).mean((1, 2))
    assert 3 <= widths.min() < 3.02 and 4.98 < widths.max() <= 5
    assert abs(widths.mean() - 4) < 0.1


def test_a_users_own_model_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, image_shape, outputs, depth):\n"
        "        super().__init__()\n"
        "        self.depth = depth\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build_discriminator("mine:Mine", (1, 28, 28), 10, {"depth": 3}).depth == 3


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("dcgann", {}, "take one of book, conv_small, dcgan, mlp"),
        ("no_such_module:D", {}, "can't be imported"),
        ("sgan_dist.models.dcgan:Nothing", {}, "can't be imported"),
        ("dcgan", {"wdith": 3}, "do not fit DCGANDiscriminator"),
    ],
)
def test_bad_models_are_explained(name: str, args: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_discriminator(name, (1, 28, 28), 10, args)


def test_the_generator_says_which_sizes_it_makes() -> None:
    with pytest.raises(UserError, match="divisible by 4"):
        build_generator("dcgan", (1, 30, 30), {})
