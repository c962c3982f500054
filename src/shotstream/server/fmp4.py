"""Fragmented MP4, written box by box: what Media Source Extensions play while it grows, and a file when it is done.

    init_segment(track)                    ftyp + moov, once
    fragment(track, 0, samples)            moof + mdat, as often as there is something new
    movie(track, groups)                   a whole file: the same samples, an index that makes it seekable, from 0

A muxing library writes a fragment when it likes; a live picture cannot wait for that. ISO/IEC 14496-12 (boxes),
14496-15 (avc1), and the AV1 and VP9 bindings say what the bytes mean.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

TICKS = 1000  # per frame, whatever the frame rate


@dataclass(frozen=True)
class Sample:
    """One encoded frame."""

    data: bytes
    key: bool


@dataclass(frozen=True)
class Track:
    """What a decoder must know before the first sample. `codecs`: as in a MIME type; `entry`: of the sample table."""

    codecs: str
    entry: bytes
    config: bytes
    width: int
    height: int
    fps: int

    @property
    def mime(self) -> str:
        return f'video/mp4; codecs="{self.codecs}"'


def init_segment(track: Track) -> bytes:
    """ftyp and moov of a movie that has no samples yet."""
    return _box(b"ftyp", b"iso6", _u32(0), b"iso6mp41dash") + _moov(track)


def fragment(track: Track, first: int, samples: Sequence[Sample]) -> bytes:
    """moof and mdat of consecutive samples; `first`: the number of the first one on the timeline of the movie."""
    sizes_and_flags = b"".join(_u32(len(s.data), 0x02000000 if s.key else 0x01010000) for s in samples)
    head = _moof(first, samples, sizes_and_flags, 0)
    return _moof(first, samples, sizes_and_flags, len(head) + 8) + _box(b"mdat", *(s.data for s in samples))


def movie(track: Track, groups: Sequence[Sequence[Sample]]) -> bytes:
    """A whole file of fragments, one per group; its index (sidx) tells players the length and where to seek."""
    fragments, first = list[bytes](), 0
    for group in groups:
        fragments.append(fragment(track, first, group))
        first += len(group)
    references = b"".join(
        _u32(len(data), TICKS * len(group), 0x90000000 if group[0].key else 0)
        for data, group in zip(fragments, groups, strict=True)
    )
    index = _full(b"sidx", 0, 0, _u32(1, track.fps * TICKS, 0, 0), struct.pack(">HH", 0, len(fragments)), references)
    return b"".join((init_segment(track), index, *fragments))


# Codecs: the track of an open encoder, and its packets as samples


def h264_track(extradata: bytes, width: int, height: int, fps: int) -> Track:
    """`extradata`: the parameter sets, Annex B, as x264 gives them with a global header."""
    units = nal_units(extradata)
    sps, pps = (next(u for u in units if u[0] & 31 == kind) for kind in (7, 8))
    config = bytes((1, sps[1], sps[2], sps[3], 0xFF, 0xE1)) + struct.pack(">H", len(sps)) + sps
    config += b"\x01" + struct.pack(">H", len(pps)) + pps
    if sps[1] in (100, 110, 122, 144):  # High and above say more: 4:2:0, 8 bits, no extension
        config += bytes((0xFD, 0xF8, 0xF8, 0))
    return Track(f"avc1.{sps[1:4].hex().upper()}", b"avc1", _box(b"avcC", config), width, height, fps)


def h264_sample(packet: bytes) -> bytes:
    """Annex B to length-prefixed slices; parameter sets and remarks of the encoder are left out."""
    return b"".join(_u32(len(u)) + u for u in nal_units(packet) if u[0] & 31 in (1, 5))


def nal_units(annex_b: bytes) -> list[bytes]:
    """The units between start codes, which emulation prevention keeps out of the units themselves."""
    return [unit for unit in re.split(rb"\x00\x00\x00?\x01", annex_b) if unit]


def vp9_track(width: int, height: int, fps: int) -> Track:
    """Profile 0: 8 bits, 4:2:0; the lowest level whose pictures are large enough."""
    levels = ((36864, 10), (73728, 11), (122880, 20), (245760, 21), (552960, 30), (983040, 31), (2228224, 41))
    level = next((level for pixels, level in levels if width * height <= pixels), 52)
    config = _full(b"vpcC", 1, 0, bytes((0, level, 8 << 4 | 1 << 1, 1, 1, 1)), struct.pack(">H", 0))
    return Track(f"vp09.00.{level}.08", b"vp09", config, width, height, fps)


def av1_track(extradata: bytes, width: int, height: int, fps: int) -> Track:
    """`extradata`: the sequence header OBU."""
    header = extradata[2:]  # after type and (one byte of) size
    assert extradata[0] == 0x0A and not header[0], "a sequence header with timing, or of another profile"
    level = header[3] >> 3  # after 12 bits of flags and 12 of operating point
    config = _box(b"av1C", bytes((0x81, level, 0x0C, 0)), extradata)
    return Track(f"av01.0.{level:02d}M.08", b"av01", config, width, height, fps)


def av1_sample(packet: bytes) -> bytes:
    """A temporal unit without its delimiter, which a file does not hold."""
    return packet.removeprefix(b"\x12\x00")


# Boxes


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return _u32(8 + len(body)) + kind + body


def _full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(kind, _u32(version << 24 | flags), *parts)


def _u32(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


_MATRIX = _u32(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_BT709 = b"nclx" + struct.pack(">HHHB", 1, 1, 1, 0)  # primaries, transfer, matrix; levels 16 to 235


def _moov(track: Track) -> bytes:
    scale = track.fps * TICKS
    size = struct.pack(">HH", track.width, track.height)
    visual = bytes(6) + struct.pack(">H", 1) + bytes(16) + size + _u32(0x480000, 0x480000, 0) + b"\0\1" + bytes(32)
    entry = _box(track.entry, visual, b"\0\x18\xff\xff", track.config, _box(b"colr", _BT709))
    tables = [_full(kind, 0, 0, _u32(0)) for kind in (b"stts", b"stsc", b"stco")]
    sizes = _full(b"stsz", 0, 0, _u32(0, 0))
    table = _box(b"stbl", _full(b"stsd", 0, 0, _u32(1), entry), *tables, sizes)
    here = _box(b"dinf", _full(b"dref", 0, 0, _u32(1), _full(b"url ", 0, 1)))
    media = _box(
        b"mdia",
        _full(b"mdhd", 0, 0, _u32(0, 0, scale, 0), b"\x55\xc4\0\0"),  # language: undetermined
        _full(b"hdlr", 0, 0, _u32(0), b"vide", bytes(12), b"shotstream\0"),
        _box(b"minf", _full(b"vmhd", 0, 1, bytes(8)), here, table),
    )
    display = _u32(track.width << 16, track.height << 16)
    head = _full(b"tkhd", 0, 3, _u32(0, 0, 1, 0, 0), bytes(16), _MATRIX, display)
    whole = _full(b"mvhd", 0, 0, _u32(0, 0, scale, 0, 0x10000, 0x1000000), bytes(8), _MATRIX, bytes(24), _u32(2))
    defaults = _box(b"mvex", _full(b"trex", 0, 0, _u32(1, 1, TICKS, 0, 0)))
    return _box(b"moov", whole, _box(b"trak", head, media), defaults)


def _moof(first: int, samples: Sequence[Sample], sizes_and_flags: bytes, data_offset: int) -> bytes:
    return _box(
        b"moof",
        _full(b"mfhd", 0, 0, _u32((first + 1) & 0xFFFFFFFF)),
        _box(
            b"traf",
            _full(b"tfhd", 0, 0x020000, _u32(1)),  # offsets count from this moof
            _full(b"tfdt", 1, 0, struct.pack(">Q", first * TICKS)),
            _full(b"trun", 0, 0x601, _u32(len(samples), data_offset), sizes_and_flags),
        ),
    )
