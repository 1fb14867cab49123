"""Writes a tiny LeRobot v3.0 data set with pyarrow and PyAV, to be read back, or spoiled and refused, by the tests.

Pictures are flat grey: ``shade(episode, frame)``, far enough apart that a lossy codec cannot take one for another.
"""

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
HEIGHT, WIDTH = 48, 64
TASKS = ("lift the cube", "open the door")
DATA_FILE = "data/chunk-000/file-000.parquet"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"
VIDEO_FILE = "videos/observation.images.top/chunk-000/file-000.mp4"
# B-frames and rare keyframes: what other tools write, and the harder case for a seek.
CODEC_OPTIONS = {"libx264": {"g": "12", "bf": "3", "crf": "18"}, "libsvtav1": {"g": "2", "crf": "30", "preset": "12"}}


def shade(episode: int, frame: int) -> int:
    return 16 + (episode * 97 + frame * 23) % 224


def picture(episode: int, frame: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), shade(episode, frame), np.uint8)


def states(episode: int, num_frames: int) -> np.ndarray:
    """[T, 3] float32."""
    return (100 * episode + np.arange(num_frames)[:, None] + np.array([0.0, 0.25, 0.5])).astype(np.float32)


def actions(episode: int, num_frames: int) -> np.ndarray:
    """[T, 2] float32."""
    return -states(episode, num_frames)[:, :2]


def write_dataset(
    root: Path,
    lengths: tuple[int, ...] = (15, 7, 11),
    codec: str = "libx264",
    stored_as: str = "video",
    columns: dict[str, Callable[[int, int], list[Any]]] | None = None,
    task_column: str = "__index_level_0__",
) -> Path:
    """``columns`` adds features of shape [1]: name -> (episode, num_frames) -> one value per frame."""
    columns = columns or {}
    camera = "observation.images.top" if stored_as == "video" else "observation.image"
    rows: dict[str, list[Any]] = {name: [] for name in ("observation.state", "action", *columns)}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        rows[name] = []
    for episode, length in enumerate(lengths):
        rows["observation.state"] += states(episode, length).tolist()
        rows["action"] += actions(episode, length).tolist()
        for name, make in columns.items():
            rows[name] += make(episode, length)
        rows["timestamp"] += [frame / FPS for frame in range(length)]
        rows["frame_index"] += range(length)
        rows["episode_index"] += [episode] * length
        rows["index"] += range(len(rows["index"]), len(rows["index"]) + length)
        rows["task_index"] += [episode % len(TASKS)] * length
    table = pa.table(rows)
    float_list = pa.list_(pa.float32())
    for name, kind in (("observation.state", float_list), ("action", float_list), ("timestamp", pa.float32())):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    everything = [(episode, frame) for episode, length in enumerate(lengths) for frame in range(length)]
    if stored_as == "image":
        cells = [{"bytes": _png(*place), "path": f"frame-{place[1]:06d}.png"} for place in everything]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = table.append_column(camera, pa.array(cells, kind))
    else:
        write_video(root / VIDEO_FILE, [picture(*place) for place in everything], codec)
    _write_parquet(root / DATA_FILE, table, row_group_size=5)
    _write_meta(root, lengths, camera, stored_as, table, columns, task_column)
    return root


def write_video(path: Path, pictures: list[np.ndarray], codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(FPS), options=CODEC_OPTIONS[codec])
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def plain_decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_column(path: Path, name: str, change: Callable[[list[Any]], object]) -> None:
    table = pq.read_table(path)
    values = table[name].to_pylist()
    change(values)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(values, table.schema.field(name).type)), path)


def _png(episode: int, frame: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(episode, frame)).save(buffer, "PNG")
    return buffer.getvalue()


def _write_parquet(path: Path, table: pa.Table, row_group_size: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def _write_meta(root, lengths, camera, stored_as, table, columns, task_column) -> None:
    ends = np.cumsum(lengths).tolist()
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    zeros = [0] * len(lengths)
    episodes = {
        "episode_index": list(range(len(lengths))),
        "tasks": [[TASKS[episode % len(TASKS)]] for episode in range(len(lengths))],
        "length": list(lengths),
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        "dataset_from_index": starts,
        "dataset_to_index": ends,
    }
    if stored_as == "video":
        episodes |= {
            f"videos/{camera}/chunk_index": zeros,
            f"videos/{camera}/file_index": zeros,
            f"videos/{camera}/from_timestamp": [start / FPS for start in starts],
            f"videos/{camera}/to_timestamp": [end / FPS for end in ends],
        }
    _write_parquet(root / EPISODES_FILE, pa.table(episodes))
    _write_parquet(
        root / "meta/tasks.parquet", pa.table({"task_index": list(range(len(TASKS))), task_column: list(TASKS)})
    )
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]},
        camera: {"dtype": stored_as, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]},
        **{name: {"dtype": str(table[name].type), "shape": [1], "names": None} for name in columns},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(TASKS),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
