"""Is this machine fit to train: packages, accelerators, cores, shared memory, limits."""

from collections.abc import Sequence

from packaging.specifiers import SpecifierSet

from recap_ds.doctor.node import NO_LIMIT, NodeFacts
from recap_ds.doctor.page import Finding, fail, ok, warn

# What the test suite last ran with; DeepSpeed's internals are leaned on, so another patch release is worth a word.
TESTED = {"torch": "2.13", "deepspeed": "0.19.8", "transformers": "5.23", "peft": "0.21"}
GIB = 2**30
# Batches wait for the training process in shared memory: data.prefetch_batches of each worker of each rank.
SHARED_BYTES_PER_RANK = GIB
MIN_SHARED_BYTES = 128 * 2**20
MIN_OPEN_FILES = 4096  # a worker keeps up to 64 shards open; sockets and libraries come on top
MIN_PROCESSES = 4096


def machine_findings(facts: NodeFacts, cpus_per_rank: int) -> list[Finding]:
    """``cpus_per_rank``: the training process and its data workers."""
    return [
        *version_findings(facts),
        accelerator_finding(facts),
        cores_finding(facts, cpus_per_rank),
        shared_memory_finding(facts),
        *limit_findings(facts),
        network_variables_finding(facts),
    ]


def version_findings(facts: NodeFacts) -> list[Finding]:
    mend = "pip install -e . in the repository's folder"
    if not facts.requirements:
        return [fail("packages", "recap_ds is not installed in this Python", mend)]
    findings = []
    for name, wanted in facts.requirements.items():
        have = facts.versions[name]
        if have is None:
            findings.append(fail("packages", f"{name} is missing, recap_ds needs {name}{wanted}", mend))
        elif not SpecifierSet(wanted, prereleases=True).contains(have):
            findings.append(fail("packages", f"{name} {have} is outside {wanted}", mend))
    if findings:
        return findings
    shown = ", ".join(f"{name} {facts.versions[name]}" for name in TESTED)
    untested = [f"{name} {tested}" for name, tested in TESTED.items() if not _is(facts.versions[name], tested)]
    rest = f"{shown} and {len(facts.versions) - len(TESTED)} more, all within their ranges"
    if untested:
        return [warn("packages", rest, f"the test suite runs with {', '.join(untested)}: run pytest once here")]
    return [ok("packages", f"Python {facts.python}, {rest}")]


def _is(have: str | None, tested: str) -> bool:
    return have is not None and (have.split("+")[0] + ".").startswith(tested + ".")


def accelerator_finding(facts: NodeFacts) -> Finding:
    device = facts.accelerator
    memory = f"{device['memory_bytes'] / GIB:.0f} GiB"
    if device["device"] == "cpu":
        what = f"none, training runs on the CPU ({facts.cpus} cores, {memory})"
        if device["chosen"]:
            return ok("accelerator", f"{what}, as DS_ACCELERATOR says")
        return warn("accelerator", what, "for a GPU: does nvidia-smi see it, and is torch a build for it?")
    what = f"{device['count']} x {device['model']}, {memory} each, {device['backend']}"
    if not device["count"]:
        mend = "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        return fail("accelerator", f"torch is built for {device['device']} but sees no device", mend)
    if not device["bf16"]:
        return warn("accelerator", f"{what}, no bf16", "training.use_amp=false trains in fp32, at twice the memory")
    return ok("accelerator", f"{what}, bf16")


def cores_finding(facts: NodeFacts, cpus_per_rank: int) -> Finding:
    ranks = facts.accelerator["count"]
    what = f"{facts.cpus} for {ranks} rank(s), each with {cpus_per_rank - 1} data worker(s)"
    if facts.cpus < ranks * cpus_per_rank:
        return warn("cores", what, "give the job more (Slurm: --cpus-per-task), or set data.num_workers lower")
    return ok("cores", what)


def shared_memory_finding(facts: NodeFacts) -> Finding:
    have, want = facts.shared_memory_bytes, facts.accelerator["count"] * SHARED_BYTES_PER_RANK
    what = f"{have / GIB:.1f} GiB free in /dev/shm"
    mend = f"docker run --shm-size={max(8, 2 * want // GIB)}g (or --ipc=host); without it data.num_workers=0"
    if have < MIN_SHARED_BYTES:
        return fail("shared memory", f"{what}: data workers would die of a bus error", mend)
    if have < want:
        return warn("shared memory", f"{what}, {want / GIB:.0f} GiB would be safe", mend)
    return ok("shared memory", what)


def limit_findings(facts: NodeFacts) -> list[Finding]:
    open_files, processes = facts.limits["open_files"], facts.limits["processes"]
    low = []
    if NO_LIMIT < open_files < MIN_OPEN_FILES:
        low.append(warn("limits", f"{open_files} open files", "ulimit -n 65536, or nofile in limits.conf"))
    if NO_LIMIT < processes < MIN_PROCESSES:
        low.append(warn("limits", f"{processes} processes", "ulimit -u 65536, or nproc in limits.conf"))
    if facts.infiniband and facts.limits["locked_bytes"] != NO_LIMIT:
        what = f"{facts.limits['locked_bytes'] / 2**20:.0f} MiB of locked memory, and InfiniBand pins its buffers"
        low.append(warn("limits", what, "ulimit -l unlimited, also for what ssh or Slurm starts"))
    return low or [ok("limits", f"{_shown(open_files)} open files, {_shown(processes)} processes")]


def _shown(limit: int) -> str:
    return "unlimited" if limit == NO_LIMIT else f"{limit:,}"


def network_variables_finding(facts: NodeFacts) -> Finding:
    devices = f"InfiniBand: {', '.join(facts.infiniband)}" if facts.infiniband else "no InfiniBand"
    variables = " ".join(f"{key}={value}" for key, value in facts.variables.items())
    if facts.infiniband and facts.variables.get("NCCL_IB_DISABLE") == "1":
        return warn("network", f"{devices}, but NCCL_IB_DISABLE=1", "unset it, unless InfiniBand is known to be broken")
    return ok("network", f"{devices}; {variables or 'no NCCL or gloo variables'}")


def launcher_findings(facts: NodeFacts, with_hosts: bool) -> list[Finding]:
    """``with_hosts``: several machines are meant, so ssh and pdsh are needed."""
    wanted: Sequence[str] = ("deepspeed", "ssh", "pdsh") if with_hosts else ("deepspeed",)
    missing = [name for name in wanted if not facts.programs[name]]
    if missing:
        mend = "activate the environment, apt-get install pdsh openssh-client, or use --no_ssh (NODE_RANK) or Slurm"
        return [fail("launcher", f"not on the PATH: {', '.join(missing)}", mend)]
    return [ok("launcher", f"{', '.join(wanted)} on the PATH")]
