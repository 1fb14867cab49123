"""``recap-ds bench sample``: what one chunk of actions costs, and what a policy server gives its clients.

At true widths (``made_policy.py``), in turns, one request at a time: ``cached`` (as policies act: the prefix is encoded
once, its keys and values serve every denoising step), ``guided`` (the same with both branches), ``recomputed`` (the
prefix encoded anew in every step) and, for dit_cross, ``projected`` (encoded once, its keys and values projected anew
in every step). Every ratio is the median of ratios within one round. Then a real server on loopback, with clients that
ask without pause.
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.algo.flow_matching import euler
from recap_ds.batch import Observation, map_tensors
from recap_ds.bench.made_policy import Sizes, build_policy, made_contract, made_request
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.robot import RobotPolicy
from recap_ds.processing.tokens import ByteTokenizer
from recap_ds.serve.client import PolicyClient
from recap_ds.serve.run import choose_device, serving
from recap_ds.serve.server import ServerSettings

GUIDANCE_BETA = 2.0
# How far chunks are compared: every step of ``recomputed`` costs a prefix.
CHECKED_STEPS = 2


def bench_sample(
    sizes: Sizes, num_repeats: int, clients: list[int], num_requests: int, max_batch: int, device: str | None
) -> dict[str, Any]:
    """Figures as JSON. ``num_requests``: of each client, unguided and then guided."""
    chosen = choose_device(device)
    policy = build_policy(sizes)
    contract = made_contract(sizes, policy.config)
    robot = RobotPolicy(policy, contract, ByteTokenizer(), chosen)
    request = made_request(contract)
    rounds = compare(policy, robot, request, num_repeats)
    parts = shares(policy, robot, request, num_repeats)
    served = {
        name: [serve_clients(robot, {**request, **options}, each, num_requests, max_batch) for each in clients]
        for name, options in (("unguided", {}), ("guided", {"guidance_beta": GUIDANCE_BETA}))
    }
    return {
        "bench": "sample",
        "device": str(chosen),
        "dtype": str(robot.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **sizes._asdict(),
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "repeats": num_repeats,
        "seconds": {name: medians(each) for name, each in rounds.items()},
        "over_cached": {name: ratios(each, rounds["cached"]) for name, each in rounds.items() if name != "cached"},
        "seconds_of_parts": {name: medians(each) for name, each in parts.items()},
        "clients": served,
    }


class Taken(NamedTuple):
    """Of one chunk, or of a part of it."""

    wall: float
    host: float  # processor time, which other jobs of a busy machine do not lengthen; of a CPU the better figure


# -- one request at a time --------------------------------------------------------------------------------------------


def compare(
    policy: PiStarRECAPPolicy, robot: RobotPolicy, request: dict[str, Any], num_repeats: int
) -> dict[str, list[Taken]]:
    """What every way to sample the same chunk takes, by round."""
    observation, noise = tensors(policy, robot, request)

    def kept(guidance_beta: float, num_steps: int) -> Tensor:
        return policy.predict_action_chunk(observation, noise=noise, guidance_beta=guidance_beta, num_steps=num_steps)

    ways: dict[str, Callable[[int], Tensor]] = {
        "cached": lambda num_steps: kept(1.0, num_steps),
        "guided": lambda num_steps: kept(GUIDANCE_BETA, num_steps),
        "recomputed": lambda num_steps: sample_anew(policy, observation, noise, num_steps, encode_anew=True),
    }
    if policy.config.model.action_expert == "dit_cross":
        ways["projected"] = lambda num_steps: sample_anew(policy, observation, noise, num_steps, encode_anew=False)
    check_equal({name: way(CHECKED_STEPS) for name, way in ways.items()})
    num_steps = policy.config.num_inference_steps
    rounds = [{name: taken_by(partial(way, num_steps)) for name, way in ways.items()} for _ in range(num_repeats)]
    return {name: [each[name] for each in rounds] for name in ways}


def check_equal(chunks: dict[str, Tensor]) -> None:
    """Rounding apart, all but ``guided``. It warms up as well."""
    expected = chunks["cached"]
    for name in chunks.keys() - {"guided"}:
        chunk = chunks[name]
        assert (chunk - expected).abs().max() < 0.05 * expected.abs().max(), f"{name} samples another chunk"


def shares(
    policy: PiStarRECAPPolicy, robot: RobotPolicy, request: dict[str, Any], num_repeats: int
) -> dict[str, list[Taken]]:
    """Where the time of a chunk goes: the prefix, and one step of the expert."""
    observation, noise = tensors(policy, robot, request)
    with torch.no_grad():
        prefix = policy.vlm(observation, to_pixels(observation.images))
        context = policy.action_expert.encode_prefix(prefix)
        ways = {
            "prefix": lambda: policy.vlm(observation, to_pixels(observation.images)).hidden,
            "step": lambda: velocity_of(policy, context, observation, noise, torch.ones_like(noise[:, 0, 0])),
        }
        return {name: [taken_by(way) for _ in range(num_repeats)] for name, way in ways.items()}


def tensors(policy: PiStarRECAPPolicy, robot: RobotPolicy, request: dict[str, Any]) -> tuple[Observation, Tensor]:
    """The request's observation and noise, where the policy is."""
    seen = {key: value for key, value in request.items() if key != "seed"}
    device = next(policy.parameters()).device
    observation = map_tensors(lambda tensor: tensor.to(device), robot.request(seen).observation)
    config = policy.config
    noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(0))
    return observation, noise.to(device)


@torch.no_grad()
def sample_anew(
    policy: PiStarRECAPPolicy, observation: Observation, noise: Tensor, num_steps: int, encode_anew: bool
) -> Tensor:
    """As ``predict_action_chunk`` without what it keeps; ``encode_anew`` False keeps the prefix, not its projection."""
    kept = None if encode_anew else policy.vlm(observation, to_pixels(observation.images))

    def velocity(x_t: Tensor, flow_time: Tensor) -> Tensor:
        seen = kept or policy.vlm(observation, to_pixels(observation.images))
        return velocity_of(policy, policy.action_expert.encode_prefix(seen), observation, x_t, flow_time)

    return euler(velocity, noise, num_steps)


def velocity_of(
    policy: PiStarRECAPPolicy, context: Any, observation: Observation, x_t: Tensor, flow_time: Tensor
) -> Tensor:
    """[B, H, A] of the positive branch."""
    indicator = torch.full_like(flow_time, INDICATOR_IDS["positive"], dtype=torch.long)[:, None]
    valid = torch.ones(x_t.shape[:2], dtype=torch.bool, device=x_t.device)
    return policy.action_expert(context, observation.state, x_t[:, None], flow_time[:, None], indicator, valid)[:, 0]


def taken_by(way: Callable[[], Tensor]) -> Taken:
    begin, host = time.perf_counter(), time.process_time()
    way().cpu()  # waits for the device
    return Taken(time.perf_counter() - begin, time.process_time() - host)


def medians(rounds: Sequence[Taken]) -> dict[str, float]:
    return {
        kind: round(statistics.median(each), 4)
        for kind, each in zip(Taken._fields, zip(*rounds, strict=True), strict=True)
    }


def ratios(rounds: Sequence[Taken], over: Sequence[Taken]) -> dict[str, float]:
    """Medians of ratios within one round."""
    shares = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(rounds, over, strict=True)]
    return {
        kind: round(statistics.median(each), 3)
        for kind, each in zip(Taken._fields, zip(*shares, strict=True), strict=True)
    }


# -- clients ----------------------------------------------------------------------------------------------------------


def serve_clients(
    robot: RobotPolicy, request: dict[str, Any], num_clients: int, num_requests: int, max_batch: int
) -> dict[str, float]:
    """Latencies as clients see them; every client asks for ``num_requests`` chunks, one after the other."""
    settings = ServerSettings(port=0, max_batch=max_batch, max_clients=num_clients)
    seconds: list[float] = []
    batches: list[int] = []
    start = threading.Barrier(num_clients + 1)

    def ask(port: int) -> None:
        with PolicyClient(settings.host, port, timeout_seconds=3600.0) as client:
            start.wait()
            for _ in range(num_requests):
                begin = time.perf_counter()
                reply = client.infer(request)
                seconds.append(time.perf_counter() - begin)
                batches.append(reply["server_timing"]["batch_size"])

    with serving(robot, {}, settings) as port:
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        start.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - begin
    middle, high = np.quantile(seconds, [0.5, 0.95])
    return {
        "clients": num_clients,
        "requests": len(seconds),
        "p50_seconds": round(float(middle), 4),
        "p95_seconds": round(float(high), 4),
        "requests_per_second": round(len(seconds) / elapsed, 3),
        "mean_batch": round(statistics.mean(batches), 2),
    }


def table(figures: dict[str, Any]) -> list[str]:
    """For people."""
    parts = figures["seconds"] | figures["seconds_of_parts"]
    lines = [
        f"{figures['expert']}, {figures['parameters'] / 1e6:.0f} M parameters, "
        f"{figures['dtype']} on {figures['device']}",
        f"{'':12}{'wall s':>9}{'host s':>9}{'x cached':>10}{'of host s':>10}",
    ]
    for name, seconds in parts.items():
        over = figures["over_cached"].get(name, {"wall": "", "host": ""})
        lines.append(f"{name:12}{seconds['wall']:>9.4f}{seconds['host']:>9.4f}{over['wall']:>10}{over['host']:>10}")
    lines += [
        f"{'':10}{'clients':>9}{'p50 s':>9}{'p95 s':>9}{'chunks/s':>10}{'batch':>7}",
    ]
    for name, rows in figures["clients"].items():
        for row in rows:
            lines.append(
                f"{name:10}{row['clients']:>9}{row['p50_seconds']:>9.3f}{row['p95_seconds']:>9.3f}"
                f"{row['requests_per_second']:>10.2f}{row['mean_batch']:>7.1f}"
            )
    return lines
