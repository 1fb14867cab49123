"""A film of an episode: its cameras side by side, who acts and how it ended above, the critic's value along the bottom.

T frames   P picture side
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recap_ds.errors import UsageError
from recap_ds.rollout.episode import PlayedEpisode

SIDE = 256  # of one camera, in pixels of the film
HEADER, CURVE = 44, 72
MARGIN = 8
# The last frame is held, so that the ending can be read.
HOLD_SECONDS = 1.0
MAX_FPS = 30.0
INK, PAPER, FAINT = (235, 235, 235), (24, 24, 24), (70, 70, 70)
GREEN, RED, BLUE, AMBER = (70, 200, 90), (230, 80, 70), (90, 160, 250), (240, 180, 60)


def check_encoder() -> None:
    """UsageError where films cannot be made: said before the episodes are played."""
    try:
        import av
    except ImportError:
        raise UsageError("evaluation.num_videos: films need PyAV; pip install av, or set it to 0") from None
    if "libx264" not in av.codecs_available:
        raise UsageError("evaluation.num_videos: this PyAV cannot write H.264; pip install av, or set it to 0")


def write_video(
    path: Path, episode: PlayedEpisode, values: Sequence[tuple[int, float]], title: str, fps: float
) -> None:
    """``values``: (frame, value) wherever the policy looked; drawn from -1 to 0, as values are. Nothing if empty.

    Shown in the robot's own time; where it acts faster than ``MAX_FPS``, some frames are left out.
    """
    import av

    skip = max(1, round(fps / MAX_FPS))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=round(fps / skip))
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        stream.width, stream.height = film_size(episode)
        for picture in _film(episode, values, title, skip, hold=max(1, round(HOLD_SECONDS * fps / skip))):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _film(
    episode: PlayedEpisode, values: Sequence[tuple[int, float]], title: str, skip: int, hold: int
) -> Iterator[np.ndarray]:
    assert episode.pictures is not None, "the plan kept no pictures"
    last = episode.num_frames - 1
    for frame in range(0, last, skip):
        yield draw_frame(episode, frame, values, title, ended=False)
    ending = draw_frame(episode, last, values, title, ended=True)
    for _ in range(hold):
        yield ending


def film_size(episode: PlayedEpisode) -> tuple[int, int]:
    """(width, height), both even, as H.264 wants them."""
    return SIDE * max(2, len(episode.pictures)), HEADER + SIDE + CURVE


def draw_frame(
    episode: PlayedEpisode, frame: int, values: Sequence[tuple[int, float]], title: str, ended: bool
) -> np.ndarray:
    """uint8 [height, width, 3]."""
    pictures = [Image.fromarray(camera[frame]) for camera in episode.pictures.values()]
    width, height = film_size(episode)
    canvas = Image.new("RGB", (width, height), PAPER)
    left = (width - SIDE * len(pictures)) // 2
    for column, picture in enumerate(pictures):
        canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), (left + column * SIDE, HEADER))
    draw = ImageDraw.Draw(canvas)
    known = [(at, value) for at, value in values if at <= frame]
    _write_header(draw, episode, frame, known, title, ended, width)
    _draw_curve(draw, episode.num_frames, frame, known, width, HEADER + SIDE)
    return np.asarray(canvas)


def _write_header(
    draw: ImageDraw.ImageDraw,
    episode: PlayedEpisode,
    frame: int,
    known: Sequence[tuple[int, float]],
    title: str,
    ended: bool,
    width: int,
) -> None:
    large, small = ImageFont.load_default(15), ImageFont.load_default(12)
    draw.text((MARGIN, 4), title, INK, large)
    draw.text((MARGIN, 25), f"{episode.plan.prompt}   episode {episode.plan.number}   frame {frame}", INK, small)
    if ended:
        said, color = ("SUCCESS", GREEN) if episode.success else ("FAILURE", RED)
    else:
        said, color = ("EXPERT", AMBER) if episode.expert[frame] else ("POLICY", BLUE)
    draw.text((width - MARGIN, 4), said, color, large, anchor="ra")
    judged = f"value {known[-1][1]:.2f}" if known else "no critic"
    draw.text((width - MARGIN, 25), judged, INK, small, anchor="ra")


def _draw_curve(
    draw: ImageDraw.ImageDraw,
    num_frames: int,
    frame: int,
    known: Sequence[tuple[int, float]],
    width: int,
    top: int,
) -> None:
    """The value as it was known at each frame: what the last look said. An empty frame without a critic."""
    small = ImageFont.load_default(11)
    left, right, above, below = 34, width - MARGIN, top + MARGIN, top + CURVE - MARGIN

    def place(at: float, value: float) -> tuple[float, float]:
        share = min(max(value + 1.0, 0.0), 1.0)
        return left + (right - left) * at / max(num_frames, 1), below - (below - above) * share

    for value in (0.0, -1.0):
        draw.line([place(0, value), place(num_frames, value)], FAINT)
        draw.text((left - 4, place(0, value)[1]), f"{value:.0f}", INK, small, anchor="rm")
    points: list[tuple[float, float]] = []
    for number, (at, value) in enumerate(known):
        until = known[number + 1][0] if number + 1 < len(known) else frame + 1
        points += [place(at, value), place(until, value)]
    draw.line(points, BLUE, width=2)
