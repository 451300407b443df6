"""Where data sets are published, under which terms, and how a download is checked. `data/fetch.py` reads this.

Addresses and checksums were collected without a network. The three SHA-256 given here are those that several
independent public loaders state for the same files. Where none is known, the publisher's own checksum is asked for, and
where there is none either, the first download is recorded and later ones must equal it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Source(NamedTuple):
    """One published file.

    Attributes:
        url: its official address.
        terms: the licence or terms as far as the publisher states them.
        page: where the publisher states them, and has the last word.
        checksum: `sha256:...` or `md5:...` of the file, or None.
        checksum_url: address of a checksum that the publisher keeps beside the file, or None.
        inside: a zip is unpacked from this folder of it ("" for its top); None: the file is kept as it is.
    """

    url: str
    terms: str
    page: str
    checksum: str | None = None
    checksum_url: str | None = None
    inside: str | None = ""


_NO_WARRANTY = """\
Neither the University of Minnesota nor any of the researchers involved can guarantee the correctness of the data, its
suitability for any particular purpose, or the validity of results based on the use of the data set. The data set may
be used for any research purposes under the following conditions:

* The user may not state or imply any endorsement from the University of Minnesota or the GroupLens Research Group.
* The user must acknowledge the use of the data set in publications resulting from the use of the data set.
"""
_NOT_COMMERCIAL = """\
* The user may not use this information for any commercial or revenue-bearing purposes without first obtaining
  permission from a faculty member of the GroupLens Research Project at the University of Minnesota.
"""
_MOVIELENS_CITE = """
To acknowledge: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM
Transactions on Interactive Intelligent Systems (TiiS) 5, 4, Article 19. DOI 10.1145/2827872
"""
_MOVIELENS = (
    _NO_WARRANTY
    + "* The user may not redistribute the data without separate permission.\n"
    + _NOT_COMMERCIAL
    + _MOVIELENS_CITE
)
_MOVIELENS_LATEST = (
    _NO_WARRANTY
    + "* The user may redistribute the data set, including transformations, so long as it is distributed under these "
    "same\n  license conditions.\n"
    + _NOT_COMMERCIAL
    + "\nThis is a development data set that may change: not for shared research results.\n"
    + _MOVIELENS_CITE
)
_HETREC = """\
The data contained in hetrec2011-lastfm-2k.zip is made available for non-commercial use.

To acknowledge: Ivan Cantador, Peter Brusilovsky, Tsvi Kuflik. 2011. 2nd Workshop on Information Heterogeneity and
Fusion in Recommender Systems (HetRec 2011), RecSys 2011. The data come from Last.fm (http://www.lastfm.com).
"""
_NONE_STATED = "The publisher states no licence. Take it as data for research, not to be passed on.\n"
_FILMTRUST = (
    _NONE_STATED
    + "\nTo acknowledge: Guibing Guo, Jie Zhang, Neil Yorke-Smith. A Novel Bayesian Similarity Measure for "
    "Recommender Systems.\nIJCAI 2013.\n"
)
_CITEULIKE = (
    _NONE_STATED + "\nTo acknowledge: Hao Wang, Binyi Chen, Wu-Jun Li. Collaborative Topic Regression with Social "
    "Regularization for Tag\nRecommendation. IJCAI 2013.\n"
)
_AMAZON_2023 = (
    _NONE_STATED
    + "\nTo acknowledge: Yupeng Hou, Jiacheng Li, Zhankui He, An Yan, Xiusi Chen, Julian McAuley. Bridging "
    "Language and Items\nfor Retrieval and Recommendation. arXiv:2403.03952\n"
)
_AMAZON_2018 = (
    _NONE_STATED + "\nTo acknowledge: Jianmo Ni, Jiacheng Li, Julian McAuley. Justifying Recommendations using "
    "Distantly-Labeled Reviews and\nFine-Grained Aspects. EMNLP 2019.\n"
)

_GROUPLENS = "https://files.grouplens.org/datasets"
_MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data"
_LASTFM = Source(
    f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",
    _HETREC,
    f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-readme.txt",
    checksum="sha256:6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
)

SOURCES: Mapping[str, Source] = {
    "ml-100k": Source(
        f"{_GROUPLENS}/movielens/ml-100k.zip",
        _MOVIELENS,
        "https://grouplens.org/datasets/movielens/100k/",
        checksum="sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        inside="ml-100k",
    ),
    "ml-1m": Source(
        f"{_GROUPLENS}/movielens/ml-1m.zip",
        _MOVIELENS,
        "https://grouplens.org/datasets/movielens/1m/",
        checksum="sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        inside="ml-1m",
    ),
    "ml-latest-small": Source(
        f"{_GROUPLENS}/movielens/ml-latest-small.zip",
        _MOVIELENS_LATEST,
        "https://grouplens.org/datasets/movielens/latest/",
        checksum_url=f"{_GROUPLENS}/movielens/ml-latest-small.zip.md5",
        inside="ml-latest-small",
    ),
    "lastfm-2k": _LASTFM,
    "lastfm-2k-tags": _LASTFM,
    "filmtrust": Source(
        "https://guoguibing.github.io/librec/datasets/filmtrust.zip",
        _FILMTRUST,
        "https://guoguibing.github.io/librec/datasets.html",
    ),
    "citeulike-a": Source(
        "https://raw.githubusercontent.com/js05212/citeulike-a/master/users.dat",
        _CITEULIKE,
        "https://github.com/js05212/citeulike-a",
        inside=None,
    ),
    "citeulike-t": Source(
        "https://raw.githubusercontent.com/js05212/citeulike-t/master/users.dat",
        _CITEULIKE,
        "https://github.com/js05212/citeulike-t",
        inside=None,
    ),
    "amazon-beauty": Source(
        f"{_MCAULEY}/amazon_2023/benchmark/5core/rating_only/All_Beauty.csv.gz",
        _AMAZON_2023,
        "https://amazon-reviews-2023.github.io/",
        inside=None,
    ),
    "amazon-giftcards": Source(
        f"{_MCAULEY}/amazon_v2/categoryFiles/Gift_Cards.json.gz",
        _AMAZON_2018,
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        inside=None,
    ),
}
