"""What is in a folder of images? For --check-data."""
import pathlib
from collections import Counter

from image_data import EXTENSIONS

LISTED = 20  # entries shown of a list that may be long


def report(folder, size, found):
    """Returns a text about a folder of images, by class, size and mode, with what may be wrong by name.

    Args:
        folder: a resolved path.
        size: pixels, to which the images are resized for training.
        found: the Facts of image_data.decode_folder.
    """
    good = [facts for facts in found if not facts.fault]
    first = {}
    for facts in good:
        first.setdefault(facts.digest, facts.name)
    lines = [
        f"{folder}: {len(found)} images, {len(found) - len(good)} of them cannot be read",
        _counts("class", ((*pathlib.PurePath(facts.name).parts[:-1], "no class")[0] for facts in good)),
        _counts("width x height", (f"{facts.width} x {facts.height}" for facts in good)),
        _counts("mode", (facts.mode for facts in good)),
        _counts("passed over, by kind", _other_files(folder)),
        _names(f"smaller than {size} px, enlarged", (f"{facts.name}: {facts.width} x {facts.height}" for facts in good
                                                     if min(facts.width, facts.height) < size)),
        _names("the same picture as another", (f"{facts.name}: as {first[facts.digest]}" for facts in good
                                               if facts.name != first[facts.digest])),
    ]
    return "\n".join(filter(None, lines))


def _counts(title, values):
    counts = Counter(values).most_common()
    shown = ", ".join(f"{name} ({count})" for name, count in counts[:LISTED])
    return counts and f"{title}: {shown}" + (f" and {len(counts) - LISTED} others" if len(counts) > LISTED else "")


def _names(title, lines):
    lines = list(lines)
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return lines and "\n  ".join([f"{title}: {len(lines)}", *lines[:LISTED], *more])


def _other_files(folder):
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix.lower() not in EXTENSIONS:
            yield path.suffix.lower() or "no ending"
