"""The configuration: layers, overrides, and errors that a person can act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgan_dist.config import (
    Config,
    check,
    load,
    meaning,
    parse,
    save,
    supervised,
)
from sgan_dist.errors import UserError
from sgan_dist.rundir import run_directory


def test_layers_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\noptim: {lr: 1e-3, generator_lr: 5e-4}\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 2e-4}\nmodel: {discriminator_args: {width: 8}}\n")
    config, dry_run = parse(
        [
            f"--config={tmp_path}/a.yaml",
            f"--config={tmp_path}/b.yaml",
            "--train.steps=7",
            "--seed",
            "3",
        ]
    )
    assert not dry_run
    assert (config.name, config.optim.lr, config.optim.generator_lr) == ("a", 2e-4, 5e-4)
    assert (config.train.steps, config.seed) == (7, 3)
    assert config.model.discriminator_args == {"width": 8}


def test_the_default_file_is_read_unless_another_is_named(tmp_path: Path) -> None:
    default = tmp_path / "default.yaml"
    default.write_text("name: default\n")
    assert parse([], default)[0].name == "default"
    assert parse(["--dry_run", "--seed=2"], default)[1]
    (tmp_path / "other.yaml").write_text("seed: 1\n")
    assert parse([f"--config={tmp_path}/other.yaml"], default)[0].name == "run"


def test_saved_configs_are_read_back(tmp_path: Path) -> None:
    config, _ = parse(["--optim.betas=[0.9,0.99]", '--model.generator_args={"width": 3}'])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--optim.lrr=1", "unrecognized arguments: --optim.lrr=1"),
        ("--optim.lr=fast", "optim.lr"),
        ("--optim.lr=-1", "optim.lr is -1.0, and must be positive"),
        ("--optim.lr=.nan", "optim.lr is nan"),
        ("--train.steps=0", "train.steps is 0"),
        ("--optim.decay=2", "fraction from 0 to 1"),
        ("--optim.clip_norm=0", "give a positive norm, or null"),
        ("--augment.scale=1", "must be below 1"),
        ("--teacher_augment.scale=1", "teacher_augment.scale is 1"),
        ("--augment.thickness=1.5", "augment.thickness and .flip are at most 1, and 1.5 was given"),
        ("--teacher_augment.flip=2", "at most 1, and 2.0 was given"),
        ("--optim.betas=[1.5,0.9]", "optim.betas are"),
        ("--seed=99999999999999999999999", "seed is 9999"),
        ("--data.workers=-1", "data.workers is -1"),
        ("--loss.form=both", "loss.form"),
        ("--loss.consistency=-1", "loss.consistency is -1.0, and must not be negative"),
        ("--loss.threshold=1.1", "loss.threshold is 1.1"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_bad_values_are_explained(argument: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(parse([argument])[0])


def test_only_what_changes_the_result_is_its_meaning() -> None:
    base = meaning(Config())
    for free in ("--train.steps=9", "--checkpoint.every=3", "--data.workers=2", "--run_dir=x"):
        assert meaning(parse([free])[0]) == base
    for bound in ("--seed=1", "--optim.lr=1e-4", "--data.lanes=4", "--train.fake_batch=8"):
        assert meaning(parse([bound])[0]) != base


def test_a_supervised_run_takes_no_unlabeled_images() -> None:
    alone = check(parse(["--train.supervised_only=true", "--train.baseline_steps=9"])[0])
    assert alone.data.unlabeled_batch == 0 and alone.model.generator is None
    assert alone.train.baseline_steps == 0
    baseline = supervised(parse(["--train.baseline_steps=40", "--name=x"])[0])
    assert baseline.train.supervised_only and baseline.train.steps == 40
    assert baseline.directory == Path("runs/x/supervised")


def test_terms_without_their_images_are_off() -> None:
    without = check(parse(["--loss.consistency=1", "--model.generator=null"])[0]).loss
    assert without.consistency == 1
    alone = check(parse(["--loss.consistency=1", "--train.supervised_only=true"])[0]).loss
    assert alone.consistency == 0


def test_the_run_directory_of_a_refused_command_line_is_known(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: from_file\n")
    bad = "--no.such=1"
    assert run_directory([bad], file) == Path("runs/from_file")
    assert run_directory([bad, "--name", "mine"], file) == Path("runs/mine")
    assert run_directory([bad, "--run_dir=my dir"], file) == Path("my dir")
    assert run_directory([bad, f"--config={tmp_path}/none.yaml"], file) is None


def test_a_file_that_is_not_text_is_explained(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="bad configuration"):
        parse([f"--config={tmp_path}/bad.yaml"])
