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
from collections.abc import Callable
from typing import Any

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
        "seconds": {name: round(statistics.median(each), 4) for name, each in rounds.items()},
        "guided_over_cached": ratio(rounds, "guided", "cached"),
        "recomputed_over_cached": ratio(rounds, "recomputed", "cached"),
        **({"projected_over_cached": ratio(rounds, "projected", "cached")} if "projected" in rounds else {}),
        "seconds_of_parts": parts,
        "clients": served,
    }


# -- one request at a time --------------------------------------------------------------------------------------------


def compare(
    policy: PiStarRECAPPolicy, robot: RobotPolicy, request: dict[str, Any], num_repeats: int
) -> dict[str, list[float]]:
    """Seconds of every way to sample the same chunk, by round, after one to warm up."""
    observation, noise = tensors(policy, robot, request)

    def guided(guidance_beta: float) -> Tensor:
        return policy.predict_action_chunk(observation, noise=noise, guidance_beta=guidance_beta)

    ways: dict[str, Callable[[], Tensor]] = {
        "cached": lambda: guided(1.0),
        "guided": lambda: guided(GUIDANCE_BETA),
        "recomputed": lambda: sample_anew(policy, observation, noise, encode_anew=True),
    }
    if policy.config.model.action_expert == "dit_cross":
        ways["projected"] = lambda: sample_anew(policy, observation, noise, encode_anew=False)
    chunks = {name: way() for name, way in ways.items()}
    for name in chunks.keys() - {"guided"}:
        off = (chunks[name] - chunks["cached"]).abs().max() / chunks["cached"].abs().max()
        assert off < 0.05, f"{name} samples another chunk"
    rounds = [{name: seconds_of(way) for name, way in ways.items()} for _ in range(num_repeats)]
    return {name: [each[name] for each in rounds] for name in ways}


def shares(
    policy: PiStarRECAPPolicy, robot: RobotPolicy, request: dict[str, Any], num_repeats: int
) -> dict[str, float]:
    """Where the seconds of a chunk go: the prefix, and one step of the expert."""
    observation, noise = tensors(policy, robot, request)
    with torch.no_grad():
        prefix = policy.vlm(observation, to_pixels(observation.images))
        context = policy.action_expert.encode_prefix(prefix)
        ways = {
            "prefix": lambda: policy.vlm(observation, to_pixels(observation.images)).hidden,
            "step": lambda: velocity_of(policy, context, observation, noise, torch.ones_like(noise[:, 0, 0])),
        }
        taken = {name: [seconds_of(way) for _ in range(num_repeats + 1)][1:] for name, way in ways.items()}
    return {name: round(statistics.median(each), 4) for name, each in taken.items()}


def tensors(policy: PiStarRECAPPolicy, robot: RobotPolicy, request: dict[str, Any]) -> tuple[Observation, Tensor]:
    """The request's observation and noise, where the policy is."""
    seen = {key: value for key, value in request.items() if key != "seed"}
    device = next(policy.parameters()).device
    observation = map_tensors(lambda tensor: tensor.to(device), robot.request(seen).observation)
    config = policy.config
    noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(0))
    return observation, noise.to(device)


@torch.no_grad()
def sample_anew(policy: PiStarRECAPPolicy, observation: Observation, noise: Tensor, encode_anew: bool) -> Tensor:
    """As ``predict_action_chunk`` without what it keeps; ``encode_anew`` False keeps the prefix, not its projection."""
    kept = None if encode_anew else policy.vlm(observation, to_pixels(observation.images))

    def velocity(x_t: Tensor, flow_time: Tensor) -> Tensor:
        seen = kept or policy.vlm(observation, to_pixels(observation.images))
        return velocity_of(policy, policy.action_expert.encode_prefix(seen), observation, x_t, flow_time)

    return euler(velocity, noise, policy.config.num_inference_steps)


def velocity_of(
    policy: PiStarRECAPPolicy, context: Any, observation: Observation, x_t: Tensor, flow_time: Tensor
) -> Tensor:
    """[B, H, A] of the positive branch."""
    indicator = torch.full_like(flow_time, INDICATOR_IDS["positive"], dtype=torch.long)[:, None]
    valid = torch.ones(x_t.shape[:2], dtype=torch.bool, device=x_t.device)
    return policy.action_expert(context, observation.state, x_t[:, None], flow_time[:, None], indicator, valid)[:, 0]


def seconds_of(way: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    way().cpu()  # waits for the device
    return time.perf_counter() - begin


def ratio(rounds: dict[str, list[float]], name: str, over: str) -> float:
    return round(statistics.median(a / b for a, b in zip(rounds[name], rounds[over], strict=True)), 3)


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
    seconds = ", ".join(f"{name} {each:.4f}" for name, each in figures["seconds"].items())
    lines = [
        f"{figures['expert']}, {figures['parameters'] / 1e6:.0f} M parameters, "
        f"{figures['dtype']} on {figures['device']}",
        f"seconds a chunk: {seconds}; prefix {figures['seconds_of_parts']['prefix']:.4f}, "
        f"a step of the expert {figures['seconds_of_parts']['step']:.4f}",
        f"guided {figures['guided_over_cached']:.2f} x unguided; recomputed {figures['recomputed_over_cached']:.2f} x "
        "cached",
        f"{'':10}{'clients':>9}{'p50 s':>9}{'p95 s':>9}{'chunks/s':>10}{'batch':>7}",
    ]
    for name, rows in figures["clients"].items():
        for row in rows:
            lines.append(
                f"{name:10}{row['clients']:>9}{row['p50_seconds']:>9.3f}{row['p95_seconds']:>9.3f}"
                f"{row['requests_per_second']:>10.2f}{row['mean_batch']:>7.1f}"
            )
    return lines
