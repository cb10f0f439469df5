"""What is in a folder of images, and what may be wrong with it: for --check-data."""
import pathlib
from collections import Counter

from console import say
from image_data import EXTENSIONS, check_readable, decode_folder

LISTED = 20  # entries shown of a list that may be long


def check_data(folder, size, *, cache_dir, skip_bad):
    """Decodes every image of a folder and prints a report. Arguments as for image_data.load_images.

    Raises:
        DataError: as image_data.decode_folder; unreadable images, all of them by name.
    """
    files = decode_folder(folder, size, cache_dir=cache_dir)
    say(report(folder, size, files))
    bad = {facts.name: facts.fault for facts in files if facts.fault}
    check_readable(folder, bad, len(files), skip_bad=skip_bad)
    say_skipped(bad)


def say_skipped(bad):
    """Prints the files that are left out, a dict of names to reasons."""
    if bad:
        say("\n".join([f"warning: {len(bad)} files cannot be read and are left out:",
                       *(f"  {name}: {reason}" for name, reason in bad.items())]))


def report(folder, size, files):
    """Returns a text about a folder of images, by class, size and mode, and the names of files that may be wrong.

    Args:
        folder: a resolved path.
        size: pixels, to which the images are resized for training.
        files: the FileFacts of image_data.decode_folder.
    """
    good = [facts for facts in files if not facts.fault]
    first = {}
    for facts in good:
        first.setdefault(facts.digest, facts.name)
    small = [f"{facts.name}: {facts.width} x {facts.height}" for facts in good if min(facts.width, facts.height) < size]
    same = [f"{facts.name}: as {first[facts.digest]}" for facts in good if facts.name != first[facts.digest]]
    lines = [
        f"{folder}: {len(files)} images, {len(files) - len(good)} of them cannot be read",
        _counts("class", ((*pathlib.PurePath(facts.name).parts[:-1], "no class")[0] for facts in good)),
        _counts("width x height", (f"{facts.width} x {facts.height}" for facts in good)),
        _counts("mode", (facts.mode for facts in good)),
        _counts("ignored files, by extension", _other_files(folder)),
        _listing(f"smaller than {size} px, enlarged: {len(small)}\n  ", small, "\n  "),
        _listing(f"the same picture as another: {len(same)}\n  ", same, "\n  "),
    ]
    return "\n".join(line for line in lines if line)


def _counts(title, values):
    """A line with the number of times each value occurs."""
    return _listing(f"{title}: ", [f"{name} ({count})" for name, count in Counter(values).most_common()], ", ")


def _listing(title, entries, separator):
    """The title and the first entries, "" if there are none."""
    more = [f"and {len(entries) - LISTED} more"] if len(entries) > LISTED else []
    return title + separator.join([*entries[:LISTED], *more]) if entries else ""


def _other_files(folder):
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix.lower() not in EXTENSIONS:
            yield path.suffix.lower() or "no extension"
