"""Reading the items to encode: ids, titles, image files, and what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest

from fedjax_rec.data import readers
from fedjax_rec.data.interactions import DataError
from fedjax_rec.encoders.items import MISSING_TITLE, image_items, text_items


@pytest.fixture
def csv(tmp_path):
    def write(text: str):
        path = tmp_path / "items.csv"
        path.write_text(text)
        return path

    return write


def test_titles_stay_text_and_missing_ones_are_named(csv):
    path = csv('item,title\n3,007\n1,"a, b"\n4,\n1000,NA\n5,"  "\n')
    items = text_items(path, "item", "title")
    assert items.inputs == ["007", "a, b", MISSING_TITLE, "NA", MISSING_TITLE]
    assert MISSING_TITLE == "The title is missing."
    assert items.problems == {2: "no title", 4: "no title"}
    np.testing.assert_array_equal(items.raw_ids, [3, 1, 4, 1000, 5])
    assert items.raw_ids.dtype == np.int64


@pytest.mark.parametrize(
    ("column", "ids"),
    [("item", ["7", "12"]), ("movieId", ["3", "1"]), ("item", ["a7", "07"]), ("parent_asin", ["0007", "0012"])],
)
def test_ids_are_typed_as_in_the_interactions(tmp_path, csv, column, ids):
    """Else a 0007 of one file would not meet the 7 of the other."""
    feedback = tmp_path / "feedback.csv"
    feedback.write_text(f"user,{column}\n" + "".join(f"1,{name}\n" for name in ids))
    known = readers.load(feedback).item_ids
    items = text_items(csv(f"{column},title\n" + "".join(f"{name},t\n" for name in ids)), column, "title")
    assert items.raw_ids.dtype == known.dtype
    assert set(items.raw_ids.tolist()) == set(known.tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,title\n1,a\n", r"line 1: no column 'item' among \['id', 'title'\]"),
        ("item,name\n1,a\n", r"line 1: no column 'title' among"),
        ("item,title\n1,a\n,b\n", r"line 3: column 'item' is empty, expected an item id"),
        ("item,title\n1,a\n2,b\n1,c\n", r"line 4: column 'item' holds 1, expected an id that did not stand before"),
        ("item,title\n1,a\n-2,b\n", r"line 3: column 'item' holds '-2', expected a whole number"),
        ("item,title\n1,\n2,\n", r"column 'title' is empty in all 2 rows"),
        ("item,title\n", r"no rows follow the header"),
        ("", r"is empty"),
    ],
)
def test_broken_tables(csv, text, message):
    with pytest.raises(DataError, match=message) as error:
        text_items(csv(text), "item", "title")
    assert "\n" not in str(error.value)


def test_an_absent_table(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        text_items(tmp_path / "none.csv", "item", "title")


def test_images_are_found_by_id(tmp_path, csv):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("1.png", "1.jpg", "2.JPEG", "3.webp", "4.txt", "55.png"):
        (folder / name).write_bytes(b"x")
    items = image_items(csv("item\n5\n4\n3\n2\n1\n"), "item", folder)
    assert [file and file.name for file in items.inputs] == [None, None, "3.webp", "2.JPEG", "1.jpg"]
    assert items.problems == {0: "no file 5.jpg", 1: "no file 4.jpg"}


def test_images_are_found_by_a_column(tmp_path, csv):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "cover.gif").write_bytes(b"x")
    items = image_items(csv("item,cover\n1,a/b.png\n2,a/cover.gif\n3,\n"), "item", tmp_path / "images", "cover")
    assert items.inputs == [None, tmp_path / "images" / "a" / "cover.gif", None]
    assert items.problems == {0: "no file a/b.png", 2: "no path in column 'cover'"}


def test_image_paths_that_lead_nowhere_are_missing_images(tmp_path, csv):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.jpg").symlink_to(folder / "gone.jpg")
    (folder / "2.jpg").write_bytes(b"x")
    items = image_items(csv("item\n1\n2\n"), "item", folder)
    assert items.inputs == [None, folder / "2.jpg"] and items.problems == {0: "no file 1.jpg"}

    (tmp_path / "elsewhere.jpg").write_bytes(b"x")  # a path that stands by itself is taken as it is
    table = csv(f"item,cover\n1,{'x' * 5000}.jpg\n2,{tmp_path / 'elsewhere.jpg'}\n")
    items = image_items(table, "item", folder, "cover")
    assert items.inputs == [None, tmp_path / "elsewhere.jpg"] and list(items.problems) == [0]


def test_wrong_image_folders(tmp_path, csv):
    path = csv("item\n7\n")
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        image_items(path, "item", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no image of any of the 1 items .*\(no file 7\.jpg\).*\.jpg, \.jpeg"):
        image_items(path, "item", tmp_path)


def test_the_fingerprint_follows_ids_texts_and_files(tmp_path, csv):
    (tmp_path / "1.jpg").write_bytes(b"abc")
    first = image_items(csv("item\n1\n2\n"), "item", tmp_path).fingerprint
    assert image_items(csv("item\n1\n2\n"), "item", tmp_path).fingerprint == first
    (tmp_path / "1.jpg").write_bytes(b"abcd")
    assert image_items(csv("item\n1\n2\n"), "item", tmp_path).fingerprint != first

    tables = ["item,title\n1,a\n2,b\n", "item,title\n1,a\n2,c\n", "item,title\n1,a\n3,b\n", "item,title\n2,b\n1,a\n"]
    assert len({text_items(csv(table), "item", "title").fingerprint for table in tables}) == len(tables)
