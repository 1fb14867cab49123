"""Configuration: what loads, and the one line a user gets for what does not."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from recap_ds.config import PiStarRECAPConfig, TrainingConfig, batch_sizes
from recap_ds.errors import UsageError
from recap_ds.recipe import changed_keys, dump_config, load_config

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.yaml"))

PI05_PROMPTS = ["data.prompt_format=pi05", "data.normalization=quantile"]
REFERENCE = """\
name: "pi_star_recap"
model: {vlm_model_name: "google/paligemma-3b-pt-224", freeze_vlm: true, action_expert_hidden_size: 1024, action_expert_num_layers: 6}
iql: {discount: 0.99, expectile: 0.7, temperature: 0.5}
recap: {demo_weight: 1.0, auto_weight: 1.0, intervention_weight: 2.0}
training: {batch_size: 32, learning_rate: 1e-4, use_amp: true}
"""  # noqa: E501 - the form users know, to the letter


@pytest.fixture
def write_recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(*arguments):
    """The UsageError's message, checked to be one line."""
    with pytest.raises(UsageError) as caught:
        load_config(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_reference_recipe_loads_as_it_stands(write_recipe):
    config = load_config(write_recipe(REFERENCE))
    assert config.name == "pi_star_recap"
    assert config.model.action_expert_num_layers == 6
    assert (config.iql.discount, config.iql.expectile, config.iql.temperature) == (0.99, 0.7, 0.5)
    assert config.recap.source_weights == (1.0, 1.0, 2.0)
    assert config.training.learning_rate == 1e-4  # PyYAML reads 1e-4 as a string
    assert config.training.use_amp is True


def test_no_recipe_gives_the_defaults_and_an_empty_one_too(write_recipe):
    assert load_config(None) == PiStarRECAPConfig() == load_config(write_recipe("# nothing\n"))


def test_overrides_win_over_the_recipe(write_recipe):
    recipe = write_recipe(REFERENCE + "data: {mixture: {demo: 0.5, auto: 0.5}}\n")
    config = load_config(
        recipe,
        [
            "training.learning_rate=3e-5",
            "chunk_size=16",
            "data.mixture.auto=2",
            "value.max_length.fold the shirt=400",
            "data.cameras=[top, wrist]",
            "training.ema_decay=null",
        ],
    )
    assert config.training.learning_rate == 3e-5
    assert config.training.batch_size == 32
    assert config.chunk_size == 16
    assert config.data.mixture == {"demo": 0.5, "auto": 2.0}
    assert config.value.max_length == {"fold the shirt": 400}
    assert config.data.cameras == ("top", "wrist")
    assert config.training.ema_decay is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("iql: {expectle: 0.7}", "unknown key 'iql.expectle'; did you mean 'iql.expectile'?"),
        ("trainning: {batch_size: 8}", "unknown key 'trainning'"),
        ("training: {chunk_size: 8}", "unknown key 'training.chunk_size'; did you mean 'chunk_size'?"),
        ("iql: 0.7", "'iql' is a section and needs keys below it, found 0.7"),
        ("- 1", "expected 'section:' blocks, found list"),
        ("iql: {", "line 2: not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_place_and_the_mend(write_recipe, text, expected):
    recipe = write_recipe(text + "\n")
    message = refusal(recipe)
    assert expected in message
    assert str(recipe) in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("iql.expectle=0.7", "unknown key 'iql.expectle'; did you mean 'iql.expectile'?"),
        ("iql.expectile", "an override is written section.key=value"),
        ("training.batch_size=many", "training.batch_size: input should be a valid integer"),
        ("training.batch_size=1.5", "training.batch_size: input should be a valid integer"),
        ("training.batch_size=0", "training.batch_size: input should be greater than or equal to 1, got 0"),
        ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number"),
        ("iql.expectile=0.5", "iql.expectile: input should be greater than 0.5"),
        ("recap.demos=labeled", "recap.demos: input should be 'positive' or 'labelled', got 'labeled'"),
        ("name=../up", "name: string should match pattern"),
        ("lora={enabled: true}", "unknown key 'lora'"),
        ("data.mixture.robot=1", "data.mixture.robot"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override, expected):
    assert expected in refusal(None, [override])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.enabled=true", "model.freeze_vlm=false"], "lora.enabled: adapters sit on a frozen VLM"),
        (["training.num_training_steps=100"], "training.num_warmup_steps: 1000 warm-up steps leave nothing of 100"),
        (["recap.advantage_window=100"], "recap.advantage_window_min: cannot exceed"),
        (["model.conv_stem=true"], "model.conv_stem: only the tiny VLM has one"),
        (["data.mixture.demo=0"], "data.mixture: no source has a positive weight"),
        (
            ["data.prompt_format=pi05"],
            "data.prompt_format: pi05 writes states of [-1, 1] in bins; set data.normalization",
        ),
        (
            [*PI05_PROMPTS, "model.action_expert=pi_joint", "model.pi_version=pi0"],
            "data.prompt_format: pi05, but model.pi_version=pi0 is shown the state by itself",
        ),
        (
            [*PI05_PROMPTS, "training.stage=critic", "value.critic=distributional", "value.reads_state=false"],
            "data.prompt_format: pi05 tells the state, and value.reads_state=false hides it",
        ),
        (["model.advantage_conditioning=text"], "model.advantage_conditioning: text is read in the VLM's layers"),
        (
            [
                "model.action_expert=pi_joint",
                "model.advantage_conditioning=text",
                "recap.policy_extraction=weighted",
            ],
            "model.advantage_conditioning: text, but recap.policy_extraction=weighted trains without an indicator",
        ),
        (["data.camera_slots.base=top", "data.cameras=[top]"], "data.camera_slots: says what data.cameras says"),
        (["data.camera_slots.base=null"], "data.camera_slots: needs a camera in at least one slot"),
        (["data.camera_slots.a=top", "data.camera_slots.b=top"], "data.camera_slots: needs a camera in at least one"),
        (["model.qv_num_heads=7"], "model.qv_{hidden_size,num_heads}: 512 does not divide into 7 heads"),
        (["value.critic=distributional"], "value.critic: distributional is trained in stage critic"),
        (["value.backbone=own"], "value.backbone: own is for stage critic; in stage joint critics share"),
        (["value.vlm_model_name=x/y"], "value.vlm_model_name: only a backbone of the critic's own reads it"),
        (["value.vlm_revision=main"], "value.vlm_revision: only a backbone of the critic's own reads it"),
        (
            ["training.stage=policy", "recap.sft=true", "value.backbone=own", "value.vlm_model_name=x/y"],
            "value.backbone: stage policy has no critic to have a VLM of its own",
        ),
        (
            ["training.stage=critic", "value.backbone=own"],
            "value.vlm_model_name: value.backbone=own needs a hub id or a folder with config.json",
        ),
        (
            ["training.stage=critic", "value.backbone=own", "value.vlm_model_name=tiny"],
            "folder with config.json; the tiny VLM is to be had with value.backbone=shared",
        ),
        (
            [
                "training.stage=critic",
                "value.backbone=own",
                "value.vlm_model_name=x/y",
                "model.vlm_model_name=tiny",
                "model.conv_stem=true",
            ],
            "model.conv_stem: only the tiny VLM has one",
        ),
        (["value.reads_state=false"], "value.reads_state: IQL critics always read the state"),
        (
            ["training.stage=critic", "value.critic=distributional", "value.reward=environment"],
            "value.critic: distributional learns sparse_time returns",
        ),
        (["training.stage=policy"], "data.labels: stage policy needs the tag of labels"),
        (["data.labels=mine"], "data.labels: only stage policy reads it, and training.stage is joint"),
        (["training.stage=critic", "recap.sft=true"], "recap.sft: only stage policy reads it"),
        (["training.stage=policy", "recap.sft=true", "data.labels=mine"], "recap.sft: takes every sample as positive"),
        (
            ["training.stage=policy", "recap.sft=true", "recap.policy_extraction=both"],
            "recap.sft: has no advantages to weigh with",
        ),
        (
            ["training.stage=policy", "recap.sft=true", "model.freeze_vlm=false", "model.stop_gradient=true"],
            "model.stop_gradient: in stage policy nothing but the expert trains the VLM",
        ),
        (
            ["model.action_token_weight=1", "model.freeze_vlm=false", "data.normalization=quantile"],
            "model.action_token_weight: tokens attend to every layer of the VLM, which is kept for pi_joint alone",
        ),
        (
            ["model.action_token_weight=1", "model.action_expert=pi_joint", "data.normalization=quantile"],
            "model.action_token_weight: would train the VLM, which is frozen",
        ),
        (
            ["model.action_token_weight=1", "model.action_expert=pi_joint", "lora.enabled=true"],
            "model.action_token_weight: tokens stand for actions of [-1, 1]; set data.normalization=quantile",
        ),
        (
            ["training.stage=policy", "recap.sft=true", "evaluation.gate=mae"],
            "evaluation.gate: stage policy has no value function to take 'mae' of",
        ),
        (["evaluation.gate=nll"], "evaluation.gate: nll is a figure of value.critic=distributional"),
        (
            ["training.early_stop_evaluations=3", "data.held_out_fraction=0"],
            "training.early_stop_evaluations: needs held-out episodes",
        ),
    ],
)
def test_rules_between_keys_name_them(overrides, expected):
    assert expected in refusal(None, overrides)


def test_a_missing_recipe_is_a_usage_error(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "none.yaml")


def test_the_configuration_is_frozen():
    config = PiStarRECAPConfig()
    with pytest.raises(ValidationError):
        config.training.batch_size = 8
    with pytest.raises(ValidationError):
        config.chunk_size = 8


def test_sections_take_dicts_in_plain_python():
    config = PiStarRECAPConfig(chunk_size=10, max_action_dim=14, model={"vlm_model_name": "tiny", "conv_stem": True})
    assert config.model.conv_stem
    assert config.model.num_q_networks == 2


def test_derived_values():
    config = PiStarRECAPConfig(chunk_size=5, iql={"discount": 0.9}, training={"num_training_steps": 30_000})
    assert config.frame_discount**5 == pytest.approx(0.9)
    assert config.indicator_warmup_steps == 3000
    assert PiStarRECAPConfig(recap={"indicator_warmup_steps": 0}).indicator_warmup_steps == 0


@pytest.mark.parametrize(
    ("overrides", "heads", "by_td"),
    [
        ([], ("action_expert", "critic", "target_critic"), True),
        (["training.stage=critic"], ("critic", "target_critic"), True),
        (["training.stage=critic", "value.critic=distributional"], ("critic",), False),
        (["training.stage=policy", "data.labels=mine"], ("action_expert",), False),
    ],
)
def test_a_stage_says_what_it_builds_and_reads(overrides, heads, by_td):
    config = load_config(None, overrides)
    assert config.heads == heads and config.learns_by_td == by_td


@pytest.mark.parametrize(
    ("sizes", "world", "accumulation", "total"),
    [
        ({"batch_size": 8}, 4, 1, 32),
        ({"batch_size": 8, "gradient_accumulation_steps": 3}, 2, 3, 48),
        ({"batch_size": 8, "global_batch_size": 64}, 2, 4, 64),
        ({"batch_size": 8, "global_batch_size": 64, "gradient_accumulation_steps": 4}, 2, 4, 64),
    ],
)
def test_batch_sizes(sizes, world, accumulation, total):
    derived = batch_sizes(TrainingConfig(**sizes), world)
    assert (derived.micro, derived.accumulation, derived.world, derived.total) == (8, accumulation, world, total)


@pytest.mark.parametrize(
    ("sizes", "world", "would_divide"),
    [
        ({"batch_size": 8, "global_batch_size": 100}, 3, [96, 120]),
        ({"batch_size": 8, "global_batch_size": 10}, 2, [16, 32]),
        ({"batch_size": 8, "global_batch_size": 64, "gradient_accumulation_steps": 3}, 2, [48]),
    ],
)
def test_batch_sizes_that_do_not_divide_say_which_would(sizes, world, would_divide):
    with pytest.raises(UsageError, match=r"training\.global_batch_size") as caught:
        batch_sizes(TrainingConfig(**sizes), world)
    assert f"; {' or '.join(map(str, would_divide))} would be" in str(caught.value)
    for size in would_divide:  # the advice works
        assert batch_sizes(TrainingConfig(**{**sizes, "global_batch_size": size}), world).total == size


def test_a_dumped_configuration_loads_back_equal(write_recipe):
    overrides = ["data.mixture.demo=0.25", "data.cameras=[top]", "value.max_length.fold=40", "training.ema_decay=null"]
    config = load_config(write_recipe(REFERENCE), overrides)
    assert load_config(write_recipe(dump_config(config))) == config


def test_camera_slots_keep_their_order_and_may_be_empty(write_recipe):
    recipe = write_recipe("data: {camera_slots: {base: top, left: null, right: wrist}}\n")
    config = load_config(recipe, ["data.camera_slots.left=side", "data.camera_slots.right=null"])
    assert list(config.data.camera_slots.items()) == [("base", "top"), ("left", "side"), ("right", None)]
    assert load_config(write_recipe(dump_config(config))) == config


def test_changed_keys_are_dotted_and_complete():
    old = PiStarRECAPConfig().model_dump()
    new = PiStarRECAPConfig(chunk_size=12, iql={"discount": 0.9}).model_dump()
    assert changed_keys(old, new) == ["chunk_size", "iql.discount"]
    assert changed_keys(old, old) == []
    assert changed_keys({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ["a.c"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(recipe):
    config = load_config(recipe)
    assert config.training.num_training_steps > config.training.num_warmup_steps
