"""Takes the sound of a film over into an MP4: with PyAV, an optional package. Times are in seconds."""
import contextlib
import itertools
from fractions import Fraction

from image_files import DataError
from video_frames import open_container

COPIED = ("aac", "mp3")  # codecs that every player of MP4 knows; others are encoded again
AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)  # per second
PRIMING = Fraction(1, 10)  # seconds, at most, that a codec needs before the first sound; MP4 would begin with them


@contextlib.contextmanager
def sound_of(path, start, container, *, report):
    """Adds the sound of a film to a container that is being written, for a with statement.

    Gives the time at which the first frame has to be shown for the sound to fit, and an iterator over (time, packet), to be
    muxed in order. AAC and MP3 are copied, other codecs are encoded as AAC; of several tracks the default one is taken.

    Args:
        path: of the film.
        start: of its first frame, in the time of the file.
        container: of PyAV. Nothing has been muxed into it yet.
        report: called with a line where the sound is encoded again, or where it or a part of it is left out.
    """
    import av

    with contextlib.ExitStack() as held:
        delay, packets = Fraction(0), iter(())
        try:
            source = held.enter_context(open_container(path))
            tracks = source.streams.audio
            if tracks:
                track = next((track for track in tracks if track.disposition & av.stream.Disposition.default), tracks[0])
                early = start - (track.start_time or 0) * track.time_base
                delay = early if early > PRIMING else delay
                # Times of MP3 in AVI stand still from packet to packet; encoding counts samples.
                copied = track.codec.canonical_name in COPIED and source.format.name != "avi"
                packets = (_copied if copied else _encoded)(source, track, container, delay - start, report)
                packets = ((time, packet) for time, packet in packets if time >= 0)
                packets = itertools.chain([next(packets)], packets)  # shows whether it can be had at all
        except (DataError, av.error.FFmpegError, AttributeError, StopIteration, ValueError) as error:
            report(f"note: the film is silent, because its sound cannot be read ({str(error) or 'nothing of it is there'})")
            packets = iter(())
        yield delay, packets


def _copied(source, track, container, shift, report):
    stream, offset, last = container.add_stream_from_template(track), round(shift / track.time_base), None
    for packet in _until_broken(source.demux(track), report):
        if packet.dts is None:  # the last one, which is empty
            continue
        dts = packet.dts + offset
        last = dts if last is None else max(dts, last + 1)
        packet.dts, packet.pts = last, last if packet.pts is None else max(last, packet.pts + offset)
        packet.stream = stream
        yield last * track.time_base, packet


def _encoded(source, track, container, shift, report):
    import av

    frames = _until_broken(source.decode(track), report)
    first = next(frames)  # before there is a stream, which would be empty where nothing can be decoded
    rate, layout = track.rate if track.rate in AAC_RATES else 48_000, "mono" if track.channels == 1 else "stereo"
    stream = container.add_stream("aac", rate=rate, layout=layout)
    report(f"note: the sound is encoded as AAC, because players of MP4 do not know {track.codec.canonical_name}")
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    samples = round(((first.time or 0) + shift) * rate)
    for frame in itertools.chain([first], frames, [None]):
        for part in resampler.resample(frame):
            part.pts, part.time_base = samples, Fraction(1, rate)
            samples += part.samples
            yield from _with_times(stream.encode(part))
    yield from _with_times(stream.encode())


def _with_times(packets):
    return ((packet.pts * packet.time_base, packet) for packet in packets)


def _until_broken(parts, report):
    """Yields packets or frames; where one cannot be read, says so and ends."""
    import av

    try:
        yield from parts
    except av.error.FFmpegError as error:
        report(f"note: the film is silent from here on, because the rest of its sound cannot be read ({error})")
