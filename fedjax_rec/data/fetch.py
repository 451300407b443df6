"""Fetches a published data set into the folder that `readers` expects.

    python -m fedjax_rec.data.fetch ml-100k --data_dir=DATA --accept_licence

The terms are shown first, and nothing is fetched before they are accepted. The download is checked against a known
checksum, else against the one that the publisher keeps beside the file. Its SHA-256 is recorded in DATA/FETCHED.json,
and whatever is fetched again must have it: where no checksum is known, that is all there is. The folder DATA/<name>
appears only when it is complete; a checked archive is kept until then, so that a broken-off call goes on unpacking.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fedjax_rec.data.interactions import DataError
from fedjax_rec.data.readers import DATASETS
from fedjax_rec.data.sources import SOURCES, Source
from fedjax_rec.validate import nearest

RECORD = "FETCHED.json"
TIMEOUT_S = 30  # without an answer or any byte


def fetch(
    name: str,
    data_dir: str | os.PathLike,
    *,
    accept_licence: bool = False,
    url: str | None = None,
    progress: bool = False,
) -> Path:
    """Fetches one data set, unless its folder is there already.

    Args:
        name: a key of SOURCES.
        data_dir: the folder of the data folders; it is made if need be.
        accept_licence: the caller has read the terms (SOURCES[name].terms) and accepts them.
        url: another address of the same file, say a mirror; checksums stay as they are.
        progress: show a progress bar.

    Returns:
        the folder data_dir/name.

    Raises:
        DataError: an unknown name, terms not accepted, no answer, a wrong checksum, or a file that is not what it
            should be. Nothing half-made stays under the folder's name.
    """
    source = _source(name)
    target = Path(data_dir) / name
    if _holds(target, name):
        return target
    if not accept_licence:
        raise DataError(f"{name}: its terms are not accepted; read them ({source.page}) and add --accept_licence")
    if target.exists():
        raise DataError(
            f"{target} exists without the expected {' or '.join(DATASETS[name].files)}; move it away, then fetch again"
        )
    work = Path(data_dir) / f".fetch-{name}"
    work.mkdir(parents=True, exist_ok=True)
    record = _read_record(Path(data_dir))
    archive, checked = _download(source, url or source.url, work, progress)
    sha256 = _sha256(archive)
    known = record.get(name)
    if known and known["sha256"] != sha256:
        archive.unlink()
        raise DataError(
            f"{url or source.url}: SHA-256 {sha256}, but {known['sha256']} was recorded on {known['fetched']}: the "
            f"published file has changed; to accept the new one remove '{name}' from {Path(data_dir) / RECORD}"
        )
    made = work / "unpacked"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    if source.inside is None:
        shutil.copy(archive, made / PurePosixPath(source.url).name)
    else:
        _unpack(archive, source.inside, made)
    if not _holds(made, name):
        raise DataError(
            f"{archive}: holds {', '.join(sorted(p.name for p in made.iterdir())) or 'nothing'}, expected "
            f"{' or '.join(DATASETS[name].files)}; the publisher may have changed it: unpack it into {target} by hand"
        )
    os.replace(made, target)
    record[name] = {
        "url": url or source.url,
        "sha256": sha256,
        "bytes": archive.stat().st_size,
        "checked_against": checked,
        "fetched": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    _write_record(Path(data_dir), record)
    shutil.rmtree(work)
    return target


def terms(name: str) -> str:
    """The terms of a data set and where its publisher states them."""
    source = _source(name)
    return f"{name}: {DATASETS[name].note}\n\n{source.terms}\nThe publisher's page has the last word: {source.page}\n"


def _source(name: str) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    known = ", ".join(SOURCES)
    if name == "synthetic":
        raise DataError("synthetic: is made by this package, nothing to fetch; use --dataset=synthetic")
    if name in DATASETS:
        raise DataError(
            f"{name}: no stable public address is known ({DATASETS[name].note}); put {DATASETS[name].files[0]} into "
            f"DATA/{name}/ yourself. Fetched can be: {known}"
        )
    raise DataError(f"unknown data set {name!r}{nearest(name, SOURCES)}: expected one of {known}")


def _holds(folder: Path, name: str) -> bool:
    """Whether the folder has a file that the reader looks for."""
    return any(any(folder.glob(pattern)) for pattern in DATASETS[name].files)


def _download(source: Source, url: str, folder: Path, progress: bool) -> tuple[Path, str | None]:
    """(the file, what it was checked against); a file that is there and fits is not downloaded again."""
    checked, known = "a known checksum", source.checksum
    if known is None and source.checksum_url:
        published = _retrieve(source.checksum_url, None, folder, "published", progress=False)
        found = re.search(r"\b([0-9a-fA-F]{64}|[0-9a-fA-F]{32})\b", published.read_text(errors="replace"))
        published.unlink()  # so that it is asked for anew next time
        if not found:
            raise DataError(f"{source.checksum_url}: holds no MD5 or SHA-256, expected one; try again later")
        known = f"{'sha256' if len(found[1]) == 64 else 'md5'}:{found[1].lower()}"
        checked = source.checksum_url
    archive = _retrieve(url, known, folder, PurePosixPath(source.url).name, progress)
    return archive, checked if known else None


def _retrieve(url: str, known: str | None, folder: Path, filename: str, progress: bool) -> Path:
    """Downloads one file under its name only when it is complete and has the known checksum."""
    try:
        import pooch
        import requests
    except ImportError:
        raise DataError("fetching needs the extra `fetch`: pip install 'fedjax_rec[fetch]'") from None
    pooch.get_logger().setLevel("WARNING")
    by_hand = f"or download it in a browser and unpack it into the data set's folder yourself ({url})"
    try:
        got = pooch.retrieve(
            url,
            known,
            fname=filename,
            path=folder,
            downloader=pooch.HTTPDownloader(timeout=TIMEOUT_S, progressbar=progress),
        )
    except requests.HTTPError as error:
        raise DataError(f"{url}: the server answers {error.response.status_code}; check --url, {by_hand}") from None
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError) as error:
        raise DataError(f"{url}: the download broke off ({_short(error)}); start again") from None
    except requests.RequestException as error:
        raise DataError(f"{url}: cannot be reached ({_short(error)}); check the network, {by_hand}") from None
    except ValueError as error:  # pooch: the hash does not match
        found = re.search(r"but got (\w+)", str(error))
        raise DataError(
            f"{url}: wrong checksum, expected {known}, found {found[1] if found else _short(error)}: the download is "
            "damaged or the published file has changed; nothing was kept, start again, and doubt the file if it repeats"
        ) from None
    return Path(got)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _unpack(archive: Path, inside: str, target: Path) -> None:
    """Unpacks the files under the folder `inside` of a zip into `target`.

    Raises:
        DataError: no or a damaged zip, or an entry that is a link or would leave `target`; nothing is unpacked then.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [entry for entry in file.infolist() if not entry.is_dir()]
            for entry in entries:
                _check_entry(archive, entry)
            for entry in entries:
                path = PurePosixPath(entry.filename)
                if not path.is_relative_to(inside or "."):
                    continue
                place = target / path.relative_to(inside or ".")
                place.parent.mkdir(parents=True, exist_ok=True)
                with file.open(entry) as read, place.open("wb") as write:
                    shutil.copyfileobj(read, write)
    except (zipfile.BadZipFile, EOFError) as error:
        archive.unlink()
        raise DataError(f"{archive.name}: is no complete zip archive ({_short(error)}); start again") from None


def _check_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if link or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        archive.unlink()
        raise DataError(
            f"{archive.name}: the entry {entry.filename!r} leaves the folder it is unpacked into, expected plain files "
            "inside it; nothing was unpacked: do not trust this archive"
        )


def _sha256(path: Path) -> str:
    import pooch

    return pooch.file_hash(str(path), alg="sha256")


def _read_record(data_dir: Path) -> dict[str, Any]:
    path = data_dir / RECORD
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); restore or remove it") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg}); restore or remove it") from None


def _write_record(data_dir: Path, record: dict[str, Any]) -> None:
    temporary = data_dir / (RECORD + ".part")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, data_dir / RECORD)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 fetched or there already, 2 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m fedjax_rec.data.fetch", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--data_dir", required=True, help="folder of the data folders")
    parser.add_argument("--accept_licence", action="store_true", help="you have read the terms and accept them")
    parser.add_argument("--url", help="another address of the same file")
    given = parser.parse_args(argv)
    try:
        print(terms(given.name))
        folder = fetch(
            given.name, given.data_dir, accept_licence=given.accept_licence, url=given.url, progress=sys.stderr.isatty()
        )
        said = _read_record(Path(given.data_dir)).get(given.name)
    except DataError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"fetch: {where}{error.strerror or error}; check --data_dir and the space left there", file=sys.stderr)
        return 2
    print(f"{folder}: there")
    if said and said["checked_against"]:
        print(f"checked against {said['checked_against']}; SHA-256 {said['sha256']}")
    elif said:
        print(
            f"no checksum is published for it: SHA-256 {said['sha256']} was recorded in {given.data_dir}/{RECORD} and "
            "will be asked of the next download"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
