"""An export goes to the Hugging Face hub as it lies: checked first, in one commit, its README.md as the model card."""

from pathlib import Path
from typing import NamedTuple

from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.records import file_problems
from recap_ds.models.export_card import CARD_NAME
from recap_ds.models.export_format import EXPORT_NAME, ExportRecord


class Push(NamedTuple):
    """What was uploaded; of a dry run, what would be."""

    repo_id: str
    num_bytes: dict[str, int]  # by file
    url: str | None  # of the commit; None of a dry run


def push_export(
    export: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Upload an export folder to ``repo_id`` ("owner/name"), which is made where it is not there.

    ``private`` holds for a repository that is made here (None: as the owner's account says); ``revision``: a branch;
    ``token`` None: that of ``hf auth login``. ``dry_run`` checks the export and the name and uses no network.
    """
    folder = Path(export).expanduser()
    record = ExportRecord.load(folder)
    if problems := file_problems(folder, record.files):
        raise UsageError(f"{folder}: {problems[0]}; copy or consolidate the export again")
    # Nothing else that someone may have put beside them leaves this machine.
    files = sorted([*record.files, EXPORT_NAME, *([CARD_NAME] if (folder / CARD_NAME).is_file() else [])])
    num_bytes = {name: (folder / name).stat().st_size for name in files}
    _check_name(repo_id)
    if dry_run:
        return Push(repo_id, num_bytes, None)

    from huggingface_hub import HfApi

    source = record.provenance
    # "RUN step N", as far as that is known.
    made_by = " step ".join(str(each) for each in (source.run, source.step) if each is not None) or "recap_ds"
    try:
        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            revision=revision,
            commit_message=commit_message or f"Export of {made_by}",
        )
    except Exception as error:  # the hub client raises many kinds; each becomes the same advice
        reason = str(error).strip().split("\n")[0][:160]
        raise RunFailed(f"{repo_id}: the hub took no upload ({reason}); see 'hf auth whoami'") from error
    return Push(repo_id, num_bytes, commit.commit_url)


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"repo_id: {str(error).splitlines()[0]}") from None
