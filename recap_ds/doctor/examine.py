"""All checks in the order of a page: this machine, its storage, its ranks, then the other machines.

A check never raises for what it finds; UsageError is for what the user asked of the doctor itself.
"""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.data.remote import is_remote
from recap_ds.doctor.environment import environment_files, environment_finding, environment_variables
from recap_ds.doctor.hosts import ask_hosts, host_findings, read_hostfile
from recap_ds.doctor.machine import launcher_findings, machine_findings
from recap_ds.doctor.network import local_bandwidth_findings, nodes_bandwidth_findings
from recap_ds.doctor.node import NodeFacts
from recap_ds.doctor.page import Finding, fail
from recap_ds.doctor.reading import reading_findings
from recap_ds.doctor.storage import existing_parent, storage_findings
from recap_ds.doctor.weights import start_finding, weights_finding
from recap_ds.errors import RunFailed
from recap_ds.models.export_format import EXPORT_NAME
from recap_ds.recipe import load_config


def examine(hostfile: str | None, run_folder: Path | None, shards: str | None, recipe: str | None) -> Iterator[Finding]:
    """Findings as they come: a bandwidth takes a while. ``recipe`` gives what the others leave out."""
    config = load_config(recipe)
    hosts = read_hostfile(hostfile) if hostfile is not None else []
    run_folder = run_folder or Path(config.runs_dir) / config.name
    shards = shards or config.data.shards
    here = facts_of_this_machine()
    yield from machine_findings(here, cpus_per_rank=1 + config.data.num_workers)
    yield from launcher_findings(here, with_hosts=bool(hosts))
    if recipe is not None:
        start = Path(config.training.start_from or "").expanduser()
        yield start_finding(start) if (start / EXPORT_NAME).is_file() else weights_finding(config.model)
    yield from storage_findings(run_folder)
    if shards is not None:
        yield from reading_findings(shards, config.data)
    yield from local_bandwidth_findings(here)
    if hostfile is not None:
        yield from _over_nodes(hostfile, existing_parent(run_folder), shards)


def facts_of_this_machine() -> NodeFacts:
    """Asked in a process of its own: the accelerator is free again for the ranks, and a crash is a finding's."""
    command = [sys.executable, "-m", "recap_ds.doctor.node"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunFailed(f"torch or DeepSpeed does not start here: {said}; try: python -c 'import deepspeed'")
    return NodeFacts.from_output(done.stdout)


def _over_nodes(hostfile: str, run_folder: Path, shards: str | None) -> Iterator[Finding]:
    hosts = read_hostfile(hostfile)
    files = environment_files()
    environment = environment_finding(files)
    yield environment
    token = run_folder / f".recap-ds-doctor-{uuid.uuid4().hex}"
    try:
        token.touch()
    except OSError as error:
        yield fail("hosts", f"not asked: {run_folder} cannot be written ({error.strerror})", "see 'run folder' above")
        return
    try:
        is_folder = shards is not None and not is_remote(shards)
        paths = [token, *([Path(shards) / MANIFEST_NAME] if is_folder else [])]
        answers = ask_hosts(hosts, paths, environment_variables(files))
    finally:
        token.unlink()
    answered = [answer.facts for answer in answers if answer.facts is not None]
    # Where none answered there is nothing to compare, and every finding is why.
    first = answered[0] if answered else None
    findings = [finding for answer in answers for finding in host_findings(answer, first)]
    yield from findings
    if first is None or any(finding.level == "fail" for finding in [environment, *findings]):
        yield fail("nodes", "bandwidth not measured", "first mend what the lines above say")
        return
    yield from nodes_bandwidth_findings(hostfile, first, len(hosts))
