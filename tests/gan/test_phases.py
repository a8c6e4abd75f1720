"""The phases as modules: whose parameters they have, and what they return."""

from __future__ import annotations

import pytest
import torch

from sgan_dist.config import Config, parse
from sgan_dist.gan.models import build_discriminator, build_generator
from sgan_dist.gan.phases import DiscriminatorPhase, GeneratorPhase, MicroBatch
from sgan_dist.parallel.ddp import AccelerateBackend
from sgan_dist.parallel.random import GlobalRandom

SHAPE, IMAGES = (1, 12, 12), 6
DEVICE = torch.device("cpu")


def phases(config: Config) -> tuple[DiscriminatorPhase, GeneratorPhase]:
    torch.manual_seed(0)
    backend = AccelerateBackend(config)
    d = build_discriminator("dcgan", SHAPE, 10, {"width": 4}).double()
    g = build_generator("dcgan", SHAPE, {"width": 4, "latent_size": 8}).double()
    return DiscriminatorPhase(d, config, backend), GeneratorPhase(g, d, config, backend)


def random(purpose: str, rows: range, *kinds: str) -> GlobalRandom:
    return GlobalRandom(0, purpose, 0, dict.fromkeys(kinds, rows), DEVICE)


def config_of(*options: str) -> Config:
    sizes = [f"--batch.{kind}={IMAGES}" for kind in ("labeled", "unlabeled", "fake")]
    return parse([*sizes, "--machine.precision=fp64", *options])


def test_a_phase_has_the_parameters_of_its_network_alone() -> None:
    d_phase, g_phase = phases(config_of())
    for phase in (d_phase, g_phase):
        own = list(phase.network.parameters())
        assert [id(p) for p in phase.parameters()] == [id(p) for p in own]
        assert {name.split(".")[0] for name in phase.state_dict()} == {"network"}


@pytest.mark.parametrize("loss", ["feature_matching", "non_saturating"])
def test_the_generators_phase_trains_the_generator_alone(loss: str) -> None:
    config = config_of(f"--loss.generator={loss}")
    _, phase = phases(config)
    (discriminator,) = phase._discriminator
    images = torch.randn(IMAGES, *SHAPE, dtype=torch.float64)
    real = [MicroBatch({"unlabeled": images}, random("real", range(IMAGES), "unlabeled"))]
    shares = phase(
        random("latent", range(IMAGES), "fake"), [random("fake", range(IMAGES), "fake")], real
    )
    shares.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in phase.parameters())
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    (value,) = shares.values.values()
    assert not value.requires_grad and list(shares.values) == [f"g/{loss}"]


@pytest.mark.parametrize("loss", ["feature_matching", "non_saturating"])
def test_micro_batches_give_the_generator_the_gradient_of_the_whole_batch(loss: str) -> None:
    def gradient(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, phase = phases(config_of(f"--loss.generator={loss}", f"--batch.accumulation={parts}"))
        images = torch.randn(
            IMAGES, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        rows = [range(i * IMAGES // parts, (i + 1) * IMAGES // parts) for i in range(parts)]
        real = [
            MicroBatch(
                {"unlabeled": images[own.start : own.stop]}, random("real", own, "unlabeled")
            )
            for own in rows
        ]
        fake = [random("fake", own, "fake") for own in rows]
        shares = phase(random("latent", range(IMAGES), "fake"), fake, real)
        shares.loss.backward()
        gradients = [p.grad.flatten() for p in phase.parameters() if p.grad is not None]
        (value,) = shares.values.values()
        return torch.cat(gradients), value

    whole, value = gradient(1)
    for parts in (2, 3):
        divided, same_value = gradient(parts)
        assert float((divided - whole).norm() / whole.norm()) < 1e-12
        assert float(abs(same_value - value)) < 1e-12


def test_the_diagnosis_is_the_gradient_of_each_term_at_the_logits() -> None:
    phase, _ = phases(config_of())
    kinds = ("labeled", "unlabeled", "fake")
    images = {kind: torch.randn(IMAGES, *SHAPE, dtype=torch.float64) for kind in kinds}
    labels = torch.arange(IMAGES)
    plain, diagnosed = (
        phase(MicroBatch(images, random("d", range(IMAGES), *kinds)), labels, None, diagnose)
        for diagnose in (False, True)
    )
    assert torch.equal(plain.loss, diagnosed.loss) and diagnosed.loss.requires_grad
    squares = {k: v for k, v in diagnosed.values.items() if "squared" in k}
    assert set(squares) == {f"d/squared_logit_gradient/{k}" for k in ("supervised", *kinds[1:])}
    assert set(plain.values) == set(diagnosed.values) - set(squares)
    with torch.no_grad():
        joined = torch.cat(list(images.values()))
        logits = phase.network(joined, random("d", range(IMAGES), *kinds)).logits
    # of cross-entropy: (softmax - one-hot) / count
    expected = logits[:IMAGES].softmax(1)
    expected[torch.arange(IMAGES), labels] -= 1
    square = (expected / IMAGES).square().sum()
    assert float(squares["d/squared_logit_gradient/supervised"]) == pytest.approx(float(square))
