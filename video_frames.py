"""Reads the frames of films: with PyAV, an optional package, and of animated GIF, PNG and WebP with Pillow.

Frames are those that a player shows: upright, with square pixels, without the combs of interlacing. Times are in seconds.
"""
import contextlib
import functools
import math
import pathlib
from fractions import Fraction
from typing import NamedTuple

from PIL import Image

from devices import num_cpus
from image_files import DataError, PassingError, what_it_is
from video_files import pyav_fault

VIDEO_EXTENSIONS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")
ANIMATION_EXTENSIONS = (".gif", ".webp", ".png", ".apng")  # of pictures that may have several frames
ANIMATION_FORMATS = ("GIF", "WEBP", "PNG")
# Without these a file named .mp4 may be a list of other files or addresses, which FFmpeg would open.
OPEN_ONLY = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ones leave transparency out
HDR_TRANSFERS = (16, 18)  # PQ and HLG, as FFmpeg numbers them
ROUNDING = Fraction(1, 1000)  # seconds, to which Matroska rounds times
NO_DELAY = Fraction(1, 10)  # seconds that browsers show a frame of an animation whose duration is given as 0
TURNED = {(1, 0, 0, 1): None, (0, 1, -1, 0): Image.Transpose.ROTATE_270, (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
          (0, -1, 1, 0): Image.Transpose.ROTATE_90, (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
          (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM, (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
          (0, -1, -1, 0): Image.Transpose.TRANSVERSE}  # a, b, c, d of a display matrix to what turns the picture upright
UNKNOWN = "no film of a kind that is read here"
BROKEN = "a broken film, or one that was cut off while it was recorded or copied"


class Frame(NamedTuple):
    """A frame of a film. It is shown from `time`, counted from the first frame on, to `end`."""

    time: Fraction
    end: Fraction
    picture: callable  # picture() returns it as a PIL image, RGB or RGBA


def is_film(path):
    """Whether a file has the name of a film, or is an animated GIF, PNG or WebP."""
    if path.suffix.lower() not in ANIMATION_EXTENSIONS:
        return path.suffix.lower() in VIDEO_EXTENSIONS
    with contextlib.suppress(Exception), Image.open(path, formats=ANIMATION_FORMATS) as image:
        return getattr(image, "n_frames", 1) > 1
    return False


@contextlib.contextmanager
def open_film(path):
    """Opens a film for a with statement: a Video or an Animation. Path and errors as for their frames()."""
    path = pathlib.Path(path)
    with contextlib.ExitStack() as held:
        with _faults_of(path):
            if not path.is_file():
                raise DataError("not a file" if path.exists() else "no such file")
            if path.suffix.lower() in ANIMATION_EXTENSIONS:
                film = Animation(held.enter_context(Image.open(path, formats=ANIMATION_FORMATS)))
            else:
                film = Video(held.enter_context(open_container(path)))
        yield film


def sampled(frames, frames_per_second):
    """Yields the Frames that are shown at the times 0, 1 / frames_per_second, 2 / frames_per_second and so on, each once."""
    number, rate = 0, Fraction(frames_per_second).limit_denominator(1_000_000)
    for frame in frames:
        end = frame.end - min(ROUNDING, (frame.end - frame.time) / 2)
        if end * rate > number:
            yield frame
            number = math.ceil(end * rate)


class _Film:
    """The frames of an open file.

    Attributes:
        duration: seconds, as far as the file says, else 0.
        remarks: what a person should know about the film, in words; complete after the last frame.
        start: when the first frame is shown, in the time of the file; known from that frame on.
        has_sound: whether there is a sound track.
    """

    def __init__(self, duration, *, has_sound=False):
        self.duration, self.remarks, self.start, self.has_sound = duration, [], Fraction(0), has_sound

    def frames(self):
        """Yields each Frame, in order.

        Raises:
            DataError: no frame can be read; the message says why, in a line.
        """
        start = length = picture = None
        for time, next_length, next_picture in self._timed():
            if picture:
                yield Frame(start, time, picture)
            start, length, picture = time, next_length, next_picture
        if picture is None:
            raise DataError(f"no frame of it can be read{''.join(f'; {remark}' for remark in self.remarks)}")
        yield Frame(start, start + length, picture)


class Animation(_Film):
    """The frames of a picture with several, opened by Pillow."""

    def __init__(self, image):
        super().__init__(0)
        self._image = image

    def _timed(self):
        time = Fraction(0)
        for index in range(getattr(self._image, "n_frames", 1)):
            with _faults_of(self._image.filename):
                self._image.seek(index)
                self._image.load()
                picture = self._image.convert("RGBA" if self._image.has_transparency_data else "RGB")
            length = Fraction(self._image.info.get("duration", 0)) / 1000 or NO_DELAY
            yield time, length, lambda picture=picture: picture
            time += length


class Video(_Film):
    """The frames of a container of PyAV. Damaged ones are left out, and those after them that build on them."""

    def __init__(self, container):
        import av

        videos = container.streams.video
        films = [stream for stream in videos if not stream.disposition & av.stream.Disposition.attached_pic]
        if not films:
            raise DataError(f"no film in it, only {'a cover picture' if videos else 'sound or text'}")
        stream = next((stream for stream in films if stream.disposition & av.stream.Disposition.default), films[0])
        if stream.codec_context is None:
            raise DataError("its pictures have a codec that this build of the package av does not have")
        super().__init__(float((container.duration or 0) / av.time_base), has_sound=bool(container.streams.audio))
        self._container, self._stream, self._decoder = container, stream, stream.codec_context
        self._interval = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
        if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in DECODERS_WITH_ALPHA:
            self._decoder = av.CodecContext.create(DECODERS_WITH_ALPHA[stream.codec_context.name], "r")
        # Threads that decode a frame each can hang when a film is left before its end.
        self._decoder.thread_type, self._decoder.thread_count = "SLICE", num_cpus()

    def _timed(self):
        import av

        reformat = av.video.reformatter.VideoReformatter().reformat
        aspect = self._stream.sample_aspect_ratio or 1
        rounded = self._container.format.name.startswith("matroska")
        # Where frames are stored in another order than shown, AVI has their times in the order in which they are stored.
        time, counting = None, self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
        for number, frame in enumerate(_deinterlaced(self._whole_frames(), self._stream.time_base)):
            time_base = frame.time_base or self._stream.time_base  # of filtered frames it is another
            said = None if frame.pts is None else frame.pts * time_base
            if number == 0:
                self.start, time = Fraction(0) if counting else said or Fraction(0), Fraction(0)
                if frame.color_trc in HDR_TRANSFERS:
                    self.remarks.append("HDR, read as if it were not, so its colours are pale")
            elif counting or said is None or said - self.start < time:  # what goes back cannot be trusted later either
                counting, time = True, max(time, number * self._interval)
            else:
                time, even = said - self.start, number * self._interval
                if rounded and abs(time - even) <= ROUNDING:  # a steady rate
                    time = even
            length = frame.duration * time_base if frame.duration else self._interval
            yield time, length, functools.partial(_picture, frame, reformat, aspect)
        whole = float((self._stream.duration or 0) * self._stream.time_base)
        if time is not None and time + 2 * self._interval < 0.9 * whole:
            self.remarks.append(f"it ends after {float(time):.1f} of {whole:.1f} seconds")

    def _whole_frames(self):
        import av

        packets, packet, num_lost, broken, waiting = self._container.demux(self._stream), None, 0, False, []
        while True:
            try:
                with _errors_of_ffmpeg() as errors:  # Matroska goes on behind what is damaged, and only logs that
                    packet = next(packets, None)
                frames = [] if packet is None else self._decoder.decode(packet)
            except av.error.FFmpegError as error:
                if isinstance(error, OSError | MemoryError):
                    raise _fault(error, self._container.name) from None
                errors, frames = [error], []
            if errors:  # the damage may have begun in the frame before, which some codecs do not notice
                num_lost, broken, waiting = num_lost + 1 + len(waiting), True, []
            if packet is None:
                break
            for frame in frames:
                broken = frame.is_corrupt or broken and not frame.key_frame
                if broken:
                    num_lost += 1
                else:
                    yield from waiting
                    waiting = [frame]
        yield from waiting
        if num_lost:
            self.remarks.append(f"{num_lost} damaged frames are left out")


def _deinterlaced(frames, time_base):
    """Yields frames; from the first interlaced one on they are filtered, which leaves those that are not as they are."""
    graph = shape = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if shape != (frame.width, frame.height, frame.format.name):
            if graph:
                yield from _filtered(graph, None)
            graph, shape = _deinterlacing_graph(frame, time_base), (frame.width, frame.height, frame.format.name)
        yield from _filtered(graph, frame)
    if graph:
        yield from _filtered(graph, None)


def _deinterlacing_graph(frame, time_base):
    import av

    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base),
                     graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
    return graph


def _filtered(graph, frame):
    graph.vpush(frame)
    with contextlib.suppress(BlockingIOError, EOFError):  # PyAV's errors of these names, when there is no more
        while True:
            yield graph.vpull()


def _picture(frame, reformat, aspect):
    """Returns a frame as a PIL image, upright and with square pixels.

    Args:
        frame: of PyAV.
        reformat: of a VideoReformatter, which is faster if it is the same for all frames.
        aspect: width / height of a pixel.
    """
    transparent = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(reformat(frame, format="rgba" if transparent else "rgb24").to_ndarray())
    if aspect > 1:
        image = image.resize((round(image.width * aspect), image.height), Image.Resampling.LANCZOS)
    elif aspect < 1:
        image = image.resize((image.width, round(image.height / aspect)), Image.Resampling.LANCZOS)
    if matrix := frame.side_data.get("DISPLAYMATRIX"):
        a, b, _, c, d = memoryview(bytes(matrix)).cast("i")[:5]
        turn = TURNED.get((_sign(a), 0, 0, _sign(d)) if abs(a) > abs(b) else (0, _sign(b), _sign(c), 0))
        image = image if turn is None else image.transpose(turn)
    return image


def _sign(number):
    return (number > 0) - (number < 0)


def open_container(path):
    """Returns the container of a film, opened by PyAV. Raises DataError, which says why it cannot be."""
    import av

    if fault := pyav_fault():
        raise DataError(fault)
    with _errors_of_ffmpeg() as lines:
        try:
            return av.open(str(path), options=OPEN_ONLY, metadata_errors="replace")
        except av.error.FFmpegError as error:
            fault, last = _fault(error, path), lines[-1][2].strip() if lines else ""
            raise type(fault)(f"{fault} ({last})" if last and str(fault) in (BROKEN, UNKNOWN) else str(fault)) from None


@contextlib.contextmanager
def _errors_of_ffmpeg():
    """Gives a list to which what FFmpeg reports as errors meanwhile is added."""
    import av

    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False) as lines:
            yield lines
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip_repeated)


@contextlib.contextmanager
def _faults_of(path):
    try:
        yield
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        raise _fault(error, path) from None


def _fault(error, path):
    """Returns the DataError of a film that an error has come from."""
    if isinstance(error, DataError):
        return error
    if isinstance(error, OSError | MemoryError) and (getattr(error, "errno", None) or isinstance(error, MemoryError)):
        return PassingError(getattr(error, "strerror", None) or "not enough memory")
    with contextlib.suppress(OSError):
        if not pathlib.Path(path).stat().st_size:
            return DataError("empty")
    with contextlib.suppress(Exception), Image.open(path) as image:
        return DataError(f"a picture ({image.format}) with the name of a film")
    what = what_it_is(path)
    return DataError(BROKEN if what and what.startswith("a video") else what or UNKNOWN)
