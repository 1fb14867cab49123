import os
import pickle
import socket
import urllib.request

import huggingface_hub
import pytest

from recap_ds.data import remote
from recap_ds.data.remote import CommandOrigin, HttpOrigin, NotThere, Refused, TransferFailed, is_remote, open_origin
from recap_ds.errors import UsageError
from tests.data.shard_server import serve


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(os.urandom(2_500_000))
    return tmp_path


def whole(origin, name: str) -> bytes:
    return b"".join(origin.read(name))


def test_addresses_and_folders_are_told_apart():
    for place in (
        "http://h/x",
        "HTTPS://h/x",
        "s3://b/x",
        "gs://b",
        "hf://datasets/o/n",
        "pipe:cat {name}",
        "nfs://x/y",
    ):
        assert is_remote(place)
    for place in ("data/mine", "/data/mine", "./http:/x", "C:/x", "pipes", "a b"):
        assert not is_remote(place)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://host/x", r"'ftp' is none of http"),
        ("file:///data/mine", r"give a local folder by its path"),
        ("http:///x", r"give a host"),
        ("https://me:secret@host/x", r"https://host: give a host, without a name or a password"),
        ("pipe:cat /x", r"must say where a file's name goes"),
        ("hf://owner/name", r"write hf://datasets/OWNER/NAME"),
    ],
)
def test_addresses_that_are_none(place, message):
    with pytest.raises(UsageError, match=message) as caught:
        open_origin(place)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_http_gives_the_file_or_says_why_not(folder):
    with serve(folder) as server:
        origin = pickle.loads(pickle.dumps(open_origin(f"{server.url}/?signature=se%2Fcret")))
        assert whole(origin, "a.tar") == (folder / "a.tar").read_bytes()
        assert server.queries == {"signature=se%2Fcret"}
        assert "cret" not in origin.place and "cret" not in repr(origin)
        server.truncate.add("a.tar")
        with pytest.raises(TransferFailed, match="1250000 of 2500000 bytes came"):
            whole(origin, "a.tar")
        server.drop_every = 1
        with pytest.raises(TransferFailed) as caught:
            whole(origin, "a.tar")
        assert type(caught.value) is TransferFailed
        server.drop_every = 0
        for code, kind in ((404, NotThere), (403, Refused), (503, TransferFailed), (429, TransferFailed)):
            server.answers["a.tar"] = code
            with pytest.raises(TransferFailed, match=f"the server says {code}") as caught:
                whole(origin, "a.tar")
            assert type(caught.value) is kind
    with pytest.raises(TransferFailed, match="refused"):
        whole(origin, "a.tar")


def test_a_connection_without_a_word_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TransferFailed, match="timed out"):
        whole(open_origin(f"http://127.0.0.1:{silent.getsockname()[1]}/x"), "a.tar")
    with pytest.raises(TransferFailed, match=r"not a byte for 0\.1 s"):
        whole(open_origin("pipe:sleep 60; echo {name}"), "a.tar")


def test_the_hub_is_asked_with_the_token_that_redirects_do_not_see(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    seen = []

    def refuse(request, timeout):
        seen.append(request)
        raise OSError("no network here")

    monkeypatch.setattr(remote, "urlopen", refuse)
    origin = open_origin("hf://datasets/me/robot@v1.0/shards/mine")
    assert origin.place == "hf://datasets/me/robot@v1.0/shards/mine" and "hf_secret" not in repr(origin)
    with pytest.raises(TransferFailed, match="no network here"):
        whole(origin, "manifest.json")
    (request,) = seen
    assert request.full_url.endswith("/datasets/me/robot/resolve/v1.0/shards/mine/manifest.json")
    assert request.get_header("Authorization") == "Bearer hf_secret" and "Authorization" not in request.headers
    assert open_origin("hf://datasets/me/robot").base.endswith("/datasets/me/robot/resolve/main/")
    again = urllib.request.HTTPRedirectHandler().redirect_request(request, None, 302, "", {}, "https://cdn/x")
    assert again.get_header("Authorization") is None


def test_commands_give_the_file_or_say_why_not(folder):
    origin = open_origin(f"pipe:cat {folder}/{{name}}")
    assert whole(origin, "a.tar") == (folder / "a.tar").read_bytes()
    with pytest.raises(NotThere, match=r"No such file"):
        whole(origin, "b.tar")
    for command, kind, said in (
        ("echo {name}; exit 3", TransferFailed, "ended with exit code 3"),
        ("echo An error occurred '(403)' when >&2; false {name}", Refused, "(403)"),
        (
            "printf 'ERROR: no active account\\nplease run\\n$ x\\n' >&2; false {name}",
            Refused,
            "sh: ERROR: no active account",
        ),
        ("printf 'one\\nconnection lost\\n\\n' >&2; false {name}", TransferFailed, "/bin/sh: connection lost"),
    ):
        with pytest.raises(TransferFailed) as caught:
            whole(open_origin(f"pipe:{command}"), "a.tar")
        assert type(caught.value) is kind and said in str(caught.value)


def test_a_command_that_is_not_read_to_its_end_is_ended(folder):
    blocks = open_origin("pipe:echo $$; sleep 600 {name}").read("a.tar")
    number = int(next(blocks))
    blocks.close()
    assert not os.path.exists(f"/proc/{number}")


def test_stores_are_reached_by_the_tools_their_users_have(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    for place, tool in (("s3://bucket/mine", "aws"), ("gs://bucket/mine/", "gsutil")):
        with pytest.raises(UsageError, match=f"needs the command '{tool}'"):
            open_origin(place)
    for tool, said in (("aws", "An error occurred (404) when calling HeadObject"), ("gsutil", "No URLs matched: x")):
        (tools / tool).write_text(f'#!/bin/sh\ncase "$*" in *missing*) echo "{said}" >&2; exit 1;; esac\necho "$@"\n')
        (tools / tool).chmod(0o755)
    assert whole(open_origin("s3://bucket/mine/"), "a.tar") == b"s3 cp --only-show-errors s3://bucket/mine/a.tar -\n"
    assert whole(open_origin("gs://bucket/mine"), "a.tar") == b"-q cat gs://bucket/mine/a.tar\n"
    (tools / "gsutil").rename(tools / "gcloud")  # of which gcloud is the newer
    assert whole(open_origin("gs://bucket/mine"), "a.tar") == b"storage cat gs://bucket/mine/a.tar\n"
    for place in ("s3://bucket/missing", "gs://bucket/missing"):
        with pytest.raises(NotThere):
            whole(open_origin(place), "a.tar")


@pytest.mark.parametrize("name", ["../a", "/a", "a/../b", ".hidden", "a b", "a;b", "-rf", "", "$(x)"])
def test_no_name_reaches_a_shell_or_leaves_the_folder(name):
    for origin in (CommandOrigin("pipe", ("/bin/echo", "{name}")), HttpOrigin.at("http://127.0.0.1:9/x")):
        with pytest.raises(AssertionError):
            whole(origin, name)
