"""Files of a folder that may be anyone's: what is no plain file of bounded size is refused at once."""

import os
import socket
import stat
from pathlib import Path

import pytest

from nested_jax.errors import UserError
from nested_jax.files import read_file, write_file


def test_a_plain_file_is_read(tmp_path):
    (tmp_path / "text").write_bytes(b"text")
    (tmp_path / "inside").symlink_to("text")
    for name in ("text", "inside"):
        assert read_file(tmp_path / name, 4, within=tmp_path) == b"text"
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone", 4)


def test_a_large_file_is_refused(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="sparse is larger than 5 bytes"):
        read_file(tmp_path / "sparse", 5)
    with pytest.raises(UserError, match="/proc/self/status is larger than 5 bytes"):  # one that says it is empty
        read_file("/proc/self/status", 5)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "link", "links"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path, monkeypatch):
    path, inside = tmp_path / "run" / "file", tmp_path / "run"
    inside.mkdir()
    (tmp_path / "secret").write_text("secret")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(inside)  # the name of a socket is short
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("../secret")
    else:
        (inside / "up").symlink_to("..")
        path = inside / "up" / "secret"
    with pytest.raises(UserError, match=f"^{path} is a ({kind}|link)[^\n]*$"):
        read_file(path, 100, within=inside)


def test_writing_follows_no_link_and_keeps_rights(tmp_path):
    (tmp_path / "file.part").symlink_to("victim")
    (tmp_path / "victim").write_text("mine")
    write_file(tmp_path / "file", b"new", mode=0o600)
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["file", "victim"]
