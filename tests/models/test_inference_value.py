"""Values for a label job: those that evaluation sees, row by row, and None where a critic cannot say."""

import pytest
import torch

from recap_ds.errors import UsageError
from recap_ds.models.inference_value import predict_values
from recap_ds.models.losses import local_counts, normalizers
from tests.models.test_stages import DISTRIBUTIONAL, IQL, POLICY
from tests.models.tiny_policy import READY, build, rows


@pytest.mark.parametrize("stage", [{}, IQL], ids=["joint", "iql"])
def test_an_iql_critic_gives_values_and_advantages(stage):
    policy, batch = build(**stage)
    policy.eval()
    seen = policy(batch, "evaluate", READY, normalizers(local_counts(batch)), False)
    told = predict_values(policy, batch.observation, batch.actions, batch.td_action_valid)
    torch.testing.assert_close(told.value, seen.v)
    torch.testing.assert_close(told.advantage, seen.q - seen.v)
    assert told.value.dtype == told.advantage.dtype == torch.float32 and not told.value.requires_grad
    alone = predict_values(policy, batch.observation)
    assert alone.advantage is None and torch.equal(alone.value, told.value)


def test_a_distributional_critic_gives_values_alone():
    policy, batch = build(**DISTRIBUTIONAL)
    policy.eval()
    seen = policy(batch, "evaluate", READY, normalizers(local_counts(batch)), False)
    told = predict_values(policy, batch.observation, batch.actions, batch.td_action_valid)
    torch.testing.assert_close(told.value, seen.v)
    assert told.advantage is None and (told.value > -1.0).all() and (told.value < 0.0).all()


def test_a_row_is_judged_by_itself():
    policy, batch = build(**DISTRIBUTIONAL)
    policy.eval()
    whole = predict_values(policy, batch.observation).value
    part = predict_values(policy, rows(batch, slice(2, 5)).observation).value
    torch.testing.assert_close(part, whole[2:5])


def test_what_has_no_critic_is_refused():
    policy, batch = build(**POLICY)
    with pytest.raises(UsageError, match=r"--checkpoint: has no critic"):
        predict_values(policy.eval(), batch.observation)
    policy, batch = build()
    del policy.target_critic
    with pytest.raises(UsageError, match="has no target_critic"):
        predict_values(policy.eval(), batch.observation)
