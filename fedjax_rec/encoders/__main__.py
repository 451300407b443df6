"""Encodes the images or titles of a csv of items into an .npz: `python -m fedjax_rec.encoders --help`.

Exit codes as of launch.py: 0 done, 2 bad usage or bad input (one line on standard error), 75 stopped early by a
signal (start the same command again to go on).
"""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
from collections.abc import Sequence

from absl import flags

from fedjax_rec.encoders import extract, items
from fedjax_rec.validate import nearest, positive

EXIT_USAGE, EXIT_AGAIN = 2, 75
REPORTED = 10
FLAGS = flags.FlagValues()  # its own: launch.py has flags of the same names

for define, name, default, text in (
    (flags.DEFINE_string, "model", None, "clip:ARCHITECTURE/TAG of open_clip, or bert:NAME of the Hugging Face hub."),
    (flags.DEFINE_string, "weights", None, "Local weights instead of a download: CLIP checkpoint, or BERT folder."),
    (flags.DEFINE_string, "items", None, "csv with a header, one row per item."),
    (flags.DEFINE_string, "id_column", "item", "Its column of raw item ids."),
    (flags.DEFINE_string, "text_column", None, "Encode the texts of this column."),
    (flags.DEFINE_string, "images", None, "Encode the images of this folder, named RAW_ID.jpg, .jpeg, .png or .webp."),
    (flags.DEFINE_string, "image_column", None, "Column with the images' paths inside --images, for other names."),
    (flags.DEFINE_string, "out", None, "The .npz to write."),
    (flags.DEFINE_string, "pooling", None, "bert: mean (of all tokens, the default) or cls (the first)."),
    (flags.DEFINE_integer, "max_tokens", None, "bert: longer texts are cut; 512 by default, or the model's limit."),
    (flags.DEFINE_bool, "normalise", True, "Scale rows to length 1."),
    (flags.DEFINE_integer, "batch_size", 64, "Items per batch."),
    (flags.DEFINE_string, "device", "cpu", "cpu or cuda."),
    (flags.DEFINE_bool, "progress", True, "Show a progress bar."),
    (flags.DEFINE_bool, "help", False, "Show this help."),
):
    define(name, default, text, flag_values=FLAGS)


def check_usage(arguments: Sequence[str]) -> None:
    """Raises a ValueError about flags that are missing or do not go together."""
    if arguments:
        raise ValueError(f"{arguments[0]!r}: expected flags only, like --{arguments[0].lstrip('-')}")
    for name in ("model", "items", "out"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} is missing; --help lists the flags")
    family, _, name = FLAGS.model.partition(":")
    if family not in ("clip", "bert") or not name:
        raise ValueError(
            f"--model={FLAGS.model}: expected clip:ARCHITECTURE/TAG or bert:NAME{nearest(family, ('clip', 'bert'))}"
        )
    if bool(FLAGS.text_column) == bool(FLAGS.images):
        raise ValueError("expected either --text_column=NAME or --images=FOLDER")
    if FLAGS.image_column and not FLAGS.images:
        raise ValueError("--image_column: expected --images=FOLDER with it")
    if FLAGS.images and family == "bert":
        raise ValueError("--images: expected a clip model, a bert model encodes texts")
    for flag in ("pooling", "max_tokens"):
        if family == "clip" and FLAGS[flag].value is not None:
            raise ValueError(f"--{flag}: expected a bert model, clip has a pooling and a text length of its own")
    if not FLAGS.out.endswith(".npz"):
        raise ValueError(f"--out={FLAGS.out}: expected a file name that ends in .npz")
    positive("--batch_size", FLAGS.batch_size)
    if FLAGS.max_tokens is not None:
        positive("--max_tokens", FLAGS.max_tokens)


def load_encoder() -> extract.Encoder:
    """The model of the flags; a ValueError says why it cannot be loaded."""
    family, _, name = FLAGS.model.partition(":")
    try:
        import torch

        if FLAGS.device not in ("cpu", "cuda") or (FLAGS.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device={FLAGS.device}: expected cpu, or cuda where there is a GPU that torch can use")
        if family == "bert":
            from fedjax_rec.encoders import bert

            pooling = FLAGS.pooling or bert.POOLINGS[0]
            return bert.load(
                name, weights=FLAGS.weights, pooling=pooling, max_tokens=FLAGS.max_tokens, device=FLAGS.device
            )
        from fedjax_rec.encoders import clip

        modality = "image" if FLAGS.images else "text"
        return clip.load(name, modality, weights=FLAGS.weights, device=FLAGS.device)
    except (ImportError, RuntimeError, OSError) as error:
        reason, remedy = error, "expected a model that can be fetched from here, or its local weights in --weights"
        while isinstance(error, ImportError) and reason.__cause__ is not None:  # transformers hides what is missing
            reason = reason.__cause__
        if isinstance(error, ImportError) or "torchvision" in str(error):
            remedy = "install the extra `encoders`, with a torchvision that fits its torch"
        reason = textwrap.shorten(str(reason), 300, placeholder=" ...")
        raise ValueError(f"--model={FLAGS.model} cannot be loaded ({reason}); {remedy}") from error


def main(arguments: Sequence[str]) -> int:
    check_usage(arguments)
    if FLAGS.images:
        found = items.image_items(FLAGS.items, FLAGS.id_column, FLAGS.images, FLAGS.image_column)
    else:
        found = items.text_items(FLAGS.items, FLAGS.id_column, FLAGS.text_column)
    extract.extract(
        load_encoder(),
        found,
        FLAGS.out,
        batch_size=FLAGS.batch_size,
        normalise=FLAGS.normalise,
        progress=FLAGS.progress,
    )
    problems = extract.problems_of(FLAGS.out)
    rule = "the mean of the others stands in" if FLAGS.images else f"encoded as {items.MISSING_TITLE!r}"
    for raw_id, why in list(problems.items())[:REPORTED]:
        print(f"item {raw_id}: {why}; {rule}", file=sys.stderr)
    if len(problems) > REPORTED:
        print(f"and {len(problems) - REPORTED} more, see `problems` in {FLAGS.out}", file=sys.stderr)
    print(f"{FLAGS.out}: {len(found.raw_ids)} items, {len(problems)} without {'image' if FLAGS.images else 'title'}")
    return 0


def command_line(argv: Sequence[str]) -> int:
    """Parses the flags and runs; bad usage and bad input become one line on standard error."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        FLAGS.unparse_flags()
        arguments = FLAGS(argv)
        if FLAGS.help:
            print(f"{__doc__}\n{FLAGS.get_help()}")
            return 0
        return main(arguments[1:])
    except flags.Error as error:
        print(f"encoders: {error}; --help lists the flags", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"encoders: {' '.join(str(error).split())}", file=sys.stderr)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(f"encoders: --batch_size={FLAGS.batch_size} does not fit the memory; give a smaller one", file=sys.stderr)
    except KeyboardInterrupt:
        print("encoders: stopped early by a signal: start again to go on", file=sys.stderr)
        return EXIT_AGAIN
    return EXIT_USAGE


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # open_clip logs an error and then raises it
    sys.exit(command_line(sys.argv))
