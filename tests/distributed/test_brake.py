"""NaN in one rank's share of D's step, or of G's: what stays as it was, and what is reported."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sgan_dist.config import Config
from sgan_dist.data.index import load_index
from sgan_dist.errors import NonFiniteLoss
from sgan_dist.gan.models.base import DiscriminatorOutput
from sgan_dist.gan.models.dcgan import DCGANDiscriminator
from sgan_dist.gan.models.tutorial import PartwiseBatchNorm
from sgan_dist.parallel.backends import open_backend
from sgan_dist.parallel.collectives import as_bytes
from sgan_dist.run import preflight
from sgan_dist.run.session import Session
from tests.conftest import small_config
from tests.distributed.runs import CONSISTENCY
from tests.ranks import run_ranks

pytestmark = pytest.mark.process
STEP = 3  # the step that is poisoned
OWN = (
    "--model.discriminator=tests.distributed.test_brake:Poisoned",
    '--model.discriminator_args={"width": 4}',
)


class Poisoned(DCGANDiscriminator):
    """A D with batch norm whose outputs become NaN in the phase `poison` of a step, D's or G's."""

    poison: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm = PartwiseBatchNorm(1)

    def forward(self, images: Tensor, rng: Any = None) -> DiscriminatorOutput:
        output = super().forward(self.norm.partwise(images, rng), rng)
        phase = "d" if self.norm.weight.requires_grad else "g"  # G's step freezes D
        if self.training and phase == self.poison:
            return DiscriminatorOutput(output.logits * torch.nan, output.features * torch.nan)
        return output


def digests(session: Session) -> dict[str, str]:
    """Of all that a checkpoint holds of the networks, part by part."""
    values = {}
    for name, part in session.sgan.state().items():
        digest = hashlib.sha256()
        for leaf in tree_leaves(part):
            digest.update(as_bytes(leaf) if isinstance(leaf, Tensor) else str(leaf).encode())
        values[name] = digest.hexdigest()
    return values


def train_poisoned(
    rank: int, world_size: int, config: Config, phase: str | None
) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """Trains over the poisoned step; returns the error, and the state before it and at the end."""
    backend, index = open_backend(config), load_index(config.data.root)
    config = preflight.with_precision(config, backend.precision)
    config.directory.mkdir(parents=True, exist_ok=True)
    message, before = None, dict[str, str]()
    with contextlib.closing(Session(config, index, backend)) as session:
        discriminator: Any = session.sgan.discriminator.network
        try:
            for step in range(STEP + 3 if phase else STEP + 1):
                if step == STEP:
                    before = digests(session)
                last_rank = rank == world_size - 1
                discriminator.poison = phase if step == STEP and last_rank else None
                batch = session.next_batch()
                assert batch is not None
                session.train_step(batch)
            session.settle()
        except NonFiniteLoss as error:
            message = str(error)
        return message, before, digests(session)


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ()),
        (2, ("--batch.accumulation=2", "--optim.clip_norm=1")),
        pytest.param(1, ("--machine.deepspeed=deepspeed/zero1",), marks=pytest.mark.slow),
        (2, ("--machine.deepspeed=deepspeed/zero2",)),
    ],
    ids=["alone", "DDP", "ZeRO 1", "ZeRO 2"],
)
def test_what_is_not_finite_changes_nothing(
    world_size: int, options: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    def results(phase: str | None) -> tuple[str | None, dict[str, str], dict[str, str]]:
        run = tmp_path / str(phase)
        config = small_config(digits, run, *OWN, *CONSISTENCY, *options)
        ranks = run_ranks(world_size, train_poisoned, world_size, config, phase)
        assert len({message for message, _, _ in ranks}) == 1
        return ranks[0]

    message, before, after = results(None)
    assert message is None and all(before[name] != after[name] for name in before)
    message, start, end = results("d")
    assert message is not None and f"at step {STEP}, before its update" in message
    assert start == before == end
    message, start, end = results("g")
    assert message is not None and message.startswith("g/") and f"at step {STEP}" in message
    assert start == before
    for name in ("generator", "average"):  # G has not made the step, and D has
        assert end[name] == before[name]
    assert end["discriminator"] == after["discriminator"]
    written = json.loads((tmp_path / "g" / f"nonfinite-step-{STEP:08d}.json").read_text())
    assert [len(ids["labeled"]) for ids in written["ranks"]] == [12 // world_size] * world_size
