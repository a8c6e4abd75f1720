"""A user's own networks: found by module:Class; their own errors keep their tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sgan_dist.errors import UserError
from sgan_dist.gan.models import build_discriminator, build_generator, describe
from tests.commands import summary, training
from tests.ranks import REPOSITORY, environment

SHAPE = (1, 28, 28)
NETWORK = """
from torch import nn

class Own(nn.Module):
    def __init__(self, *, outputs, depth, **image_shape):
        super().__init__()
        self.depth = len(depth)

constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path, with a network in it and some modules that cannot be imported."""
    (tmp_path / "own_network.py").write_text(NETWORK)
    (tmp_path / "own_needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "own_with_a_bug.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("dcgann", {}, "take one of tutorial, conv_small, dcgan, mlp, or name your own as module:"),
        ("own_network:", {}, "or name your own as module:Class"),
        (":Own", {}, "or name your own as module:Class"),
        ("no_such_module:D", {}, "there is no module no_such_module: check the name"),
        ("own_network.inner:D", {}, "there is no module own_network.inner: check the name"),
        ("own_network:Nothing", {}, "own_network has no class Nothing"),
        ("own_network:constant", {}, "own_network has no class constant"),
        ("dcgan", {"wdith": 3}, "do not fit DCGANDiscriminator: got an unexpected keyword .*wdith"),
        ("own_network:Own", {}, "model.discriminator_args do not fit Own: missing .*depth"),
        ("own_network:Own", {"outputs": 3}, "outputs"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_a_config_gets_wrong_is_one_sentence(
    name: str, args: dict[str, int], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        build_discriminator(name, SHAPE, 10, args)


@pytest.mark.usefixtures("folder")
def test_what_a_network_gets_wrong_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match=r"object of type 'int' has no len") as error:
        build_discriminator("own_network:Own", SHAPE, 10, {"depth": 3})
    assert Path(error.traceback[-1].path).name == "own_network.py"
    with pytest.raises(ZeroDivisionError):
        build_discriminator("own_with_a_bug:Own", SHAPE, 10, {})
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        build_generator("own_needs_more:Own", SHAPE, {})


@pytest.mark.process
def test_a_module_named_as_a_file_of_launch_is_the_users(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "train.py").write_text("from tests.gan.odd_networks import Plain\n")
    own = ("--model.discriminator=train:Plain", "--model.discriminator_args={}")
    script, *options = training(digits, tmp_path / "run", *own, "--train.steps=2")
    command = [sys.executable, str(REPOSITORY / script), *options]
    path = {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=tmp_path, env=environment(**path), check=True, timeout=200)
    assert summary(tmp_path / "run")["step"] == 2


def test_the_help_lists_each_network_with_its_arguments() -> None:
    lines = describe().splitlines()
    assert "  mlp         sizes=(1000, 500, 250, 250, 250) input_noise=0.3 noise=0.5" in lines
    assert "  tutorial    latent_size=100" in lines
