"""Fetching data sets, from a server that the tests start: nothing here needs a network."""

from __future__ import annotations

import gc
import hashlib
import http.server
import io
import json
import socket
import stat
import threading
import warnings
import zipfile

import pytest

from fedjax_rec.data import fetch as fetching
from fedjax_rec.data.fetch import fetch, main
from fedjax_rec.data.interactions import DataError, Filters
from fedjax_rec.data.readers import DATASETS, load
from fedjax_rec.data.sources import SOURCES, Source

U_DATA = "1\t10\t5\t100\n1\t11\t4\t101\n2\t10\t3\t102\n"


def zipped(files: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return content.getvalue()


ARCHIVE = zipped({"ml-100k/u.data": U_DATA, "ml-100k/README": "terms", "__MACOSX/x": ""})


class Server:
    """Files by path, and which paths were asked for. `cut` paths promise more bytes than they send."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                body = outer.files.get(self.path)
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + (100 if self.path in outer.cut else 0)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()
    with warnings.catch_warnings():  # requests leaves the sockets of broken downloads to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def publish(server, monkeypatch):
    """publish(content, checksum=..., md5_file=..., inside=...): ml-100k is now this file of the server."""

    def put(content: bytes = ARCHIVE, *, checksum=None, md5_file: str | None = None, inside="ml-100k"):
        server.files["/ml-100k.zip"] = content
        beside = None
        if md5_file is not None:
            server.files["/ml-100k.zip.md5"], beside = md5_file.encode(), f"{server.url}/ml-100k.zip.md5"
        source = Source(f"{server.url}/ml-100k.zip", "Some terms.\n", "http://page", checksum, beside, inside)
        monkeypatch.setattr(fetching, "SOURCES", {**SOURCES, "ml-100k": source})

    return put


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def nothing_is_there(folder) -> bool:
    return not (folder / "ml-100k").exists() and not (folder / "FETCHED.json").exists()


# ---- what works ----------------------------------------------------------------------------------------------


def test_what_is_fetched_can_be_read(publish, server, tmp_path, capsys):
    publish(checksum=f"sha256:{sha(ARCHIVE)}")
    home = tmp_path / "new" / "data"
    assert main(["ml-100k", f"--data_dir={home}", "--accept_licence"]) == 0
    said = capsys.readouterr().out
    assert "Some terms." in said and "http://page" in said and "checked against a known checksum" in said
    rows = load("ml-100k", home)
    assert (rows.num_users, rows.num_items, len(rows)) == (2, 2, 3)
    assert sorted(path.name for path in (home / "ml-100k").iterdir()) == ["README", "u.data"]
    record = json.loads((home / "FETCHED.json").read_text())["ml-100k"]
    assert record["sha256"] == sha(ARCHIVE) and record["bytes"] == len(ARCHIVE)
    assert sorted(path.name for path in home.iterdir()) == ["FETCHED.json", "ml-100k"]


def test_what_is_there_is_not_fetched_again(publish, server, tmp_path):
    publish()
    first = fetch("ml-100k", tmp_path, accept_licence=True)
    asked = len(server.asked)
    assert fetch("ml-100k", tmp_path) == first and len(server.asked) == asked  # no terms either: nothing is fetched


@pytest.mark.parametrize("form", ["MD5 (ml-100k.zip) = {md5}\n", "{md5}  ml-100k.zip\n", "{sha}\n", "{MD5}\n"])
def test_the_publishers_checksum_is_asked_for(publish, server, tmp_path, form):
    publish(md5_file=form.format(md5=md5(ARCHIVE), MD5=md5(ARCHIVE).upper(), sha=sha(ARCHIVE)))
    assert (fetch("ml-100k", tmp_path, accept_licence=True) / "u.data").exists()
    assert json.loads((tmp_path / "FETCHED.json").read_text())["ml-100k"]["checked_against"].endswith(".md5")
    assert "/ml-100k.zip.md5" in server.asked


def test_without_a_checksum_the_first_download_is_recorded_and_asked_for_later(publish, tmp_path, capsys):
    publish()
    command = ["ml-100k", f"--data_dir={tmp_path}", "--accept_licence"]
    assert main(command) == 0
    assert f"no checksum is published for it: SHA-256 {sha(ARCHIVE)} was recorded" in capsys.readouterr().out
    folder = tmp_path / "ml-100k"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    changed = zipped({"ml-100k/u.data": U_DATA + "3\t10\t5\t100\n"})
    publish(changed)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "has changed" in error and sha(changed) in error and sha(ARCHIVE) in error and error.count("\n") == 1
    assert not folder.exists()
    publish(ARCHIVE)
    assert main(command) == 0


def test_a_broken_off_call_goes_on_with_what_it_has_checked(publish, server, tmp_path, monkeypatch):
    publish(checksum=f"sha256:{sha(ARCHIVE)}")
    unpack = fetching._unpack

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch("ml-100k", tmp_path, accept_licence=True)
    assert nothing_is_there(tmp_path)
    monkeypatch.setattr(fetching, "_unpack", unpack)
    fetch("ml-100k", tmp_path, accept_licence=True)
    assert server.asked == ["/ml-100k.zip"]


def test_another_address_must_give_the_same_file(publish, server, tmp_path):
    publish(checksum=f"sha256:{sha(ARCHIVE)}")
    server.files["/mirror/other.zip"] = server.files.pop("/ml-100k.zip")
    assert (fetch("ml-100k", tmp_path, accept_licence=True, url=f"{server.url}/mirror/other.zip") / "u.data").exists()


def test_a_file_that_is_no_archive_keeps_its_name(server, tmp_path, monkeypatch):
    server.files["/users.dat"] = b"2 0 1\n1 1\n"
    source = SOURCES["citeulike-a"]._replace(url=f"{server.url}/users.dat")
    monkeypatch.setattr(fetching, "SOURCES", {"citeulike-a": source})
    fetch("citeulike-a", tmp_path, accept_licence=True)
    assert len(load("citeulike-a", tmp_path)) == 3


def test_an_archive_without_a_folder(publish, server, tmp_path, monkeypatch):
    content = zipped({"ratings.txt": "1 1 2\n1 2 3\n", "trust.txt": "1 2 1\n"})
    server.files["/filmtrust.zip"] = content
    source = SOURCES["filmtrust"]._replace(url=f"{server.url}/filmtrust.zip")
    monkeypatch.setattr(fetching, "SOURCES", {"filmtrust": source})
    fetch("filmtrust", tmp_path, accept_licence=True)
    assert len(load("filmtrust", tmp_path, filters=Filters())) == 2


# ---- what is refused -----------------------------------------------------------------------------------------


def refused(folder, *arguments) -> str:
    with pytest.raises(DataError) as error:
        fetch("ml-100k", folder, accept_licence=True, **dict(arguments))
    assert nothing_is_there(folder) and "\n" not in str(error.value)
    return str(error.value)


def test_terms_are_shown_and_must_be_accepted(publish, server, tmp_path, capsys):
    publish()
    assert main(["ml-100k", f"--data_dir={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "Some terms." in said.out and "add --accept_licence" in said.err
    assert server.asked == [] and nothing_is_there(tmp_path)


def test_a_corrupted_archive(publish, tmp_path):
    broken = bytearray(ARCHIVE)
    broken[40] ^= 255
    publish(bytes(broken), checksum=f"sha256:{sha(ARCHIVE)}")
    said = refused(tmp_path)
    assert f"wrong checksum, expected sha256:{sha(ARCHIVE)}, found {sha(bytes(broken))}" in said
    assert not list((tmp_path / ".fetch-ml-100k").iterdir())
    publish(bytes(broken), md5_file=f"MD5 (ml-100k.zip) = {md5(ARCHIVE)}")
    assert "wrong checksum, expected md5:" in refused(tmp_path)


def test_a_corrupted_archive_without_a_checksum_is_found_by_its_own(publish, tmp_path):
    broken = ARCHIVE.replace(b"1\t10\t5", b"1\t10\t4")
    publish(broken)
    assert "is no complete zip archive" in refused(tmp_path)
    publish(b"<html>not found</html>")
    assert "is no complete zip archive" in refused(tmp_path)
    publish(ARCHIVE)  # what was bad is not kept
    assert (fetch("ml-100k", tmp_path, accept_licence=True) / "u.data").exists()


def test_a_download_that_breaks_off(publish, server, tmp_path):
    publish(ARCHIVE[:100])
    server.cut.add("/ml-100k.zip")
    assert "the download broke off" in refused(tmp_path)
    server.cut.clear()
    assert "is no complete zip archive" in refused(tmp_path)  # cut short at the publisher's


@pytest.mark.parametrize("name", ["../evil", "ml-100k/../../evil", "/evil", "..\\evil", "C:/evil"])
def test_an_entry_that_leaves_the_folder(publish, tmp_path, name):
    publish(zipped({"ml-100k/u.data": U_DATA, name: "evil"}))
    home = tmp_path / "deep" / "data"
    assert "leaves the folder" in refused(home) and "nothing was unpacked" in refused(home)
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("u.data"))


def test_a_link_in_the_archive(publish, tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        entry = zipfile.ZipInfo("ml-100k/u.data")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(entry, "/etc/passwd")
    publish(content.getvalue())
    assert "expected plain files" in refused(tmp_path)


def test_an_archive_without_the_expected_file(publish, tmp_path):
    publish(zipped({"ml-100k/ratings.dat": "1::2::3::4\n"}))
    assert "holds ratings.dat, expected u.data" in refused(tmp_path)


def test_a_checksum_file_without_a_checksum(publish, tmp_path):
    publish(md5_file="<html>moved</html>")
    assert "holds no MD5 or SHA-256" in refused(tmp_path)


def test_no_server_and_no_file(publish, server, tmp_path):
    publish()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/ml-100k.zip"
    said = refused(tmp_path, ("url", closed))
    assert "cannot be reached" in said and "check the network" in said
    del server.files["/ml-100k.zip"]
    assert "the server answers 404" in refused(tmp_path)


def test_a_folder_that_is_in_the_way_is_left_alone(publish, server, tmp_path):
    publish()
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"exists without the expected u\.data"):
        fetch("ml-100k", tmp_path, accept_licence=True)
    assert (tmp_path / "ml-100k" / "notes.txt").read_text() == "mine" and server.asked == []


def test_unknown_and_unpublished_names(tmp_path, capsys):
    for name, said in {
        "ml-100": "did you mean ml-100k?",
        "ku": "ku: no stable public address is known",
        "synthetic": "is made by this package",
    }.items():
        assert main([name, f"--data_dir={tmp_path}", "--accept_licence"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_data_folder_is_one_line(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("")
    assert main(["ml-100k", f"--data_dir={path}", "--accept_licence"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fetch: ") and "taken" in error and error.count("\n") == 1


def test_a_broken_record_is_named(publish, tmp_path):
    publish()
    (tmp_path / "FETCHED.json").write_text("{")
    with pytest.raises(DataError, match=r"FETCHED\.json line 1: not JSON"):
        fetch("ml-100k", tmp_path, accept_licence=True)


# ---- the list of sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_a_data_set_with_terms(name):
    source = SOURCES[name]
    assert name in DATASETS and source.url.startswith("https://") and source.page.startswith("https://")
    assert len(source.terms) > 100 and name in fetching.terms(name)
    if source.checksum:
        kind, digest = source.checksum.split(":")
        assert len(bytes.fromhex(digest)) == {"md5": 16, "sha256": 32}[kind]
    if source.inside is None:  # the reader must find the file under the name it is published with
        published = fetching.PurePosixPath(source.url)
        assert any(published.match(pattern) for pattern in DATASETS[name].files)
