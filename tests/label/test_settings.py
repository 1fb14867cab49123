import pytest

from recap_ds.errors import UsageError
from recap_ds.recipe import dump_config, load_config


@pytest.mark.parametrize(
    ("text", "frames"),
    [("50", 50), ("'7'", 7), ("1.0s", 30), ("0.5s", 15), ("2s", 60), ("0.001s", 1), ("episode", None)],
)
def test_a_lookahead_is_frames_seconds_or_an_episode(text, frames, tmp_path):
    config = load_config(None, [f"label.lookahead={text}"])
    assert config.label.lookahead_frames(fps=30.0) == frames
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml").label == config.label


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "s", "0s", "-1s", "1.0 s", "episodes", "nan", "infs", "null"])
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError, match=r"label\.lookahead"):
        load_config(None, [f"label.lookahead={text}"])
