"""Writes a tiny LeRobot data set, v3.0 or v2.1, with pyarrow and PyAV: to be read back, or spoiled and refused.

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

# (episode, num_frames) -> one value per frame.
ColumnValues = Callable[[int, int], list[Any]]

FPS = 10
HEIGHT, WIDTH = 48, 64
TASKS = ("lift the cube", "open the door")
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
VIDEO_KEY, IMAGE_KEY = "observation.images.top", "observation.image"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"
# v2.1: a file per episode, two episodes per chunk.
V2_DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V2_CHUNK_SIZE = 2
DATA_FILE = DATA_PATH.format(chunk_index=0, file_index=0)
VIDEO_FILE = VIDEO_PATH.format(video_key=VIDEO_KEY, chunk_index=0, file_index=0)
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
    columns: dict[str, ColumnValues] | None = None,
    task_column: str = "__index_level_0__",
    episodes_per_file: int = 100,
    version: str = "v3.0",
) -> Path:
    """``columns`` adds features of shape [1]: name -> (episode, num_frames) -> one value per frame."""
    columns = columns or {}
    episodes_per_file = 1 if version == "v2.1" else episodes_per_file
    for first in range(0, len(lengths), episodes_per_file):
        episodes = range(first, min(first + episodes_per_file, len(lengths)))
        place = {"chunk_index": 0, "file_index": first // episodes_per_file}
        if version == "v2.1":
            place = {"episode_chunk": first // V2_CHUNK_SIZE, "episode_index": first}
        frames = [(episode, frame) for episode in episodes for frame in range(lengths[episode])]
        table = _data_table(episodes, lengths, columns)
        if stored_as == "image":
            cells = [{"bytes": _png(*frame), "path": f"frame-{frame[1]:06d}.png"} for frame in frames]
            kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            table = table.append_column(IMAGE_KEY, pa.array(cells, kind))
        else:
            template = VIDEO_PATH if version == "v3.0" else V2_VIDEO_PATH
            write_video(root / template.format(video_key=VIDEO_KEY, **place), [picture(*one) for one in frames], codec)
        # Row groups end inside episodes.
        template = DATA_PATH if version == "v3.0" else V2_DATA_PATH
        _write_parquet(root / template.format(**place), table, row_group_size=5)
    if version == "v3.0":
        _write_episodes(root, lengths, stored_as, episodes_per_file)
        tasks = pa.table({"task_index": list(range(len(TASKS))), task_column: list(TASKS)})
        _write_parquet(root / "meta/tasks.parquet", tasks)
    else:
        _write_v2_lists(root, lengths)
    _write_info(root, lengths, stored_as, {name: str(table[name].type) for name in columns}, version)
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


def _data_table(episodes: range, lengths: tuple[int, ...], columns: dict[str, ColumnValues]) -> pa.Table:
    rows: dict[str, list[Any]] = {name: [] for name in ("observation.state", "action", "timestamp", *columns)}
    rows |= {name: [] for name in ("frame_index", "episode_index", "index", "task_index")}
    for episode in episodes:
        length = lengths[episode]
        rows["observation.state"] += states(episode, length).tolist()
        rows["action"] += actions(episode, length).tolist()
        for name, make in columns.items():
            rows[name] += make(episode, length)
        rows["timestamp"] += [frame / FPS for frame in range(length)]
        rows["frame_index"] += range(length)
        rows["episode_index"] += [episode] * length
        rows["index"] += range(sum(lengths[:episode]), sum(lengths[: episode + 1]))
        rows["task_index"] += [episode % len(TASKS)] * length
    table = pa.table(rows)
    float_list = pa.list_(pa.float32())
    for name, kind in (("observation.state", float_list), ("action", float_list), ("timestamp", pa.float32())):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    return table


def _write_episodes(root: Path, lengths: tuple[int, ...], stored_as: str, episodes_per_file: int) -> None:
    rows = []
    for episode, length in enumerate(lengths):
        first_in_file = episode - episode % episodes_per_file
        start, file_index = sum(lengths[:episode]), episode // episodes_per_file
        row = {
            "episode_index": episode,
            "tasks": [TASKS[episode % len(TASKS)]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": file_index,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
        }
        if stored_as == "video":
            start_in_file = start - sum(lengths[:first_in_file])
            row |= {
                f"videos/{VIDEO_KEY}/chunk_index": 0,
                f"videos/{VIDEO_KEY}/file_index": file_index,
                f"videos/{VIDEO_KEY}/from_timestamp": start_in_file / FPS,
                f"videos/{VIDEO_KEY}/to_timestamp": (start_in_file + length) / FPS,
            }
        rows.append(row)
    _write_parquet(root / EPISODES_FILE, pa.Table.from_pylist(rows))


def _write_v2_lists(root: Path, lengths: tuple[int, ...]) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    tasks = [{"task_index": number, "task": task} for number, task in enumerate(TASKS)]
    episodes = [
        {"episode_index": number, "tasks": [TASKS[number % len(TASKS)]], "length": length}
        for number, length in enumerate(lengths)
    ]
    for name, rows in (("tasks", tasks), ("episodes", episodes)):
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_info(
    root: Path, lengths: tuple[int, ...], stored_as: str, column_types: dict[str, str], version: str
) -> None:
    camera = VIDEO_KEY if stored_as == "video" else IMAGE_KEY
    scalars = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
    scalars |= {"task_index": "int64", **column_types}
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]},
        camera: {"dtype": stored_as, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]},
        **{name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()},
    }
    info = {
        "codebase_version": version,
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(TASKS),
        "data_path": DATA_PATH if version == "v3.0" else V2_DATA_PATH,
        "video_path": VIDEO_PATH if version == "v3.0" else V2_VIDEO_PATH,
    }
    if version == "v2.1":
        info |= {"chunks_size": V2_CHUNK_SIZE, "total_chunks": -(-len(lengths) // V2_CHUNK_SIZE)}
    (root / "meta" / "info.json").write_text(json.dumps(info))
