"""Writes clips and films frame by frame: WebP and GIF by Pillow, MP4 by PyAV, an optional package.

Notation as in model_definitions.py. A picture is (C, H, W), float in [0, 1].
"""
import contextlib
import importlib.metadata
import itertools
import math
import pathlib
from fractions import Fraction

from pictures import PictureError, as_rgb, to_pil
from safe_files import atomic_write, check_writable, free_bytes

CLIP_FORMATS = {"webp": (1, 16_383), "gif": (1, 65_535), "mp4": (2, 16_384)}  # with the sides in pixels they can have
FASTEST_GIF = 50  # frames per second: players show shorter delays than 0.02 s as 0.1 s
LARGEST_IN_MEMORY = 2**30  # bytes of frames that WebP and GIF may take, because Pillow keeps all of them until the end
OLDEST_PYAV = 17  # older ones read the colours of films wrongly
BT709 = 1  # as a number of the colour primaries, the transfer and the matrix of a film
LIMITED_RANGE = 1
LOOKAHEAD = 10  # frames that the encoder holds back
FINEST_TICK = 1_000_000  # of the times in an MP4, per second


def pyav_fault():
    """Returns why no MP4 can be written here and what would help, or None."""
    try:
        version = importlib.metadata.version("av")
        import av

        av.Codec("libx264", "w")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return "needs the package av: pip install av"
    except ValueError:  # UnknownCodecError
        return "this build of the package av cannot write H.264 (libx264); pip install --force-reinstall av has one that can"
    if int(version.split(".")[0]) < OLDEST_PYAV:
        return f"needs the package av {OLDEST_PYAV} or newer, found {version}: pip install --upgrade av"
    return None


def save_clip(frames, path, *, frames_per_second=None, num_frames=None, ends=None, sound=None):
    """Writes pictures as a clip in the format of the path's ending, one of CLIP_FORMATS. Returns how many there were.

    WebP and GIF repeat for ever; they are written at the end, from memory. An MP4 is written as its frames come, so that
    memory does not grow with its length: until it is finished it is called NAME.part.mp4 and can be played up to about the
    last second, even after the process was killed. It is H.264 in the colours of BT.709 (yuv420p), which every player knows;
    its sides are even, so an odd one loses a row or column.

    Args:
        frames: an iterable of (C, H, W) in [0, 1]; it may end early. WebP keeps transparency, the others lay it on white.
        path: an existing file is replaced at the end. Where there is no frame, nothing is written.
        frames_per_second: a whole number.
        num_frames: how many are to come; not needed where frames has a length.
        ends: of each frame, in seconds (Fraction), in place of frames_per_second and num_frames; the first begins at 0.
        sound: for MP4, a context manager as film_sound.sound_of.

    Raises:
        PictureError: frames of that size, or so many, do not go into that format.
        OSError: no room on the disk, for example; what is finished of an MP4 stays in NAME.part.mp4.
    """
    if ends is None:
        ends = even_ends(num_frames or len(frames), frames_per_second)
    path, frames = pathlib.Path(path), iter(frames)
    first = next(frames, None)
    if first is None:
        return 0
    check_clip(path, first.shape, ends)
    ending, (height, width) = path.suffix[1:], first.shape[-2:]
    images = (to_pil(picture if ending == "webp" else as_rgb(picture)) for picture in itertools.chain([first], frames))
    if ending == "mp4":
        return _save_mp4(images, path, ends, (width - width % 2, height - height % 2), sound)
    return _save_in_one(images, path, ends)


def even_ends(num_frames, frames_per_second):
    """Returns when each frame ends, in seconds (Fraction), where all last equally long."""
    return [Fraction(index + 1, frames_per_second) for index in range(num_frames)]


def check_clip(path, shape, ends):
    """Finds out before there are frames whether save_clip can write them.

    Args:
        path, ends: as for save_clip.
        shape: of the frames, (C, H, W).

    Raises:
        PictureError, OSError: as save_clip.
    """
    path = pathlib.Path(path)
    channels, height, width = shape
    ending = path.suffix[1:]
    least, most = CLIP_FORMATS[ending]
    if min(height, width) < least or max(height, width) > most:
        raise PictureError(f"{path}: frames of {width} x {height} pixels cannot be written, only sides of {least} to "
                           f"{most}; change --size or --num-images")
    if ending == "gif" and (rate := len(ends) / ends[-1]) > FASTEST_GIF:
        raise PictureError(f"{path}: {float(rate):.4g} frames per second, and players show more than {FASTEST_GIF} of a GIF "
                           "wrongly; --format mp4 can have them")
    channels = channels if ending == "webp" else 3
    if ending != "mp4" and (num_bytes := len(ends) * channels * height * width) > LARGEST_IN_MEMORY:
        raise PictureError(f"{path}: {len(ends)} frames of {width} x {height} pixels are {num_bytes / 2**30:.1f} GiB, and "
                           f"{ending} needs all of them in memory; --format mp4 does not")
    check_writable(path.parent)


def _save_in_one(images, path, ends):
    # Frame i ends where it should, rounded, so that durations do not add up to another speed.
    tick = 10 if path.suffix == ".gif" else 1  # milliseconds: the unit of a duration in that format
    ends = [tick * round(1000 * end / tick) for end in (0, *ends)]
    durations = [end - start for start, end in itertools.pairwise(ends)]
    first, *others = images
    quality = {"quality": 90} if path.suffix == ".webp" else {}
    with atomic_write(path) as file:
        first.save(file, format=path.suffix[1:].upper(), save_all=True, append_images=others, loop=0,
                   duration=durations[:1 + len(others)], **quality)
    return 1 + len(others)


def _save_mp4(images, path, ends, size, sound):
    """Writes a film that can be played while it grows, and turns it into an ordinary one, with its index first."""
    import av

    unfinished = path.with_name(f"{path.stem}.part.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(unfinished), "w", format="mp4",
                     options={"movflags": "hybrid_fragmented", "flush_packets": "1"}) as container:
            number = _encode(images, container, ends, size, sound)
        with atomic_write(path) as file, av.open(str(unfinished)) as source, av.open(
                file.name, "w", format="mp4", options={"movflags": "faststart"}) as container:
            streams = [container.add_stream_from_template(stream) for stream in source.streams]
            for packet in source.demux():
                if packet.dts is not None:  # the last one of a stream has none, and no data
                    packet.stream = streams[packet.stream_index]
                    container.mux(packet)
    except OSError as error:
        raise OSError(f"{path} could not be finished: {free_bytes(path):,} bytes are free there ({error}); what was written "
                      f"can be played: {unfinished}") from error
    unfinished.unlink()
    return number


def _encode(images, container, ends, size, sound):
    import av

    tick = math.lcm(*(end.denominator for end in ends))
    tick = tick if tick <= FINEST_TICK else 90_000
    rate = len(ends) / ends[-1]
    # Only whole groups of frames are written, so there is a key frame each second; without B frames the first is at time 0.
    stream = container.add_stream("libx264", rate=rate, options={
        "crf": "16", "bf": "0", "g": str(max(1, round(rate))), "rc-lookahead": str(LOOKAHEAD)})
    (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
    codec = stream.codec_context
    codec.time_base = Fraction(1, tick)
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = LIMITED_RANGE
    with sound(container) if sound else contextlib.nullcontext((0, iter(()))) as (delay, sounds):
        starts = [round(tick * delay)]
        for end in ends:  # two frames at the same time could not be written
            starts.append(max(starts[-1] + 1, round(tick * (delay + end))))
        heard = next(sounds, None)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_image(image.crop((0, 0, *size))).reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.duration = starts[number], starts[number + 1] - starts[number]
            container.mux(stream.encode(frame))
            while heard and heard[0] <= (starts[number + 1] / tick if number + 1 < len(ends) else math.inf):
                container.mux(heard[1])
                heard = next(sounds, None)
        container.mux(stream.encode())
    return number + 1
