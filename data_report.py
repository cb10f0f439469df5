"""What is in a folder of images, and what may be wrong with it: for --check-data."""
import statistics
from collections import Counter

from console import listed, say
from image_data import (
    check_readable,
    class_of,
    common_levels_of,
    decode_folder,
    folders_without_images,
    passed_over_text,
)
from image_sizes import LONGEST, SMALLEST_MAP, height_and_width, plain_size, size_text

MANY = 0.1  # of the images


def check_data(folder, config):
    """Decodes every image of a folder and prints a report.

    Args:
        folder: a resolved path.
        config: a Config, for image_size, channels, resize_mode, video_fps, cache_dir and skip_bad.

    Raises:
        DataError: as image_data.decode_folder; unreadable images, all of them by name.
    """
    found, files = decode_folder(folder, config.image_size, cache_dir=config.cache_dir, channels=config.channels,
                                 resize_mode=config.resize_mode, video_fps=config.video_fps)
    bad = {facts.name: facts.fault for facts in files if facts.fault}
    say(report(folder, config, files))
    say_what_is_left_out({}, found.passed_over)
    check_readable(found, bad, skip_bad=config.skip_bad)
    say_what_is_left_out(bad | found.closed, {}, {facts.film: facts.remark for facts in files if facts.remark})


def say_what_is_left_out(bad, passed_over, remarks=None):
    """Prints ImageSet.skipped, ImageSet.passed_over and ImageSet.remarks."""
    if passed_over:
        say(f"passed over: {passed_over_text(passed_over)}")
    for film, remark in (remarks or {}).items():
        say(f"note: {film}: {remark}")
    if bad:
        say("\n".join([f"warning: {len(bad)} files cannot be read and are left out:",
                       *(f"  {name}: {reason}" for name, reason in bad.items())]))


def say_classes(data):
    """Prints the classes of an ImageSet that are learned, and what of it may be no class, or be in two."""
    say(_counts("classes", map(repr, data.classes)))
    if empty := folders_without_images(data.folder, data.classes):
        say(f"note: no images of their own, so no classes: {listed(map(repr, empty))}")
    if data.in_two_classes:
        same = listed(f"{name} as {other}" for name, other in data.in_two_classes.items())
        say(f"note: the same picture in two classes: {same}")


def say_what_would_suit(data, channels):
    """Prints what of an ImageSet another number of channels would suit, and how samples of more than 8 bits are scaled."""
    for line in _advice(len(data.images), data.num_grey, data.num_transparent, data.levels, channels):
        say(line)


def _advice(num_images, num_grey, num_transparent, levels, channels):
    if not num_images:
        return
    if channels == 3 and num_grey == num_images:
        yield "note: every image is grey; --channels 1 trains faster, without colour casts"
    if channels == 3 and num_transparent >= MANY * num_images:
        yield f"note: {num_transparent} of {num_images} images have transparency, laid on white; --channels 4 keeps it"
    if channels == 4 and not num_transparent:
        yield "note: no image has transparency; --channels 3 trains faster"
    for kind, (black, white) in levels.items():
        yield f"note: {kind} samples of more than 8 bits are scaled: {black:g} is black, {white:g} is white"


def report(folder, config, files):
    """Returns a text about a folder of images, by class, size and mode, and the names of files that may be wrong.

    Args:
        folder, config: as for check_data.
        files: the FileFacts of image_data.decode_folder.
    """
    good = [facts for facts in files if not facts.fault]
    first = {}
    for facts in good:
        first.setdefault(facts.digest, facts.name)
    height, width = height_and_width(config.image_size)
    enlarged = all if config.resize_mode == "pad" else any
    small = [f"{facts.name}: {facts.width} x {facts.height}" for facts in good
             if enlarged((facts.width < width, facts.height < height))]
    same = [f"{facts.name}: as {first[facts.digest]}" for facts in good if facts.name != first[facts.digest]]
    frames, still = (Counter(facts.film for facts in those) for those in (good, [facts for facts in good if facts.still]))
    lines = [
        f"{folder}: {len(files)} images, {len(files) - len(good)} of them cannot be read",
        _counts("class", (class_of(facts) or "no class" for facts in good)),
        _listing("no images of their own: ", [*map(repr, folders_without_images(folder, map(class_of, good)))], ", "),
        _counts("width x height", (f"{facts.width} x {facts.height}" for facts in good)),
        _counts("mode", (facts.mode for facts in good)),
        *(_shapes(good, height, width) if good else ()),
        *_advice(len(good), sum(facts.grey for facts in good), sum(facts.transparent for facts in good),
                 common_levels_of(files), config.channels),
        _listing(f"smaller than {size_text(config.image_size)} px, enlarged: {len(small)}\n  ", small, "\n  "),
        _listing(f"the same picture as another: {len(same)}\n  ", same, "\n  "),
        _listing("frames of films nearly the same as the one before: ",
                 [f"{film}: {count} of {frames[film]}" for film, count in still.items()], ", "),
    ]
    return "\n".join(line for line in lines if line)


def _shapes(good, height, width):
    """Lines about what the ways of resizing do to images of other shapes, and about a shape that suits them better."""
    ratios = [facts.width / facts.height for facts in good]
    cuts = _cuts(ratios, width / height)
    if max(cuts) < 0.01:
        return
    parts = [f"{what} {statistics.mean(values):.0%} of an image on average, at most {max(values):.0%}"
             for what, values in (("crop cuts off", cuts), ("pad adds", [cut / (1 - cut) for cut in cuts]))]
    yield f"resize mode: {'; '.join(parts)}; stretch changes proportions as much"
    shorter = min(height, width)
    longer = [n * shorter // SMALLEST_MAP for n in range(SMALLEST_MAP, LONGEST * SMALLEST_MAP + 1)]
    sizes = [*((shorter, side) for side in longer), *((side, shorter) for side in longer)]
    best = min(sizes, key=lambda size: statistics.mean(_cuts(ratios, size[1] / size[0])))
    cut = statistics.mean(_cuts(ratios, best[1] / best[0]))
    if cut < statistics.mean(cuts) / 2:
        yield f"note: --image-size {size_text(plain_size(best))} would cut off {cut:.0%} on average"


def _cuts(ratios, wanted):
    """The part of each image that crop cuts off, from width / height of the images and of what is wanted."""
    return [1 - min(ratio / wanted, wanted / ratio) for ratio in ratios]


def _counts(title, values):
    """A line with the number of times each value occurs."""
    return _listing(f"{title}: ", [f"{name} ({count})" for name, count in Counter(values).most_common()], ", ")


def _listing(title, entries, separator):
    """The title and the first entries, "" if there are none."""
    return title + listed(entries, separator) if entries else ""
