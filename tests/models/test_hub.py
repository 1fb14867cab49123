"""Exports on their way to the hub: what would go, what does go, and what is refused before anything does."""

from types import SimpleNamespace

import pytest

from recap_ds.errors import RunFailed, UsageError
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.hub import push_export
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.made_export import CONTRACT
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def policy():
    policy = PiStarRECAPPolicy(tiny_config())
    policy.contract = CONTRACT
    return policy


@pytest.fixture
def export(policy, tmp_path):
    policy.save_pretrained(tmp_path / "export")
    (tmp_path / "export/notes.txt").write_text("mine")
    return tmp_path / "export"


class FakeHub:
    """In place of HfApi: remembers what it was asked."""

    def __init__(self, broken: str | None = None):
        self.broken, self.asked, self.card = broken, {}, ""

    def __call__(self, token):
        self.asked["token"] = token
        return self

    def create_repo(self, repo_id, **options):
        if self.broken:
            raise ConnectionError(self.broken)
        self.asked["create"] = (repo_id, options)

    def upload_folder(self, folder_path, **options):
        self.asked["upload"] = options
        self.card = (folder_path / "README.md").read_text()
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


def test_a_dry_run_says_what_would_go_and_sends_nothing(policy, export, hub):
    push = push_export(export, "someone/policy", dry_run=True)
    named = {*ExportRecord.load(export).files, "export.json", "README.md"}
    assert push.num_bytes.keys() == named and push.url is None and hub.asked == {}
    assert push.num_bytes["action_expert.safetensors"] == (export / "action_expert.safetensors").stat().st_size
    assert policy.push_to_hub("someone/policy", dry_run=True).num_bytes.keys() == named
    assert hub.asked == {}


def test_an_upload_is_one_commit_of_the_exports_own_files(policy, export, hub):
    push = push_export(export, "someone/policy", private=True, revision="v2", token="secret")
    assert push.url == "https://hub/commit/1"
    assert hub.asked["token"] == "secret"
    assert hub.asked["create"] == ("someone/policy", {"private": True, "exist_ok": True})
    uploaded = hub.asked["upload"]
    assert "notes.txt" not in uploaded["allow_patterns"] and set(uploaded["allow_patterns"]) == push.num_bytes.keys()
    assert (uploaded["repo_id"], uploaded["revision"]) == ("someone/policy", "v2")
    assert uploaded["commit_message"] == "Export of recap_ds"
    assert "## Robot" in hub.card and "reach the cube" in hub.card
    policy.push_to_hub("someone/other", commit_message="better")
    assert hub.asked["upload"]["commit_message"] == "better"


def test_what_cannot_go_is_one_line(export, hub, monkeypatch):
    with pytest.raises(UsageError, match=r"repo_id: .*'a/b/c'"):
        push_export(export, "a/b/c")
    with pytest.raises(UsageError, match=r"export.json: cannot be read"):
        push_export(export.parent, "someone/policy")
    weights = export / "action_expert.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=r"action_expert.safetensors has .* bytes instead of"):
        push_export(export, "someone/policy")
    weights.write_bytes(whole)
    assert hub.asked == {}
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub("no route\nto the hub"))
    with pytest.raises(RunFailed, match=r"someone/policy: the hub took no upload \(no route\)"):
        push_export(export, "someone/policy")


def test_saving_again_needs_the_word(policy, export):
    with pytest.raises(UsageError, match="holds an export"):
        policy.save_pretrained(export)
    policy.save_pretrained(export, overwrite=True)
    assert not (export / "notes.txt").exists()
