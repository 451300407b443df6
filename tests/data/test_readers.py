"""Readers: counts of the real files, every format on small files, one message per kind of broken input."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedjax_rec.data.interactions import DataError, Filters
from fedjax_rec.data.readers import DATASETS, load, read_items

# users, items, rows after the filters, pairs
REAL = {
    "ku": (None, 204, 560, 3_489, 3_484),
    "filmtrust raw": (Filters(), 1_508, 2_071, 35_497, 35_494),
    "filmtrust": (None, 1_002, 2_042, 33_372, 33_369),
    "amazon-video": (None, 1_372, 7_957, 23_181, 23_181),
    "ml-100k": (None, 943, 1_682, 100_000, 100_000),
    "ml-latest-small raw": (Filters(), 610, 9_724, 100_836, 100_836),
    "ml-latest-small": (None, 610, 3_650, 90_274, 90_274),
    "ml-1m": (None, 6_040, 3_706, 1_000_209, 1_000_209),
    "citeulike-a": (None, 5_551, 16_980, 204_986, 204_986),
    "amazon-beauty": (None, 253, 356, 2_535, 2_535),
}


@pytest.mark.parametrize("case", REAL)
def test_counts_of_real_files(case, real_data):
    filters, users, items, rows, pairs = REAL[case]
    name = case.split()[0]
    made = load(name, real_data(name).parent, filters=filters)
    assert (made.num_users, made.num_items, made.counts["rows"], len(made)) == (users, items, rows, pairs)
    assert made.counts["duplicates"] == rows - pairs
    assert made.name == name


@pytest.mark.parametrize(("name", "share"), [("amazon-video", 0.28), ("ml-100k", 0.506)])
def test_share_of_rows_that_repeat_a_time_of_their_user(name, share, real_data):
    made = load(name, real_data(name).parent)
    repeated = pd.DataFrame({"user": made.user, "time": made.time}).duplicated().mean()
    assert repeated == pytest.approx(share, abs=0.002)


def test_filmtrust_times(real_data):
    folder = real_data("filmtrust").parent
    by_item = load("filmtrust", folder)
    per_item = pd.Series(by_item.time).groupby(by_item.item)
    assert (per_item.nunique() == 1).all()
    assert per_item.first().is_unique
    by_position = load("filmtrust", folder, filmtrust_time="position")
    assert (pd.Series(by_position.time).groupby(by_position.user).diff().dropna() > 0).all()
    assert np.array_equal(by_item.item, by_position.item)


def test_ml_1m_rows_of_unknown_order_come_first(real_data):
    made = load("ml-1m", real_data("ml-1m").parent)
    assert (made.time == -1).sum() == 598
    assert made.time.min() == -1


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(raw))
    return path


def review(user: str, item: str, time: int, **more: object) -> str:
    return json.dumps({"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time, **more}) + "\n"


REVIEWS = review("A1", "0439893577", 9) + review("A2", "B01", 8, reviewText="good\nindeed") + review("A1", "B01", 7)
LASTFM_TAGS = "userID\tartistID\ttagID\tday\tmonth\tyear\r\n" + "".join(
    f"2\t{artist}\t{tag}\t1\t{month}\t2009\r\n" for artist, tag, month in [(52, 13, 4), (52, 15, 3), (63, 13, 5)] * 4
)

# data set, file, content, raw users in order, raw items, pairs, times
SMALL = {
    "citeulike": ("citeulike-t", "users.dat", "2 5 9\n0\n1 9\n", [0, 2], [5, 9], 3, [0, 1, 2]),
    "lastfm": (
        "lastfm-2k",
        "user_artists.dat",
        "userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n",
        [2],
        [51, 52],
        2,
        [0, 1],
    ),
    "lastfm tags": (
        "lastfm-2k-tags",
        "user_taggedartists.dat",
        LASTFM_TAGS,
        [2],
        [52, 63],
        2,
        [20090301, 20090501],
    ),
    "xing": ("xing", "interactions.csv", "380.0,806.0\n12.0,806.0\n", [380, 12], [806], 2, [0, 1]),
    "xing header": ("xing", "train.csv", "uid,iid\n380.0,806.0\n12.0,7.0\n", [380, 12], [7, 806], 2, [0, 1]),
    "amazon 2018": (
        "amazon-giftcards",
        "Gift_Cards.json.gz",
        REVIEWS,
        ["A1", "A2"],
        ["0439893577", "B01"],
        3,
        [9, 8, 7],
    ),
    "amazon 2023": (
        "amazon-giftcards",
        "Gift_Cards.csv.gz",
        "user_id,parent_asin,rating,timestamp\nAX,0439893577,5.0,1547589356557\nAY,0000000001,1.0,3\n",
        ["AX", "AY"],
        ["0000000001", "0439893577"],
        2,
        [1547589356557, 3],
    ),
    "ml-1m": (
        "ml-1m",
        "ratings.dat",
        "1::1193::5::978300760\n2::661::3::978302109\n",
        [1, 2],
        [661, 1193],
        2,
        [978300760, 978302109],
    ),
    "ml-1m xz": (
        "ml-1m",
        "interactions.csv.xz",
        "user_id,movie_id,position,rating,timestamp\n1,5,0,4,978300019\n1,6,1,,\n1,7,-1,,\n",
        [1],
        [5, 6, 7],
        3,
        [0, 1, -1],
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_formats_of_absent_data_sets(case, tmp_path):
    name, file, content, users, items, pairs, times = SMALL[case]
    write(tmp_path / name, file, content)
    made = load(name, tmp_path)
    assert made.user_ids.tolist() == users
    assert sorted(made.item_ids.tolist()) == items
    assert len(made) == pairs
    assert made.time.tolist() == times


def test_lastfm_tags_keep_users_with_ten_rows(tmp_path):
    folder = tmp_path / "lastfm-2k-tags"
    write(folder, "user_taggedartists.dat", LASTFM_TAGS + "3\t52\t13\t1\t4\t2009\r\n" * 9)
    assert load("lastfm-2k-tags", tmp_path).counts["rows"] == 12
    assert load("lastfm-2k-tags", tmp_path, filters=Filters()).num_users == 2


def test_xing_parts_are_read_one_after_the_other(tmp_path):
    write(tmp_path / "xing", "vali_user.csv", "uid,iid\n1.0,2.0\n")
    write(tmp_path / "xing", "vali_user_item.csv", "uid,iid\n3.0,4.0\n1.0,2.0\n")
    made = load("xing", tmp_path)
    assert (made.user_ids.tolist(), made.counts["duplicates"]) == ([1, 3], 1)


@pytest.mark.parametrize("header", ["userID,itemID,timestamp", "uid,iid,time", "user,movie_id,unixReviewTime"])
def test_csv_path_with_aliases(header, tmp_path):
    made = load(write(tmp_path, "my.log.csv", f"x,{header},rating\n9,1,12.0,300,1\n9,0,12.0,200,2\n"))
    assert (made.name, made.user_ids.tolist(), made.item_ids.tolist()) == ("my.log", [1, 0], [12])
    assert made.time.tolist() == [300, 200]


def test_csv_path_without_time_and_with_text_ids(tmp_path):
    made = load(str(write(tmp_path, "log.csv.gz", "\ufeffuser,item\nNA,a\nnull,b\n")))
    assert (made.name, made.user_ids.tolist(), made.time.tolist()) == ("log", ["NA", "null"], [0, 1])


IDS = {
    "leading zeros": ["007", "7", "12"],
    "isbn": ["0486427706", "B00005N7P0", "0001"],
    "a late word": ["1", "2", "x7"],
    "beyond int64": ["108990823942597776781", "108990823942597776782", "5"],
    "a fraction": ["1.5", "a", "3"],
}


@pytest.mark.parametrize("case", IDS)
def test_csv_ids_are_text_unless_all_are_whole_numbers(case, tmp_path):
    for ids in (IDS[case], IDS[case][::-1]):
        rows = "".join(f"{raw},{raw}\n" for raw in ids)
        made = load(write(tmp_path, "log.csv", "user,item\n" + rows))
        assert made.user_ids.tolist() == ids
        assert sorted(made.item_ids.tolist()) == sorted(ids)


def test_csv_ids_that_are_whole_numbers_keep_every_digit(tmp_path):
    made = load(write(tmp_path, "log.csv", "user,item\n900719925474099301,12.0\n 900719925474099302,12\n"))
    assert made.user_ids.tolist() == [900719925474099301, 900719925474099302]
    assert made.item_ids.tolist() == [12]


def test_item_files_have_ids_as_interactions_do(tmp_path):
    texts = read_items(write(tmp_path, "a.csv", "item,title\n007,x\n7,y\n"), "item", ["title"])
    assert texts["item"].tolist() == ["007", "7"]
    whole = read_items(write(tmp_path, "b.csv", "item,title\n8,x\n7.0,y\n"), "item", ["title"])
    assert whole["item"].tolist() == [8, 7]


def test_csv_times_may_be_iso_text(tmp_path):
    rows = "1,5,2020-03-01T10:00:00\n1,6,2020-03-01\n1,7,2020-03-02 00:00:00\n"
    made = load(write(tmp_path, "log.csv", "user,item,time\n" + rows))
    assert np.argsort(made.time).tolist() == [1, 0, 2]


def test_inter_path(tmp_path):
    rows = "item_id:token\tuser_id:token\trating:float\ttimestamp:float\n{}\t7\t3\t8.8125E8\n5\t08\t3\t881250000\n"
    numeric = load(write(tmp_path, "a.inter", rows.format("4")))
    assert sorted(numeric.item_ids.tolist()) == [4, 5]
    assert numeric.user_ids.tolist() == ["7", "08"]
    assert numeric.time.tolist() == [881250000, 881250000]
    assert sorted(load(write(tmp_path, "b.inter", rows.format("x"))).item_ids.tolist()) == ["5", "x"]


def test_an_id_that_begins_with_a_quote_swallows_no_rows(tmp_path):
    rows = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(
        f"u{user}\t{item}\t{time}\n" for user in (1, 2) for time, item in enumerate(('"a', "b", '"c', "d"))
    )
    read = load(write(tmp_path, "a.inter", rows))
    assert sorted(read.item_ids.tolist()) == ['"a', '"c', "b", "d"] and read.counts["rows"] == 8


def test_blanks_around_ids_are_no_part_of_them(tmp_path):
    rows = "user, item, timestamp\n" + "".join(f"u1, {item} , {t}\n" for t, item in enumerate("abcd"))
    read = load(write(tmp_path, "a.csv", rows))
    assert sorted(read.item_ids.tolist()) == ["a", "b", "c", "d"]
    with pytest.raises(DataError, match="line 3"):
        load(write(tmp_path, "b.csv", rows.replace(" b ", "  ")))


def test_folder_with_amazon_reviews(tmp_path):
    write(tmp_path / "Toys", "Toys.json.gz", REVIEWS)
    write(tmp_path / "Toys", "meta_Toys.json.gz", "{}")
    made = load(tmp_path / "Toys", filters=Filters(min_user=2))
    assert (made.name, made.num_users, len(made)) == ("Toys", 1, 2)


MONTH_13 = "1\t1\t1\t1\t13\t2009"
XZ = "user_id,movie_id,position\n1,2,x\n"
# data set or file, file of a data set, content, line, found, expected, remedy
CORRECT, AGAIN = "correct or remove that line", "get the file again"
BROKEN = {
    "word for an id": ("ml-100k", "u.data", "1\t2\t3\t4\n1\tx\t3\t4\n", 2, "'x'", "whole number", CORRECT),
    "negative id": ("ml-100k", "u.data", "1\t2\t3\t4\n1\t-2\t3\t4\n", 2, "-2", "whole number", CORRECT),
    "fraction": ("amazon-video", "ratings.dat", "1.5,2,3,4\n", 1, "1.5", "whole number", CORRECT),
    "cut line": ("filmtrust", "ratings.txt", "1::2::3\n1::2", 2, "is empty", "a number", CORRECT),
    "long line": ("amazon-video", "ratings.dat", "1,2,3,4\n1,2,3,4,5\n", 2, "saw 5", "','", CORRECT),
    "long first line": ("amazon-video", "ratings.dat", "1,2,3,4,5\n", 1, "more than 4", "4", CORRECT),
    "other separator": ("ml-1m", "ratings.dat", "1,2,3,4\n", 1, "'1,2,3,4'", "whole number", CORRECT),
    "blank line": ("ml-100k", "u.data", "1\t2\t3\t4\n\n1\t3\t3\t4\n", 2, "is empty", "whole number", CORRECT),
    "not a time": ("ml-100k", "u.data", "1\t2\t3\tnan\n", 1, "'nan'", "a number", CORRECT),
    "empty file": ("ml-100k", "u.data", "", 1, "is empty", "one interaction per line", AGAIN),
    "not text": ("ku", "inter.csv", b"userID,itemID\n1,2\n\xff,3\n", 3, "0xff", "text", "save the file"),
    "semicolons": ("ku", "inter.csv", "user;item\n1;2\n", 1, "no user column", "userid", "separate columns by commas"),
    "missing column": ("ku", "inter.csv", "userID,rating\n1,2\n", 1, "no item column", "itemid", "add or rename"),
    "bad label": ("ku", "inter.csv", "userID,itemID,split_label\n1,2,0\n1,3,7\n", 3, "7", "2 (test)", CORRECT),
    "missing time": ("ku", "inter.csv", "userID,itemID,timestamp\n1,2,9\n1,3,\n", 3, "is empty", "a time", CORRECT),
    "no position": ("ml-1m", "interactions.csv.xz", "user_id,movie_id\n1,2\n", 1, "'position'", "rank", AGAIN),
    "word for a position": ("ml-1m", "interactions.csv.xz", XZ, 2, "'x'", "a time", CORRECT),
    "count": ("citeulike-a", "users.dat", "1 4\n3 4 5\n", 2, "states 3 items and lists 2", "the count", AGAIN),
    "library line": ("citeulike-a", "users.dat", "1 4\n\n1 5\n", 2, "is empty", "a count", CORRECT),
    "library item": ("citeulike-a", "users.dat", "1 4\n2 4 -5\n", 2, "-5", "whole number", CORRECT),
    "no date": ("lastfm-2k-tags", "user_taggedartists.dat", "userID\tartistID\n1\t2\n", 1, "'year'", "day", AGAIN),
    "month": ("lastfm-2k-tags", "user_taggedartists.dat", LASTFM_TAGS + MONTH_13, 14, "13", "12", CORRECT),
    "xing word": ("xing", "interactions.csv", "1.0,2.0\n1.0,b\n", 2, "'b'", "whole number", CORRECT),
    "json": ("amazon-giftcards", "Gift_Cards.json.gz", REVIEWS + "{'a\n", 4, "is no JSON", "one review", AGAIN),
    "json key": ("amazon-giftcards", "Gift_Cards.json.gz", '{"asin": "B"}\n', 1, "'reviewerID'", "asin", CORRECT),
    "json list": ("amazon-giftcards", "Gift_Cards.json.gz", "[]\n", 1, "'reviewerID'", "a review", CORRECT),
    "no json": ("amazon-giftcards", "Gift_Cards.json.gz", "\n", 1, "is empty", "one review", AGAIN),
    "negative in csv": ("log.csv", None, "user,item\n1,2\n-7,3\n", 3, "'-7'", "whole number", CORRECT),
    "fraction in csv": ("log.csv", None, "user,item\n1,2\n7.5,3\n", 3, "'7.5'", "whole number", CORRECT),
    "fractions in csv": ("log.csv", None, "user,item\n1.5,2\n7.5,3\n", 2, "'1.5'", "whole number", CORRECT),
    "nan in csv": ("log.csv", None, "user,item\n1,2\nNaN,3\n", 3, "'NaN'", "whole number", CORRECT),
    "empty in csv": ("log.csv", None, "user,item\n1,2\n,3\n", 3, "is empty", "whole number", CORRECT),
    "empty text id": ("log.csv", None, "user,item\na,b\n,c\n", 3, "is empty", "an id", CORRECT),
    "open quote": ("log.csv", None, 'user,item\n1,2\n1,"3\n2,4\n', 3, "EOF inside string", "','", CORRECT),
    "blank header": ("log.csv", None, "\nuser,item\n1,2\n", 1, "is empty", "one interaction", CORRECT),
    "negative token": ("log.inter", None, "user_id:token\titem_id:token\n1\t2\n1\t-2\n", 3, "-2", "whole", CORRECT),
    "a date": ("log.csv", None, "user,item,date\n1,2,3\n", 1, "'date' looks like a time", "timestamp", "rename it"),
    "a token": ("log.inter", None, "uid:token\tiid:token\tts:float\n1\t2\t3\n", 1, "'ts'", "timestamp", "or drop it"),
    "a word among dates": ("log.csv", None, "uid,iid,time\n1,2,2020-01-01\n1,3,x\n", 3, "'x'", "ISO text", CORRECT),
    "no user": ("log.inter", None, "item_id:token\n1\n", 1, "no user column", "userid", "add or rename"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_names_file_line_and_remedy(case, tmp_path):
    name, file, content, line, found, expected, remedy = BROKEN[case]
    path = write(tmp_path / name, file, content) if file else write(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        load(name if file else path, tmp_path, filters=Filters())
    message = str(error.value)
    assert message.startswith(f"{path}, line {line}:")
    assert found in message
    assert expected in message.split("expected", 1)[1]
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("file", ["log.csv.gz", "log.csv.xz", "log.json.gz"])
def test_cut_and_false_archives(file, tmp_path):
    lines = "".join(review(f"A{n}", f"B{n * n}", n) for n in range(2000))
    whole = write(tmp_path, file, lines).read_bytes()
    for broken in (whole[: len(whole) // 2], b"user,item\n1,2\n"):
        (tmp_path / file).write_bytes(broken)
        with pytest.raises(DataError, match=rf"{file}, line \d+: the archive .* get the file again"):
            load(tmp_path / file)


def test_a_header_without_rows(tmp_path):
    with pytest.raises(
        DataError, match=r"log.csv, line 2: no rows follow the header, expected some; get the file again"
    ):
        load(write(tmp_path, "log.csv", "user,item\n"))


@pytest.mark.parametrize(("wrong", "near"), [("ml100k", "ml-100k"), ("lastfm_2k", "lastfm-2k"), ("KU", "ku")])
def test_unknown_name_names_the_nearest(wrong, near):
    with pytest.raises(DataError, match=f"unknown data set '{wrong}', did you mean '{near}'. Known: synthetic, ku"):
        load(wrong)


@pytest.mark.parametrize("name", DATASETS)
def test_missing_file_names_file_flag_and_origin(name, tmp_path):
    for data_dir in (None, tmp_path):
        with pytest.raises(DataError) as error:
            load(name, data_dir)
        message = str(error.value)
        assert DATASETS[name].files[0] in message
        assert "--data_dir" in message
        assert DATASETS[name].note in message


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none.csv: there is no such file.*--dataset"):
        load(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"log.txt: neither a data set name nor a readable file.*\.inter"):
        load(write(tmp_path, "log.txt", "1"))
    with pytest.raises(DataError, match=r"holds 0 review files .*json.gz, expected one; give the path"):
        load(tmp_path)
    write(tmp_path / "ku", "inter.csv", "user,item\n1,2\n")
    with pytest.raises(DataError, match="give --dataset=ku --data_dir="):
        load(tmp_path / "ku")
    for file in ("Gift_Cards.json.gz", "Gift_Cards_5.json.gz"):
        write(tmp_path / "amazon-giftcards", file, REVIEWS)
    with pytest.raises(DataError, match="expected one of them; move the others away"):
        load("amazon-giftcards", tmp_path)


def test_filmtrust_is_read_as_either_publisher_ships_it(tmp_path):
    write(tmp_path / "a" / "filmtrust", "ratings.txt", "1::1::2\n1::2::3.5\n2::1::4\n")
    write(tmp_path / "b" / "filmtrust", "ratings.txt", "1 1 2\n1 2 3.5\n2 1 4\n")
    a, b = (load("filmtrust", tmp_path / part, filters=Filters()) for part in "ab")
    assert a.item_ids[a.item].tolist() == b.item_ids[b.item].tolist() == [1, 2, 1]
    assert a.user_ids[a.user].tolist() == b.user_ids[b.user].tolist() == [1, 1, 2]


def test_filmtrust_time_is_checked(tmp_path):
    write(tmp_path / "filmtrust", "ratings.txt", "1::1::2\n")
    with pytest.raises(DataError, match="filmtrust_time is 'rank', expected item or position"):
        load("filmtrust", tmp_path, filmtrust_time="rank")


def test_synthetic_needs_no_files():
    assert load("synthetic").name == "synthetic"
    with pytest.raises(DataError, match="takes no filters, found min_user=3; leave them unset"):
        load("synthetic", filters=Filters(min_user=3))
