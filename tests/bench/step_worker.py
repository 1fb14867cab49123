"""Two ranks take the same steps under the engine, under DDP and apart; do they end at the same weights?"""

from pathlib import Path

from recap_ds.bench.step_rank import build, recipes_of, take
from recap_ds.distributed.build import gather
from tests.distributed.harness import worker_main

NUM_STEPS = 3


def scenarios(runtime, folder, ds_path):
    contestants, facts = build(recipes_of(Path(folder)), ds_path, runtime.info, runtime)
    names = ("engine", "ddp", "apart")
    start = values_of(contestants["ddp"].trainer.policy)
    steps = [{name: take(contestants[name], runtime, watched=True) for name in names} for _ in range(NUM_STEPS)]
    alone = take(contestants["alone"], runtime, watched=True)
    ends = {name: values_of(contestants[name].trainer.policy) for name in names}
    return {
        "facts": facts,
        "contestants": list(contestants),
        "steps": steps,
        "alone": alone,
        "moved": distance(start, ends["ddp"]),
        "engine_from_ddp": distance(ends["engine"], ends["ddp"]),
        "apart_from_ddp": distance(ends["apart"], ends["ddp"]),
    }


def values_of(policy):
    """Collective where the policy is sharded: every rank must call."""
    parameters = dict(policy.named_parameters())
    with gather(parameters.values()):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def distance(values, others):
    return max((value - others[name]).abs().max().item() for name, value in values.items())


if __name__ == "__main__":
    worker_main(scenarios)
