"""The configuration: valid by construction, in layers, with errors that name the setting."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sgan_dist import train
from sgan_dist.config import (
    FREE_AT_RESUME,
    POOLED,
    SETTINGS,
    AugmentConfig,
    BatchConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    StreamConfig,
    TeacherAugmentConfig,
    TrackingConfig,
    TrainConfig,
    find_config,
    load,
    load_config,
    parse,
    result_settings,
    save,
)
from sgan_dist.errors import UserError
from sgan_dist.parallel.deepspeed_config import requested
from sgan_dist.run.rundir import run_directory


def message(work: Callable[[], Any]) -> str:
    """The sentence with which `work` refuses."""
    with pytest.raises(UserError) as error:
        work()
    return str(error.value)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sgan_dist", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_layers_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\noptim: {lr: 1e-3, generator_lr: 5e-4}\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 2e-4}\nmodel: {discriminator_args: {width: 8}}\n")
    config = parse(
        [
            f"--config={tmp_path}/a.yaml",
            "--config",
            f"{tmp_path}/b.yaml",
            "--train.steps=7",
            "--seed",
            "3",
        ]
    )
    assert (config.name, config.optim.lr, config.optim.generator_lr) == ("a", 2e-4, 5e-4)
    assert (config.train.steps, config.seed) == (7, 3)
    assert config.model.discriminator_args == {"width": 8}


def test_the_default_file_is_read_unless_another_is_named(tmp_path: Path) -> None:
    default = tmp_path / "default.yaml"
    default.write_text("name: default\n")
    assert parse([], str(default)).name == "default"
    (tmp_path / "other.yaml").write_text("seed: 1\n")
    assert parse([f"--config={tmp_path}/other.yaml"], str(default)).name == "run"
    assert parse(["--config", f"{tmp_path}/other.yaml"], str(default)).name == "run"


def test_saved_configs_are_read_back(tmp_path: Path) -> None:
    config = parse(["--optim.betas=[0.9,0.99]", '--model.generator_args={"width": 3}'])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert parse([f"--config={tmp_path}/config.yaml"]) == config


BAD: list[tuple[str, Any, str]] = [
    ("optim.lr", "fast", "optim.lr is 'fast', and must be a valid number"),
    ("optim.lr", -1.0, "optim.lr is -1.0, and must be positive"),
    ("optim.lr", float("nan"), "optim.lr is nan, and must be a finite number"),
    ("optim.lr", float("inf"), "optim.lr is inf, and must be a finite number"),
    ("train.steps", 0, "train.steps is 0, and must be positive"),
    ("train.steps", -3, "train.steps is -3, and must be positive"),
    ("train.steps", 1.5, "train.steps is 1.5, and must be a valid integer"),
    ("train.steps", True, "train.steps is True, and must be a valid integer"),
    (
        "train.supervised_only",
        "maybe",
        "train.supervised_only is 'maybe', and must be a valid bool",
    ),
    ("optim.decay", 2.0, "optim.decay is 2.0, and must be at most 1"),
    ("optim.clip_norm", 0.0, "optim.clip_norm is 0.0, and must be positive"),
    ("optim.betas", [1.5, 0.9], "optim.betas.0 is 1.5, and must be below 1"),
    ("optim.betas", [0.9], "optim.betas"),
    ("augment.scale", 1.0, "augment.scale is 1.0, and must be below 1"),
    ("teacher_augment.scale", 1.0, "teacher_augment.scale is 1.0, and must be below 1"),
    ("augment.thickness", 1.5, "augment.thickness is 1.5, and must be at most 1"),
    ("teacher_augment.flip", 2.0, "teacher_augment.flip is 2.0, and must be at most 1"),
    ("seed", 10**23, f"seed is {10**23}, and must be at most {2**63 - 1}"),
    ("seed", -1, "seed is -1, and must not be negative"),
    ("stream.workers", -1, "stream.workers is -1, and must not be negative"),
    ("loss.form", "both", "loss.form is 'both', and must be 'implied' or 'explicit'"),
    ("loss.consistency", -1.0, "loss.consistency is -1.0, and must not be negative"),
    ("loss.threshold", 1.1, "loss.threshold is 1.1, and must be at most 1"),
    ("machine.precision", "fp8", "must be 'auto', 'fp32', 'tf32', 'bf16' or 'fp64'"),
    ("machine.world_size", 0, "machine.world_size is 0, and must be positive"),
    ("model.discriminator_args", 3, "model.discriminator_args is 3, and must be a valid dict"),
    ("model.generator", "book", "model.generator book is now called tutorial"),
    ("batch.fake", 0, "batch.fake is 0, and must be positive in a run that uses it"),
    ("batch.unlabeled", 0, "batch.unlabeled is 0, and must be positive in a run that uses it"),
    ("optim.generator_lr", 0.0, "optim.generator_lr is 0.0, and must be positive in a run"),
    ("train.stepz", 3, "there is no setting train.stepz: did you mean train.steps?"),
    ("train.fake_batch", 3, "train.fake_batch is now called batch.fake"),
    ("loss.vat", 1.0, "loss.vat was removed because it improved no result: leave it out"),
]


def in_python(key: str, value: Any) -> Config:
    """`Config` with one value, as a caller writes it."""
    section, _, name = key.rpartition(".")
    if not section:
        return Config(**{name: value})
    return Config(**{section: type(getattr(Config(), section))(**{name: value})})


@pytest.mark.parametrize(("key", "value", "says"), BAD)
def test_a_wrong_value_has_one_sentence_from_anywhere(
    key: str, value: Any, says: str, tmp_path: Path
) -> None:
    sentence = message(lambda: in_python(key, value))
    assert says in sentence
    section, _, name = key.rpartition(".")
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({section: {name: value}} if section else {name: value}))
    assert message(lambda: parse([f"--config={path}"])) == sentence
    assert message(lambda: parse([f"--{key}={yaml.safe_dump(value).split('...')[0].strip()}"])) == (
        sentence
    )


def test_types_are_strict_in_python_and_no_stricter_than_needed() -> None:
    assert message(lambda: TrainConfig(steps="10")) == (  # type: ignore[arg-type]
        "train.steps is '10', and must be a valid integer"
    )
    assert OptimConfig(lr=1).lr == 1.0
    assert OptimConfig(betas=[0, 0.9]).betas == (0.0, 0.9)  # type: ignore[arg-type]


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"train\.steps is -1"):
        dataclasses.replace(TrainConfig(), steps=-1)
    with pytest.raises(UserError, match=r"batch\.fake is 0"):
        dataclasses.replace(Config(), batch=BatchConfig(fake=0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


def test_a_section_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher_augment is .* an instance of TeacherAugment"):
        Config(teacher_augment=AugmentConfig())  # type: ignore[arg-type]
    assert Config(teacher_augment=TeacherAugmentConfig(flip=1)).teacher_augment.flip == 1


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--optim.lrr=1", "there is no setting optim.lrr: did you mean optim.lr?"),
        ("--data.labelled_batch=3", "did you mean batch.labeled?"),
        ("--batch.labelled=3", "did you mean batch.labeled?"),
        ("--data.labeled_batch=3", "data.labeled_batch is now called batch.labeled"),
        (
            "--data.window_mib=256",
            "data.window_mib is now called stream.lane_window_mib, the size of one lane's window:"
            " divide the old value, of all lanes, by stream.lanes",
        ),
        ("--train.baseline_steps=3", "train.baseline_steps was removed because the supervised"),
        ("--train.step=3", "there is no setting train.step: did you mean train.steps?"),
        ("--zzzzzz=3", "there is no setting zzzzzz: see --help for all"),
        ("--config=nowhere", "there is no nowhere: name a YAML file, or a recipe: digits, digits_"),
        ("--optim.lr=[", "optim.lr is [, which is not YAML"),
        ("--data.labeled_batch 3", "data.labeled_batch is now called batch.labeled"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_bad_command_lines_are_explained(argument: str, says: str) -> None:
    assert says in message(lambda: parse(argument.split()))


@pytest.mark.parametrize("content", [b"name: \xff\xfe", b"- 3", b"", b"train: [", b"train:"])
def test_a_file_that_holds_no_settings_is_explained(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    sentence = message(lambda: parse([f"--config={tmp_path}/bad.yaml"]))
    assert "bad configuration" in sentence or "train is a section, and holds no" in sentence


def test_only_what_changes_the_result_binds_a_resume() -> None:
    base = result_settings(Config())
    for free in ("--train.steps=9", "--checkpoint.every=3", "--stream.workers=2", "--run_dir=x"):
        assert result_settings(parse([free])) == base
    for bound in ("--seed=1", "--optim.lr=1e-4", "--stream.lanes=4", "--batch.fake=8"):
        assert result_settings(parse([bound])) != base
    assert base.keys() == SETTINGS.keys() - FREE_AT_RESUME


def test_what_tells_runs_apart_in_a_table() -> None:
    assert {"train.steps", "data.source", "data.labels_per_class", "optim.lr"}.isdisjoint(POOLED)
    assert {"seed", "name", "data.root", "data.label_seed", "checkpoint.every"} <= POOLED


def test_a_supervised_run_is_a_view_of_its_config() -> None:
    config = parse(["--train.supervised_only=true", "--loss.consistency=1"])
    assert config.batches == {"labeled": 32}
    assert not config.uses_generator and not config.uses_consistency
    assert (config.batch.unlabeled, config.model.generator) == (64, "dcgan")
    # what it does not use does not bind it
    other = dataclasses.replace(
        config,
        loss=LossConfig(),
        batch=BatchConfig(unlabeled=0, fake=0),
        teacher_augment=TeacherAugmentConfig(flip=0.5, shear=0.1),
    )
    assert result_settings(other) == result_settings(config)
    assert "loss.consistency" not in result_settings(config)


def test_terms_without_their_images_are_off() -> None:
    without = parse(["--loss.consistency=1", "--model.generator=null", "--batch.fake=0"])
    assert without.uses_consistency and not without.uses_generator


def tiny(root: Path, run: Path, train: TrainConfig) -> Config:
    return Config(
        run_dir=str(run),
        data=DataConfig(root=str(root)),
        stream=StreamConfig(lanes=4),
        model=ModelConfig(discriminator_args={"width": 2}, generator_args={"width": 2}),
        train=train,
        tracking=TrackingConfig(wandb=False),
    )


@pytest.mark.process
def test_supervised_only_is_the_same_from_python_and_the_command_line(
    digits: Path, tmp_path: Path
) -> None:
    config = tiny(digits, tmp_path / "python", TrainConfig(steps=3, supervised_only=True))
    summary = train(config)
    save(dataclasses.replace(config, run_dir=str(tmp_path / "cli")), tmp_path / "config.yaml")
    done = command("train", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "a step is 32 labeled images" in done.stderr and "unlabeled" not in done.stderr
    summaries = [yaml.safe_load((tmp_path / name / "summary.json").read_text()) for name in
                 ("python", "cli")]  # fmt: skip
    assert summaries[0] == summary
    assert [s["weights_sha256"] for s in summaries] == [summary["weights_sha256"]] * 2
    assert summary["trained_on"] == "labeled images alone" and summary["images_seen"] == 3 * 32


@pytest.mark.process
def test_negative_steps_train_nothing_from_python_and_the_command_line(
    digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"train\.steps is -3, and must be positive"):
        train(tiny(digits, run, TrainConfig(steps=-3)))
    assert not run.exists()
    refused = command("train", f"--data.root={digits}", f"--run_dir={run}", "--train.steps=-3")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "error: train.steps is -3, and must be positive"
    assert [path.name for path in run.iterdir()] == ["FAILED"]


@pytest.mark.process
def test_the_help_names_the_choices_and_the_networks_arguments() -> None:
    shown = command("train", "--help")
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    for key in SETTINGS:
        assert f"--{key} " in text
    assert "dcgan width=24 noise=0.1 dropout=0.2" in text
    assert "dcgan latent_size=100 width=64" in text
    assert "your own: module:Class" in text
    assert "{feature_matching,non_saturating}" in text and "{auto,fp32,tf32,bf16,fp64}" in text


def test_shipped_files_are_found_by_name_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "mnist.yaml", "configs/mnist.yaml"):
        assert load_config(name, "--train.steps=3").name == "mnist"
    for name in ("deepspeed/zero2", "configs/deepspeed/zero2.json", "deepspeed/zero2.json"):
        config = requested(name, {})
        assert config is not None and config["zero_optimization"]["stage"] == 2
    (tmp_path / "mnist").write_text("name: mine\n")
    assert find_config("mnist") == Path("mnist")


def test_the_run_directory_of_a_refused_command_line_is_known(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: from_file\n")
    bad, default = "--no.such=1", str(file)
    assert run_directory([bad], default) == Path("runs/from_file")
    assert run_directory([bad, "--name", "mine"], default) == Path("runs/mine")
    assert run_directory([bad, "--run_dir=my dir"], default) == Path("my dir")
    assert run_directory([bad, f"--config={tmp_path}/none.yaml"], default) is None
