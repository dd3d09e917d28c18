"""The configuration refuses what it does not know and says what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.cli.config import RunConfig, load_config, parse_config
from esper.cli.factory import build_model
from esper.cli.policies import make_policy
from esper.data.sets import load_data
from esper.errors import ConfigError, DataMissing
from esper.tamiyo.budgets import Budget
from esper.tamiyo.ranking import FieldRanking
from esper.tamiyo.triggers import Gap, Plateau, Schedule, Trigger
from esper.tamiyo.twins import AnyChoice, InTurn, Times

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = sorted(p for p in EXAMPLES.glob("*.yaml") if p.name != "load.yaml")  # see test_simulate
MINIMAL = """
name: mine
model: {factory: "hosts.py:DigitsCNN"}
data: {name: digits}
train: {epochs: 3}
"""


def test_the_minimum_is_enough_and_the_rest_has_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.growth.sites == "auto"
    assert config.folder == Path("runs/mine")
    assert config.train.optimizer.lr == 1e-3


def test_the_library_is_a_folder_or_an_address() -> None:
    assert parse_config(MINIMAL).library.where == Path("library")
    there = parse_config(MINIMAL + "library: {urza: 'host:50051', token_file: t}\n").library
    assert (there.where, there.token_file) == ("host:50051", "t")


def test_scientific_notation_is_a_number() -> None:
    """YAML 1.1 reads 1e-3 (no dot) as text; nobody who writes it means text."""
    text = MINIMAL.replace("epochs: 3", "epochs: 3, optimizer: {lr: 1e-4}")
    assert parse_config(text).train.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (MINIMAL + "growht: {}\n", ["growht: unknown key", "did you mean 'growth'"]),
        (
            MINIMAL + "growth: {policy: {patiense: 3}}\n",
            ["growth.policy.patiense: unknown key", "did you mean 'patience'"],
        ),
        (
            MINIMAL + "growth: {policy: {budget: {flop: 3}}}\n",
            ["growth.policy.budget.flop: unknown key", "the keys here are: parameters"],
        ),
        (MINIMAL + "growth: {policy: {trigger: whim}}\n", ["growth.policy.trigger", "'gap'"]),
        (MINIMAL + "growth: {policy: {max_gap: 0.2}}\n",
         ["growth.policy: max_gap goes with trigger gap, and trigger is schedule"]),
        (MINIMAL + "growth: {policy: {kind: fixed, min_gain: 0.1}}\n",
         ["min_gain goes with kind heuristic or bandit or random, and kind is fixed"]),
        (MINIMAL + "growth: {policy: {kind: random, trigger: gap}}\n",
         ["kind random grows at times of its own"]),
        (MINIMAL + "growth: {policy: {budget: {latency_ms: 0}}}\n",
         ["growth.policy.budget.latency_ms", "given: 0"]),
        (MINIMAL.replace("epochs: 3", "epochs: 0"), ["train.epochs", "given: 0"]),
        (MINIMAL.replace("train: {epochs: 3}", ""), ["train: this key is required"]),
        (MINIMAL.replace("digits}", "imagenet}"), ["data.name", "digits", "given: 'imagenet'"]),
        (MINIMAL + "growth: {sites: []}\n", ["growth.sites"]),
        (MINIMAL + "seed: 1\nseed: 2\n", ["'seed' is given twice, on lines 6 and 7"]),
        (MINIMAL + "library: {urza: somewhere}\n", ["library", "unix:/path/to.sock or host:port"]),
        (MINIMAL + "library: {urza: 'h:1', path: x}\n", ["library", "path or urza, not both"]),
        (MINIMAL + "library: {token_file: t}\n", ["library", "go with urza"]),
        (MINIMAL + "slow_track: {pipeline: SLOW}\n", ["slow_track.pipeline", "FAST"]),
        ("- a\n- b\n", ["expected a mapping", "list"]),
        ("", ["found nothing"]),
        ("name: [", ["not valid YAML"]),
    ],
)
def test_faults_are_named_with_file_and_place(given: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(given, "run.yaml")
    assert str(caught.value).startswith("run.yaml: ")
    for part in expected:
        assert part in str(caught.value)


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL + "sed: 1\nthread: 2\n", "run.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all(line.startswith("run.yaml: ") for line in lines)


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file.*give the path"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_examples_parse_and_fit_their_models(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, RunConfig)
    model = build_model(config.model, path)
    try:
        data = load_data(config.data, path)
    except DataMissing as e:
        pytest.skip(str(e))
    expected = (2, data.example.shape[1], data.classes) if data.task == "language" else (2, 10)
    assert tuple(model(data.example).shape) == expected
    names = dict(model.named_modules())
    for site in config.growth.sites:
        assert site.removesuffix(".*") in names


def test_a_wrong_factory_names_what_is_there(tmp_path: Path) -> None:
    near = parse_config(MINIMAL.replace("DigitsCNN", "DigitCNN"))
    with pytest.raises(ConfigError, match="did you mean 'DigitsCNN'"):
        build_model(near.model, EXAMPLES / "x.yaml")
    with pytest.raises(ConfigError, match="there is no file"):
        build_model(near.model, tmp_path / "x.yaml")
    arguments = parse_config(
        MINIMAL.replace('DigitsCNN"', 'DigitsCNN", arguments: {wide: 3}'))
    with pytest.raises(ConfigError, match=r"model\.arguments.*wide"):
        build_model(arguments.model, EXAMPLES / "x.yaml")
    no_model = parse_config(MINIMAL.replace("hosts.py:DigitsCNN", "collections:OrderedDict"))
    with pytest.raises(ConfigError, match=r"not a torch\.nn\.Module"):
        build_model(no_model.model, EXAMPLES / "x.yaml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{start: 1, every: 4, until: 0.5}", Schedule(1, 4, 0.5)),
        ("{trigger: plateau, patience: 5}", Plateau(2, 5)),
        ("{trigger: gap, min_delta: 0.1, max_gap: 0.3}", Gap(2, 3, 0.1, 0.3)),
        ("{kind: random, every: 1}", Times((2,))),  # of 4 epochs growth ends with the second
        ("{kind: fixed, blueprint: wide}", Schedule()),
    ],
)
def test_a_policy_is_what_its_section_says(given: str, expected: Trigger) -> None:
    common = "{max_active: 2, training_epochs: 9, budget: {parameters: 5, latency_ms: 0.5}, "
    config = parse_config(MINIMAL.replace("epochs: 3", "epochs: 4")
                          + f"growth: {{policy: {common}{given[1:]}}}\n")
    policy = make_policy(config)
    assert policy.trigger == expected
    assert policy.budget == Budget(parameters=5, latency_ms=0.5, batch_size=64)
    assert policy.max_active == 2 and vars(policy.care)["training_epochs"] == 9
    assert type(policy.chooser) is {
        "heuristic": FieldRanking, "random": AnyChoice, "fixed": InTurn}[config.growth.policy.kind]


def test_a_random_twin_of_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"growth.policy: no epoch to draw from"):
        make_policy(parse_config(MINIMAL + "growth: {policy: {kind: random, start: 3}}\n"))
