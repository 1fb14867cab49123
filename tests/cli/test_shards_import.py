import argparse
import io
import json
import sys
import tarfile

import numpy as np
import pytest

from recap_ds.cli import shards_import
from recap_ds.data.lerobot.frames import ParquetFrames
from recap_ds.data.manifest import Manifest
from recap_ds.data.verify import verify_shards
from recap_ds.errors import UsageError
from recap_ds.processing.images import decode_jpeg
from tests.data.lerobot.tiny_dataset import HEIGHT, TASKS, WIDTH, actions, shade, states, write_dataset
from tests.data.made_episodes import FlatFrames, made_episode, read_back, write

LENGTHS = (15, 7, 11)
# Episode 0 fails, the others succeed at their last frame; in episode 1 a human takes over at frame 3.
SUCCESS = {"next.success": lambda episode, length: [episode > 0 and frame == length - 1 for frame in range(length)]}
TAKEOVER = {"intervention": lambda episode, length: [episode == 1 and frame >= 3 for frame in range(length)]}


def parse(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    shards_import.add_parser(parser.add_subparsers())
    return parser.parse_args(["import", *map(str, words)])


def run_import(*words, jobs=1) -> int:
    args = parse(*words, "--jobs", jobs)
    return args.run(args)


def read_samples(folder) -> dict[tuple[str, int], dict]:
    """(episode, frame) -> members of the sample, decoded, from the tars alone."""
    samples = {}
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                members.setdefault(key, {})[suffix] = tar.extractfile(member).read()
        for sample in members.values():
            record = json.loads(sample["json"])
            arrays = {name: np.load(io.BytesIO(data)) for name, data in sample.items() if name.endswith(".npy")}
            images = {name: decode_jpeg(data) for name, data in sample.items() if name.endswith(".jpg")}
            samples[record["episode"], record["frame"]] = {"json": record, "shard": path.name, **arrays, **images}
    return samples


def test_a_demo_set_becomes_the_same_samples(tmp_path, capsys):
    source = write_dataset(tmp_path / "cubes", LENGTHS)
    assert run_import(source, tmp_path / "out", "--source", "demo", "--chunk-size", 4) == 0
    printed = capsys.readouterr()
    assert "cubes: 3 episodes, 33 frames at 10 fps\noutcomes: 3 success" in printed.out
    assert "images: 64 px squares from top 64x48" in printed.out
    assert "wrote 33 samples in 1 shards" in printed.out
    assert printed.err == ""  # no bar where stderr is no terminal

    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.action_width, manifest.td_horizon, manifest.fps, manifest.image_size) == (4, 4, 10.0, WIDTH)
    assert {name: task.longest for name, task in manifest.tasks.items()} == {TASKS[0]: 15, TASKS[1]: 7}
    samples = read_samples(tmp_path / "out")
    assert set(samples) == {(f"cubes/{e}", frame) for e, length in enumerate(LENGTHS) for frame in range(length)}
    for (name, frame), sample in samples.items():
        episode = int(name.removeprefix("cubes/"))
        length = LENGTHS[episode]
        np.testing.assert_array_equal(sample["state.npy"], states(episode, length)[frame])
        num_valid = min(4, length - frame)
        expected = np.zeros((4, 2), np.float32)
        expected[:num_valid] = actions(episode, length)[frame : frame + num_valid]
        np.testing.assert_array_equal(sample["actions.npy"], expected)
        assert sample["json"]["prompt"] == TASKS[episode % 2]
        _assert_shows(sample["top.jpg"], episode, frame)
        # The last four frames see the success inside their window: no next observation.
        assert ("top.next.jpg" in sample) == (frame + 4 < length)
        if "top.next.jpg" in sample:
            _assert_shows(sample["top.next.jpg"], episode, frame + 4)


def _assert_shows(image: np.ndarray, episode: int, frame: int) -> None:
    """The stored square holds the grey of that frame, between black bars."""
    assert image.shape == (WIDTH, WIDTH, 3)
    bar = (WIDTH - HEIGHT) // 2
    # Away from the bars' edges, where JPEG rings.
    assert np.abs(image[bar + 8 : -bar - 8].astype(int) - shade(episode, frame)).max() <= 8
    assert image[: bar - 2].max() <= 8


def test_the_same_import_again_is_known_and_a_changed_one_is_told(tmp_path, capsys):
    source, out = write_dataset(tmp_path / "cubes", LENGTHS, stored_as="image"), tmp_path / "out"
    run_import(source, out, "--source", "demo")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    source = source.rename(tmp_path / "moved")
    capsys.readouterr()
    run_import(source, out, "--source", "demo", "--name", "cubes")
    assert capsys.readouterr().out == f"cubes: already in {out}, 33 samples of 3 episodes\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UsageError, match="data set cubes is there, imported with other action_width, td_horizon"):
        run_import(source, out, "--source", "demo", "--name", "cubes", "--chunk-size", 4)
    labels = tmp_path / "labels.csv"
    labels.write_text("episode_index,outcome\n0,failure\n")
    with pytest.raises(UsageError, match="data set cubes is there, imported with other files"):
        run_import(source, out, "--source", "demo", "--name", "cubes", "--labels", labels)


@pytest.mark.parametrize("stored_as", ["image", "video"])
def test_v21_and_v30_of_the_same_data_become_the_same_shards(tmp_path, stored_as):
    samples = []
    for version in ("v2.1", "v3.0"):
        # One episode per video in both: the encoder is given the same, and decoding may be compared bit by bit.
        root = tmp_path / version / "set"
        write_dataset(root, LENGTHS, columns=SUCCESS, stored_as=stored_as, version=version, episodes_per_file=1)
        run_import(root, tmp_path / version / "out", "--source", "auto", "--chunk-size", 4)
        samples.append(read_samples(tmp_path / version / "out"))
    old, new = samples
    assert len(old) == sum(LENGTHS) and old.keys() == new.keys()
    for place, sample in old.items():
        assert sample.keys() == new[place].keys()
        origin = sample["json"].pop("origin"), new[place]["json"].pop("origin")
        assert origin[0] == origin[1].replace("v3.0", "v2.1")
        for name, value in sample.items():
            np.testing.assert_array_equal(value, new[place][name], strict=isinstance(value, np.ndarray))


def test_an_import_that_is_stopped_says_that_it_can_go_on(tmp_path, monkeypatch, capsys):
    source = write_dataset(tmp_path / "cubes", LENGTHS, stored_as="image")
    read = ParquetFrames.read

    def read_or_stop(self, frames):
        if "episode" in stop and self.first_row == LENGTHS[0]:
            raise KeyboardInterrupt
        return read(self, frames)

    stop = {"episode"}
    monkeypatch.setattr(ParquetFrames, "read", read_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run_import(source, tmp_path / "out", "--source", "demo")
    assert capsys.readouterr().err == "stopped; the same command goes on with the pictures it has\n"
    stop.clear()
    run_import(source, tmp_path / "out", "--source", "demo")
    assert "went on: pictures of 1 episodes were there" in capsys.readouterr().out
    assert len(read_samples(tmp_path / "out")) == sum(LENGTHS)


def test_sources_join_in_one_folder_and_control_decides_the_source(tmp_path, capsys):
    out = tmp_path / "out"
    write_dataset(tmp_path / "policy", LENGTHS, columns=SUCCESS)
    write_dataset(tmp_path / "corrected", LENGTHS, columns=SUCCESS | TAKEOVER, codec="libsvtav1")
    run_import(tmp_path / "policy", out, "--source", "auto", "--name", "first")
    run_import(tmp_path / "corrected", out, "--source", "intervention", jobs=2)
    assert "corrected: 3 episodes, 33 frames at 10 fps, 4 under human control\noutcomes: 2 success, 1 failure" in (
        capsys.readouterr().out
    )
    counts = Manifest.load(out).counts
    assert {source: (count.samples, count.human_frames) for source, count in counts.items()} == {
        "auto": (33 + 29, 0),
        "intervention": (4, 4),
    }
    samples = read_samples(out)
    assert len(samples) == 66
    for (name, frame), sample in samples.items():
        human = name == "corrected/1" and frame >= 3
        assert sample["shard"].startswith("intervention-" if human else "auto-")
        assert sample["json"]["control"] == ("human" if human else "policy")
        assert sample["json"]["outcome"] == ("failure" if name.endswith("/0") else "success")


def test_stride_and_no_next(tmp_path):
    write_dataset(tmp_path / "set", (11,))
    run_import(tmp_path / "set", tmp_path / "out", "--source", "demo", "--stride", 5, "--no-next", "--image-size", 32)
    samples = read_samples(tmp_path / "out")
    assert sorted(frame for _, frame in samples) == [0, 5, 10]
    assert not any("next" in member for sample in samples.values() for member in sample)
    assert {sample["top.jpg"].shape for sample in samples.values()} == {(32, 32, 3)}
    # Actions stay at the native rate.
    np.testing.assert_array_equal(samples["set/0", 5]["actions.npy"][:6], actions(0, 11)[5:])


def test_values_far_off_are_printed(tmp_path, capsys):
    glitch = {"observation.force": lambda _, length: [1e5 if t == 9 else 0.1 * (t % 7) for t in range(length)]}
    write_dataset(tmp_path / "set", (210,), columns=glitch, stored_as="image")
    run_import(tmp_path / "set", tmp_path / "out", "--source", "demo", "--state-keys", "observation.force")
    assert "look at: episode set/0, frame 9: state[0] is 1e+05, 98 % of the values" in capsys.readouterr().out


def test_rewards_are_carried_over(tmp_path):
    write_dataset(tmp_path / "set", (6,), columns={"next.reward": lambda _, length: [0.5 * t for t in range(length)]})
    run_import(tmp_path / "set", tmp_path / "out", "--source", "demo", "--chunk-size", 3)
    rewards = {frame: sample["rewards.npy"].tolist() for (_, frame), sample in read_samples(tmp_path / "out").items()}
    assert rewards[0] == [0.0, 0.5, 1.0]
    assert rewards[5] == [2.5, 0.0, 0.0]


def test_policy_data_without_outcomes_is_refused_before_anything_is_written(tmp_path):
    write_dataset(tmp_path / "set", LENGTHS)
    with pytest.raises(UsageError, match="no outcome is recorded for 3 auto episodes: 0, 1, 2"):
        run_import(tmp_path / "set", tmp_path / "out", "--source", "auto")
    assert not list((tmp_path / "out").glob("*.tar"))
    (tmp_path / "labels.csv").write_text("episode_index,outcome\n0,success\n1,failure\n2,truncated\n")
    run_import(tmp_path / "set", tmp_path / "out", "--source", "auto", "--labels", tmp_path / "labels.csv")
    outcomes = Manifest.load(tmp_path / "out").counts["auto"].outcomes
    assert outcomes == {"success": 1, "failure": 1, "truncated": 1, "unknown": 0}


def test_a_missing_package_is_told_with_the_way_to_install_it(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("recap_ds.data.lerobot.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"needs the package av: pip install 'recap_ds\[lerobot\]'"):
        run_import(tmp_path, tmp_path / "out", "--source", "demo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chunk-size", "0"], "'0' is not a whole number of at least 1"),
        (["--stride", "two"], "'two' is not a whole number of at least 1"),
        (["--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["--source", "teleop"], "invalid choice: 'teleop'"),
        (["--camera", "top"], "'top' is not NEW=OLD"),
        (["--camera", "a.b=top"], "'a.b=top' is not NEW=OLD"),
        (["--delta-actions", "5-3"], "'5-3' is not a list"),
        (["--delta-actions", "x"], "'x' is not a list"),
        (["--success-progress", "90"], "'90' is not a number between 0 and 1"),
    ],
)
def test_wrong_values_are_refused(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        parse(tmp_path, tmp_path / "out", "--source", "demo", *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_cameras_are_chosen_and_named_and_may_be_lacking(tmp_path, capsys):
    out = tmp_path / "out"
    write_dataset(tmp_path / "set", (6,), columns=SUCCESS)
    write_dataset(tmp_path / "other", (5,), columns=SUCCESS, stored_as="image")
    with pytest.raises(UsageError, match="--camera wrist=none: import a data set that has this camera first"):
        run_import(tmp_path / "set", out, "--source", "demo", "--camera", "front=top", "--camera", "wrist=none")
    args = ["--source", "demo", "--chunk-size", 4]
    run_import(tmp_path / "other", out, *args, "--camera", "front=image", "--image-size", 32)
    with pytest.raises(UsageError, match=r"cameras is \('front',\) there but \('top',\) here"):
        run_import(tmp_path / "set", out, *args)
    run_import(tmp_path / "set", out, *args, "--camera", "front=observation.images.top")  # the folder says how large
    assert Manifest.load(out).cameras == ("front",)
    assert {sample["front.jpg"].shape for sample in read_samples(out).values()} == {(32, 32, 3)}


def test_a_camera_that_a_data_set_lacks_is_masked_in_training(tmp_path):
    out = tmp_path / "out"
    write(out, [made_episode(read_frames=FlatFrames(("top", "wrist")))])
    write(out, [made_episode(name="new/0")], dataset="new", absent_cameras=("wrist",))
    assert Manifest.load(out).cameras == ("top", "wrist") and verify_shards(out) == []
    suffixes = {sample.record.episode: set(sample.members) for sample in read_back(out)}
    assert "wrist.jpg" in suffixes["set/0"] and "wrist.jpg" not in suffixes["new/0"]
    with pytest.raises(UsageError, match="--camera top=none: this data set has a camera of that name"):
        write(out, [made_episode(name="third/0")], dataset="third", absent_cameras=("top",))


@pytest.mark.parametrize(("text", "dims"), [("0-2,5", (0, 1, 2, 5)), ("3", (3,)), ("1,0-1", (1, 0))])
def test_dims_are_read_as_ranges(tmp_path, text, dims):
    assert parse(tmp_path, tmp_path / "out", "--source", "demo", "--delta-actions", text).delta_actions == dims


def test_a_camera_given_twice_is_refused(tmp_path):
    write_dataset(tmp_path / "set", (3,), stored_as="image")
    with pytest.raises(UsageError, match=r"--camera A=\.\.\.: is given twice"):
        run_import(tmp_path / "set", tmp_path, "--source", "demo", "--camera", "A=image", "--camera", "a=none")


def test_a_name_with_a_slash_is_refused(tmp_path):
    write_dataset(tmp_path / "set", (3,))
    with pytest.raises(UsageError, match="has no slash"):
        run_import(tmp_path / "set", tmp_path / "out", "--source", "demo", "--name", "a/b")
