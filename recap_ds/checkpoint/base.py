"""The part of the VLM that a run does not train: where it is, written once per run and shared by all checkpoints.

``run/base/`` holds the architecture (config.json) and the tokenizer, so that a checkpoint can be consolidated without
the source. Of a frozen VLM that came from files, ``run/base.json`` remembers the folder and every file's checksum; one
that was drawn at random has no files, so its weights are written into ``run/base/`` and later starts read them there. A
fully trained VLM has no base: all of it is in every checkpoint.
"""

import json
import os
import shutil
from pathlib import Path

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.agreement import on_every_rank, on_main
from recap_ds.checkpoint.base_record import BaseRecord
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.build import gather, param_is_sharded
from recap_ds.distributed.runtime import Runtime
from recap_ds.errors import RunFailed
from recap_ds.files.atomic import sync_folder
from recap_ds.files.records import FileRecord, record_files, write_text
from recap_ds.files.tensors import TensorFileWriter
from recap_ds.models.backbones import names_in_files
from recap_ds.models.export_format import (
    VLM_CONFIG_NAME,
    VLM_WEIGHTS_NAME,
    stored_name,
    tokenizer_files,
    vlm_config_json,
)
from recap_ds.models.lora import base_name, is_adapter
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.vlm_weights import locate_vlm, weight_files


def base_folder(run: Path) -> str | None:
    """Where to read the VLM from instead of ``config.model``: the weights this run drew and wrote, if it did."""
    if not (run / layout.BASE_RECORD_NAME).is_file():
        return None
    return str(run / layout.BASE_NAME) if BaseRecord.load(run).weights == "run" else None


def ensure_base(
    run: Path, policy: PiStarRECAPPolicy, config: PiStarRECAPConfig, runtime: Runtime, source: Path | None = None
) -> None:
    """Write the base of a new run; check that of one that goes on.

    ``source`` is the folder that the VLM was read from, where it is not ``config.model``'s. Collective: every rank must
    call.
    """
    if on_main(runtime, lambda: (run / layout.BASE_RECORD_NAME).is_file()):
        on_main(runtime, lambda: _check(run, config, source))
        return
    folder = run / layout.BASE_NAME
    unfinished = run / f".{layout.BASE_NAME}.unfinished"
    try:
        on_main(runtime, lambda: _start(unfinished, policy, config, source))
        files: dict[str, FileRecord] = {}
        if config.model.freeze_vlm and policy.vlm.random_init:
            files[VLM_WEIGHTS_NAME] = _write_weights(unfinished / VLM_WEIGHTS_NAME, policy, runtime)
        on_main(runtime, lambda: _finish(run, unfinished, folder, files, config, source))
    except RunFailed as error:  # agreed on: nobody writes any more
        if runtime.info.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)  # the next start removes what cannot be removed now
        raise RunFailed(
            f"{folder}: the VLM that the run does not train could not be written ({error}); free space there or make "
            "the folder writable, then start the run again"
        ) from error


def _check(run: Path, config: PiStarRECAPConfig, source: Path | None) -> None:
    record = BaseRecord.load(run)
    if record.weights == "run":
        record.check(run / layout.BASE_NAME)
    elif record.weights == "files":
        record.check(source or locate_vlm(config.vlm_source))


def _start(unfinished: Path, policy: PiStarRECAPPolicy, config: PiStarRECAPConfig, source: Path | None) -> None:
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    vlm_config = vlm_config_json(policy.vlm.network.config)
    write_text(unfinished / VLM_CONFIG_NAME, json.dumps(vlm_config, indent=2, sort_keys=True) + "\n")
    source = source or locate_vlm(config.vlm_source)
    for path in tokenizer_files(source) if source else ():
        shutil.copyfile(path, unfinished / path.name)


def _write_weights(path: Path, policy: PiStarRECAPPolicy, runtime: Runtime) -> FileRecord | None:
    """Gather parameter by parameter; rank 0 writes and returns the file's record. Collective: every rank must call."""
    every = policy.vlm.network.named_parameters()
    params = {base_name(name): param for name, param in every if not is_adapter(name)}
    params = names_in_files(policy.config, params)
    specs = {
        stored_name(name): (tuple(param.ds_shape if param_is_sharded(param) else param.shape), param.dtype)
        for name, param in params.items()
    }
    writer = on_every_rank(runtime, lambda: TensorFileWriter(path, specs) if runtime.info.is_main else None)
    error = None
    for param in params.values():
        with gather([param]):
            if writer is not None and error is None:
                try:
                    writer.write(param)
                except OSError as caught:  # the other ranks are in the next gather already: raise after the last
                    error = caught

    def finish() -> FileRecord | None:
        if writer is None:
            return None
        with writer:  # closes the file of a write that failed, too
            if error is not None:
                raise error
            return writer.finish()

    return on_every_rank(runtime, finish)


def _finish(
    run: Path,
    unfinished: Path,
    folder: Path,
    files: dict[str, FileRecord],
    config: PiStarRECAPConfig,
    source: Path | None,
) -> None:
    sync_folder(unfinished)
    if folder.exists():  # of a start that was cut off before base.json
        shutil.rmtree(folder)
    os.replace(unfinished, folder)
    if files:
        record = BaseRecord(weights="run", files=files)
    elif config.model.freeze_vlm:
        source = source or locate_vlm(config.vlm_source)
        paths = weight_files(source)
        names = [path.name for path in paths]
        records = dict(zip(names, record_files(paths), strict=True))
        record = BaseRecord(weights="files", folder=str(source.resolve()), files=records)
    else:
        record = BaseRecord(weights="trained", files={})
    record.save(run)
    sync_folder(run)
