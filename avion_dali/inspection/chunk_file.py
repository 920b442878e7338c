"""Checks one chunk file.

This module runs in worker processes, so of third-party packages it imports only numpy and PyAV.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame

from avion_dali.contracts import ChunkRef, DecodeError
from avion_dali.data.bitstream import Entry
from avion_dali.data.colors import HDR_TRANSFERS, color_range_name, colorspace_name
from avion_dali.data.delivery import decode_strictly
from avion_dali.data.indexing import STRICT, make_decoder, make_packet, stream_facts
from avion_dali.data.joined import find_recordings
from avion_dali.data.packet_index import IndexBlock, IndexDamagedError, PacketIndex, StreamFacts
from avion_dali.data.probe import ChunkFacts, open_video, probe_chunk, rotation_of
from avion_dali.inspection.findings import FileReport, Finding, Target
from avion_dali.inspection.reader_comparison import first_difference

MAX_GOP_SECONDS = 5.0
# Numbers of color primaries in FFmpeg and in ITU-T H.273, table 2.
_WIDE_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_BT601 = ("smpte170m", "bt470bg")  # two names of the same matrix


class _FaultError(Exception):
    """Carries a finding that ends the check of a file."""

    def __init__(self, kind: str, detail: str, frame_id: int = -1) -> None:
        super().__init__(detail)
        self.finding = Finding(kind, detail, frame_id)


def file_stamp(path: str) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in nanoseconds; (-1, -1) if it does not exist.

    A file with the same stamp is taken as unchanged.

    Args:
        path: the file.
    """
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def inspect_file(target: Target) -> FileReport:
    """Check one file.

    Args:
        target: the file, with its facts in the manifest.
    """
    stamp, frame_size, found = file_stamp(target.path), (0, 0), list[Finding]()
    span: tuple[float, float] | None = None
    try:
        facts = _read_facts(target)
        frame_size = facts.width, facts.height
        span = target.start_s, target.start_s + facts.end_s()
        found += _picture_findings(facts)
        if (count := len(find_recordings(target.path))) > 1:
            found.append(Finding("joined", f"contains {count} recordings, of which the first is read"))
        blocks = _read_blocks(facts.packet_index)
        found += _access_findings(facts, blocks)
        if target.deep:
            _decode_everything(facts, blocks)
            _compare_readers(facts, target.ref)
    except _FaultError as fault:
        found.append(fault.finding)
    except DecodeError as error:
        found.append(_finding_of(error))
    except OSError as error:
        found.append(Finding("missing", f"cannot be read: {error.strerror or error}"))
    except Exception as error:  # a process boundary: any error that a damaged file causes becomes a finding
        found.append(Finding("undecodable", f"{type(error).__name__}: {error}"))
    return FileReport(target.path, stamp, target.deep, frame_size, tuple(found), target.video, span)


def _finding_of(error: DecodeError) -> Finding:
    if error.kind == "missing":
        return Finding("missing", error.cause)
    is_cut = error.cause.startswith(("is truncated", "ends after"))  # messages of `probe_chunk`
    return Finding("truncated" if is_cut else "undecodable", error.cause)


def _read_facts(target: Target) -> ChunkFacts:
    """Read the facts of a file, and verify that it is the file of the manifest."""
    ref = target.ref
    if ref is None:
        return probe_chunk(target.path, index=True)
    size = os.stat(target.path).st_size
    if size != ref.size_bytes:
        raise _other_size(ref, size)
    # Without an index, counting frames requires reading all packets.
    facts = _header_facts(target, ref) if ref.index else probe_chunk(target.path, index=True)
    if (facts.width, facts.height) != (ref.width, ref.height):
        shown, known = f"{facts.width}x{facts.height}", f"{ref.width}x{ref.height}"
        raise _FaultError("changed", f"is {shown}, but the manifest says {known}")
    if facts.num_frames != ref.num_frames:
        detail = f"has {facts.num_frames} frames, but the manifest says {ref.num_frames}"
        raise _FaultError("wrong-count", detail)
    return facts


def _other_size(ref: ChunkRef, size: int) -> _FaultError:
    """Return the error for a file of another size: truncated, or replaced by another file."""
    detail = f"has {size} bytes, but the manifest says {ref.size_bytes}"
    try:
        probe_chunk(ref.path)
    except DecodeError as error:
        return _FaultError("truncated" if size < ref.size_bytes else "undecodable", f"{detail}; {error.cause}")
    return _FaultError("changed", detail)


def _header_facts(target: Target, ref: ChunkRef) -> ChunkFacts:
    """Read the facts from a file's header, its first keyframe and its packet index only."""
    record = _read_record(ref)
    blocks = _read_blocks(record)
    with open_video(target.path) as (_, stream), open(target.path, "rb", buffering=0) as file:
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        header, pix_fmt = stream_facts(stream), stream.codec_context.pix_fmt or ""
        if _settings(_open_index(record).stream) != _settings(header):
            raise _FaultError("changed", "its header does not match its packet index")
        # The stream's own decoder is used because it passes the rotation from the header to the frames.
        decoder = stream.codec_context
        if _starts_clean(blocks):
            decoder.options = STRICT
        _, keyframe = next(_checked_packets(file.fileno(), blocks[:1], frame_of=_frame_ids(blocks[:1])))
        pictures = [*decoder.decode(keyframe), *decoder.decode(None)]
    if not pictures:
        raise _FaultError("undecodable", "its first keyframe cannot be decoded")
    return ChunkFacts(
        path=target.path,
        size_bytes=ref.size_bytes,
        num_frames=blocks[-1].first_frame + len(blocks[-1].table.order),
        fps=target.fps,
        width=header.width,
        height=header.height,
        codec=header.codec,
        pix_fmt=pix_fmt,
        color_range=color_range_name(header.color_range, pix_fmt),
        colorspace=colorspace_name(header.colorspace),
        rotation=rotation_of(pictures[0]),
        is_cfr=target.is_cfr,
        start_s=target.late_s,
        packet_index=record,
        pixel_aspect=aspect,
        is_interlaced=pictures[0].interlaced_frame,
        transfer=int(decoder.color_trc),
        primaries=int(decoder.color_primaries),
    )


def _settings(stream: StreamFacts) -> tuple[str, bytes, int, int]:
    return stream.codec, stream.extradata, stream.width, stream.height


def _read_record(ref: ChunkRef) -> bytes:
    assert ref.index is not None
    with open(ref.index.path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), ref.index.num_bytes, ref.index.offset)


def _open_index(record: bytes) -> PacketIndex:
    try:
        return PacketIndex(lambda start, count: record[start : start + count])
    except IndexDamagedError as error:
        raise _FaultError("index", f"its packet index {error}") from error


def _read_blocks(record: bytes) -> list[IndexBlock]:
    """Read all blocks of a packet index; an empty record has none."""
    if not record:
        return []
    index = _open_index(record)
    last = index.block_of(2**40)  # larger than any frame id
    try:
        return [index.block(number) for number in range(last + 1)]
    except IndexDamagedError as error:
        raise _FaultError("index", f"its packet index {error}") from error


def _picture_findings(facts: ChunkFacts) -> Iterator[Finding]:
    """Find what makes decoded pictures wrong, or decoding slow."""
    tags = f"{facts.color_range} {facts.colorspace} {facts.pix_fmt}"
    if facts.color_range == "full" or facts.colorspace not in (*_BT601, "unspecified"):
        yield Finding("color", f"{tags}: DALI treats every stream as limited-range BT.601")
    elif facts.pix_fmt not in ("yuv420p", "yuvj420p"):
        yield Finding("color", f"{tags}: GPU decoders read hardly any format but 8-bit 4:2:0")
    elif facts.colorspace == "unspecified":
        yield Finding("untagged", f"{tags}: the color matrix is unknown")
    yield from _display_findings(facts)
    if facts.rotation:
        yield Finding("rotation", f"must be rotated by {facts.rotation} degrees counter-clockwise for display")
    if facts.width % 16 or facts.height % 16:
        yield Finding("nvdec-size", f"{facts.width}x{facts.height} are not multiples of 16")
    if not facts.is_cfr:
        yield Finding("variable-rate", f"{float(facts.fps):.2f} frames per second on average")


def _display_findings(facts: ChunkFacts) -> Iterator[Finding]:
    """Find corrections that a player applies to the pictures and a decoder does not."""
    if facts.transfer in HDR_TRANSFERS:
        yield Finding("hdr", f"its transfer characteristics are {HDR_TRANSFERS[facts.transfer]}")
    if facts.primaries in _WIDE_PRIMARIES:
        yield Finding("wide-gamut", f"its color primaries are {_WIDE_PRIMARIES[facts.primaries]}")
    if facts.is_interlaced:
        yield Finding("interlaced", "each of its pictures consists of two fields")
    if facts.pixel_aspect != 1:
        ratio = f"{facts.pixel_aspect.numerator}:{facts.pixel_aspect.denominator}"
        yield Finding("pixel-aspect", f"its pixels are not square ({ratio}), so stored pictures are distorted")
    if facts.start_s:
        yield Finding("late-picture", f"its first picture starts {facts.start_s:.2f} s after time 0")


def _access_findings(facts: ChunkFacts, blocks: list[IndexBlock]) -> Iterator[Finding]:
    """Find what makes random access slow."""
    if not blocks:
        return
    entries = [b.first_frame + np.flatnonzero(b.table.entry[b.table.order] != Entry.NONE) for b in blocks]
    borders = np.unique(np.concatenate([[0], *entries, [facts.num_frames]]))
    longest = int(np.diff(borders).max())
    if longest / facts.fps > MAX_GOP_SECONDS:
        yield Finding("long-gop", f"{float(longest / facts.fps):.1f} s ({longest} frames) without a keyframe")
    num_open = sum(int((b.table.entry == Entry.OPEN).sum()) for b in blocks)
    if num_open:
        yield Finding("open-gop", f"{num_open} keyframes are followed by frames that need earlier ones")


def _decode_everything(facts: ChunkFacts, blocks: list[IndexBlock]) -> None:
    """Decode all frames as strictly as training does, up to the first error."""
    delivered = _decode_indexed(facts, blocks) if blocks else _decode_container(facts)
    absent = sorted(set(range(facts.num_frames)) - delivered)
    if absent:
        count = facts.num_frames - len(absent)
        raise _FaultError("wrong-count", f"only {count} of {facts.num_frames} frames are decoded", absent[0])
    if max(delivered) >= facts.num_frames:
        detail = f"more than its {facts.num_frames} frames are decoded"
        raise _FaultError("wrong-count", detail, facts.num_frames)


def _compare_readers(facts: ChunkFacts, ref: ChunkRef | None) -> None:
    """Compare the decoders on a sample: some damage is concealed by each of them in another way."""
    known = ref or ChunkRef(facts.path, facts.size_bytes, facts.num_frames, facts.width, facts.height)
    differing = first_difference(known)
    if differing is not None:
        raise _FaultError("decoders-differ", "decoders show different pictures", differing)


def _decode_indexed(facts: ChunkFacts, blocks: list[IndexBlock]) -> set[int]:
    """Decode the packets of the index, and return the ids of the decoded frames."""
    frame_of = _frame_ids(blocks)
    decoder = make_decoder(_open_index(facts.packet_index).stream, strict=_starts_clean(blocks))
    delivered: set[int] = set()
    latest = -1
    with open(facts.path, "rb", buffering=0) as file:
        for rank, packet in chain(_checked_packets(file.fileno(), blocks, frame_of=frame_of), [(-1, None)]):
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                raise _undecodable(error, frame_of.get(rank, -1)) from error
            asked = {frame_of[f.pts]: f for f in frames if f.pts in frame_of}
            latest = _in_order(asked, latest)
            delivered |= {_sound(frame_id, frame, facts) for frame_id, frame in asked.items()}
    return delivered


def _in_order(frame_ids: Iterable[int], latest: int) -> int:
    """Return the last frame id, and raise if frame ids, in the order of the decoder, do not ascend.

    A decoder delivers pictures in the order that is coded in the pictures; frame ids follow the container.
    """
    for frame_id in frame_ids:
        if frame_id < latest:
            detail = "its container states another order of pictures than the pictures themselves"
            raise _FaultError("wrong-order", detail, frame_id)
        latest = frame_id
    return latest


def _frame_ids(blocks: list[IndexBlock]) -> dict[int, int]:
    """Return frame ids by rank; pictures that are hidden by an edit list have none."""
    shown = np.concatenate([b.table.pts[b.table.order] for b in blocks])
    return {rank: frame_id for frame_id, rank in enumerate(shown.tolist())}


def _starts_clean(blocks: list[IndexBlock]) -> bool:
    """Return whether the first keyframe is clean; a strict decoder rejects a stream that starts otherwise."""
    return bool(blocks[0].table.entry[0] == Entry.CLEAN)


def _checked_packets(
    file: int, blocks: list[IndexBlock], *, frame_of: dict[int, int]
) -> Iterator[tuple[int, Packet]]:
    """Yield all packets in decode order, each with its rank in presentation order."""
    for block in blocks:
        columns = (block.places.offset, block.places.size, block.places.crc, block.table.pts)
        for offset, size, crc, rank in zip(*(column.tolist() for column in columns), strict=True):
            data = os.pread(file, size, offset)
            if zlib.crc32(data) != crc:
                detail = f"its bytes from {offset} on differ from those when the manifest was built"
                raise _FaultError("checksum", detail, frame_of.get(rank, -1))
            yield rank, make_packet(data, rank)


def _decode_container(facts: ChunkFacts) -> set[int]:
    """Decode a file without a packet index, and return the ids of the decoded frames."""
    count = 0
    with open_video(facts.path) as (container, stream):
        try:
            for frame in decode_strictly(container, stream):
                count = _sound(count, frame, facts) + 1
        except av.FFmpegError as error:
            raise _undecodable(error, count) from error
    return set(range(count))


def _sound(frame_id: int, frame: VideoFrame, facts: ChunkFacts) -> int:
    """Return the frame's id, and raise if it is damaged or its size or format differs from the file's."""
    if frame.is_corrupt:
        raise _FaultError("undecodable", "the decoder marks it as damaged", frame_id)
    expected = (facts.width, facts.height, facts.pix_fmt or frame.format.name)
    if (frame.width, frame.height, frame.format.name) != expected:
        found = f"{frame.width}x{frame.height} {frame.format.name}"
        raise _FaultError("undecodable", f"the picture format changes to {found}", frame_id)
    return frame_id


def _undecodable(error: av.FFmpegError, frame_id: int) -> _FaultError:
    return _FaultError("undecodable", error.strerror or type(error).__name__, frame_id)
