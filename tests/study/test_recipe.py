"""Recipes of studies that no job could run: said in one line, before anything runs."""

import pytest

from tests.said import one_line


def arm(name="a", **values):
    """A recipe's arms: three that are as they should be, and ``name``."""
    after = {"by": "plain", "collect": {"episodes": 1}}
    arms = {"plain": {"method": "imitation"}, "judge": {"method": "imitation", "policy_of": "plain"}}
    return {"arms": {**arms, "next": {"method": "imitation", "after": after}, name: {"method": "imitation", **values}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arm": {}}, "unknown key 'arm'; did you mean 'arms'?"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [0, 1, 0]}, "seeds: says 0 twice"),
        ({"seeds": [-1]}, "seeds.0: input should be greater than or equal to 0"),
        ({"seeds": [300_000_000]}, "evaluation: evaluation.rollout_seed: input should be less than 2147483648"),
        (
            {"env_settings": ["collect.stall_frames=3"]},
            "env_settings: collect.stall_frames: does not belong to the env",
        ),
        ({"env": "metaworld:a,b,c", "evaluation": {"episodes": 2}}, "episodes: 2 are too few for the 3 tasks of metaw"),
        ({"label_settings": ["label.lokahead=3"]}, "critic: the command line: unknown key 'label.lokahead'"),
        ({"label_settings": ["recap.sft=true"]}, "label_settings: recap.sft: is settled by the critic"),
        ({"joint": {"recipe": "policy.yaml", "settings": ["name=x"]}}, "joint: settings: leave out 'name=x'"),
        (arm(name="a b"), "arms.a b: name it with letters, digits, - and _"),
        (arm(seeds=[]), "arms.a.seeds: "),
        (arm(seeds=[1, 1]), "arms.a.seeds: says 1 twice"),
        (arm(guidance_betas=[1.0, 2.0, 1.0]), "arms.a.guidance_betas: says 1 twice"),
        (arm(guidance_betas=[-1.0]), "arms.a.guidance_betas.0: input should be greater than or equal to 0"),
        (arm(guidance_betas=[float("nan")]), "arms.a.guidance_betas.0: input should be "),
        (
            arm(method="recap", labels=["label.batch_size=2"]),
            "arms.a: label.batch_size: does not change labels of stor",
        ),
        (
            arm(method="recap", labels=["label.source=iql"]),
            "arms.a: label.source=iql is not to be had from a critic of",
        ),
        (arm(policy_of="a"), "arms.a.policy_of: 'a' has to stand before it"),
        (arm(policy_of="judge"), "arms.a.policy_of: 'judge' trains no policy; name the arm whose policy it judges"),
        (arm(policy_of="plain", seeds=[5]), "arms.a.seeds: 'plain', whose policy it needs, has not all of them"),
        (
            arm(policy_of="plain", settings=["chunk_size=2"]),
            "arms.a.policy_of: trains nothing, so there is no use for ",
        ),
        (arm(policy_of="plain", method="recap"), "arms.a.policy_of: 'plain' is of method imitation; write that here"),
        (arm(after={"by": "judge", "collect": {"episodes": 1}}), "arms.a.after.by: 'judge' trains no policy"),
        (arm(after={"by": "next", "collect": {"episodes": 1}}), "arms.a.after.by: 'next' comes after another arm itse"),
        (
            arm(after={"by": "plain", "collect": {"episodes": 1, "settings": ["collect.stal_frames=1"]}}),
            "arms.a.after.collect: the command line: unknown key 'collect.stal_frames'",
        ),
        (
            arm(after={"by": "plain", "collect": {"episodes": 1, "settings": ["evaluation.guidance_betas=[2]"]}}),
            "arms.a.after.collect: settings: leave out 'evaluation.guidance_betas=[2]'",
        ),
        ({"policy": {"recipe": "none.yaml"}}, "arms.plain: --config none.yaml: cannot be read"),
        ({"policy": {"recipe": "policy.yaml", "settings": ["training.seed=3"]}}, "leave out 'training.seed=3'"),
        ({"pretrain": {}}, "'pretrain.recipe' is missing"),
        ({"deepspeed": "none.json"}, "deepspeed: none.json: cannot be read (No such file or directory)"),
        ({"data": {"episodes": 4, "settings": ["collect.expert_sped=1"]}}, "did you mean 'collect.expert_speed'?"),
        ({"evaluation": {"episodes": 0}}, "evaluation.episodes: "),
        ({"arms": {"a": {"method": "joint"}}}, "arms.a: method joint needs 'joint'"),
        ({"arms": {"a": {"method": "imitation", "labels": ["x=1"]}}}, "arms.a.labels: only method recap reads labels"),
        ({"arms": {"a": {"method": "imitation", "policy_of": "b"}}}, "arms.a.policy_of: there is no arm 'b'"),
        (
            {"arms": {"a": {"method": "recap", "after": {"by": "b", "collect": {"episodes": 1}}}}},
            "arms.a.after.by: there is no arm 'b'",
        ),
        (
            {"arms": {"a": {"method": "recap", "labels": ["recap.demos=labelled"]}}},
            "arms.a: recap.demos is labelled for the labels and positive for the policy",
        ),
    ],
)
def test_a_wrong_recipe_ends_in_one_line_before_anything_runs(desk, change, said, capsys):
    desk.values |= change
    assert desk.study() == 2
    assert said in one_line(capsys)
    assert desk.jobs() == []
