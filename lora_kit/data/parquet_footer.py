"""What a Parquet file says of its sizes, in its footer and at the head of each page.

Arrow shows those of the footer, but ends the process where a damaged file gives a column a histogram of a wrong length,
and allocates for as many values as a page claims to have. The footer is a struct of Thrift's compact protocol:
`FileMetaData`, its length in four bytes, and `PAR1`.
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple, TypeAlias

_END_BYTES: Final = 8
"""The length of the footer, and the mark at the end of the file."""
_MAX_FOOTER: Final = 16 * 2**20
"""Bytes of a footer that is read: about 100,000 columns, counted once in each row group."""
_MAX_DEPTH: Final = 16
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
_I32, _I64 = 5, 6
_WHOLE_NUMBERS: Final = (4, _I32, _I64)
_IN_LISTS: Final = (_I32, _I64, _BINARY, _STRUCT)
"""What lists of Parquet hold. Arrow reads what a list should hold, whatever its kind is."""
_FIXED_SIZES: Final = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}

Field: TypeAlias = tuple[int, int]
"""The number of a field in its struct, and its kind: one of another kind is another field, as Arrow has it."""
_ROW_GROUPS: Final[Field] = (4, _LIST)
"""Of `FileMetaData`."""
_COLUMNS: Final[Field] = (1, _LIST)
_NUM_ROWS: Final[Field] = (3, _I64)
"""Of `RowGroup`."""
_META_DATA: Final[Field] = (3, _STRUCT)
"""Of `ColumnChunk`."""
_NUM_VALUES: Final[Field] = (5, _I64)
_TOTAL_SIZE: Final[Field] = (6, _I64)
_PACKED_SIZE: Final[Field] = (7, _I64)
_DATA_OFFSET: Final[Field] = (9, _I64)
_DICTIONARY_OFFSET: Final[Field] = (11, _I64)
"""Of `ColumnMetaData`."""
_PAGE_SIZE: Final[Field] = (2, _I32)
_PACKED_PAGE_SIZE: Final[Field] = (3, _I32)
_KINDS_OF_PAGES: Final[tuple[Field, ...]] = ((5, _STRUCT), (7, _STRUCT), (8, _STRUCT))
"""Of `PageHeader`, the last three of which one is there."""
_PAGE_VALUES: Final[Field] = (1, _I32)
"""Of any of them."""
_MAX_PAGE_HEADER: Final = 2**16
"""Bytes of the head of a page, which may have the smallest and the largest value in it."""

Value: TypeAlias = "int | list[Value] | dict[Field, Value] | None"
"""A whole number, a list or a struct; None for anything else."""


class StatedSizes(NamedTuple):
    """What a file says of its size.

    Attributes:
        columns: in all row groups.
        rows: of all row groups.
        values: of all columns in all row groups; the larger of what columns and what their pages say.
        nbytes: of the pages of all columns, uncompressed; the larger of the two.
    """

    columns: int
    rows: int
    values: int
    nbytes: int


def read_stated_sizes(stream: BinaryIO) -> StatedSizes:
    """Return what a file says of its size, row group by row group: Arrow allocates by these numbers.

    Raises:
        ValueError: the footer is damaged, or larger than is read.
    """
    end = stream.seek(0, 2)
    stream.seek(max(0, end - _END_BYTES))
    length = int.from_bytes(stream.read(4), "little")
    if length > min(end - _END_BYTES, _MAX_FOOTER):
        raise ValueError(f"its footer has {length:,} bytes; at most {min(end - _END_BYTES, _MAX_FOOTER):,} are read")
    stream.seek(end - _END_BYTES - length)
    groups = _list_field(_CompactReader(stream.read(length)).read_struct(), _ROW_GROUPS)
    facts = [_get_field(column, _META_DATA) for group in groups for column in _list_field(group, _COLUMNS)]
    pages = [page for column in facts for page in _iterate_pages(stream, column)]
    return StatedSizes(
        columns=len(facts),
        rows=sum(_count_field(group, _NUM_ROWS) for group in groups),
        values=max(sum(_count_field(column, _NUM_VALUES) for column in facts), sum(map(_count_values, pages))),
        nbytes=max(
            sum(_count_field(column, _TOTAL_SIZE) for column in facts),
            sum(_count_field(page, _PAGE_SIZE) for page in pages),
        ),
    )


def _iterate_pages(stream: BinaryIO, column: Value) -> Iterator[Value]:
    """Yield the head of each page of a column in a row group."""
    start, dictionary = _count_field(column, _DATA_OFFSET), _get_field(column, _DICTIONARY_OFFSET)
    if isinstance(dictionary, int) and 0 < dictionary < start:
        start = dictionary
    end = start + _count_field(column, _PACKED_SIZE)
    if end > stream.seek(0, 2):
        raise ValueError("a column ends after the file")
    while start < end:
        stream.seek(start)
        reader = _CompactReader(stream.read(_MAX_PAGE_HEADER))
        head = reader.read_struct()
        start += reader.position + _count_field(head, _PACKED_PAGE_SIZE)
        yield head


def _count_values(page: Value) -> int:
    kinds = [_get_field(page, field) for field in _KINDS_OF_PAGES]
    return sum(_count_field(kind, _PAGE_VALUES) for kind in kinds if kind is not None)


def _list_field(struct: Value, field: Field) -> list[Value]:
    value = _get_field(struct, field)
    return value if isinstance(value, list) else []


def _get_field(struct: Value, field: Field) -> Value:
    return struct.get(field) if isinstance(struct, dict) else None


def _count_field(struct: Value, field: Field) -> int:
    value = _get_field(struct, field)
    if not isinstance(value, int) or value < 0:
        raise ValueError("it does not say how large a column, a row group or a page is")
    return value


class _CompactReader:
    """Reads values of Thrift's compact protocol; every length is checked before anything is made of it.

    Attributes:
        position: in the data, of the next byte to read.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 0

    def read_struct(self, depth: int = 0) -> dict[Field, Value]:
        """Return the fields of a struct."""
        fields: dict[Field, Value] = {}
        number = 0
        while (head := self._read_byte()) & 15:
            number = number + (head >> 4) if head >> 4 else self._read_signed()  # a short form of the number
            kind = head & 15
            # The value of a boolean field is its kind.
            fields[number, kind] = None if kind in (_TRUE, _FALSE) else self._read(kind, depth)
        return fields

    def _read(self, kind: int, depth: int) -> Value:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if kind in _WHOLE_NUMBERS:
            return self._read_signed()
        if kind == _STRUCT:
            return self.read_struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._read_list(depth)
        if kind == _MAP:
            self._skip_map(depth)
            return None
        size = self._read_varint() if kind == _BINARY else _FIXED_SIZES.get(kind)
        if size is None:
            raise ValueError(f"it has a value of the unknown kind {kind}")
        self._skip(size)
        return None

    def _read_list(self, depth: int) -> list[Value]:
        head = self._read_byte()
        count, kind = head >> 4, head & 15
        count = self._read_varint() if count == 15 else count
        if count and kind not in _IN_LISTS:
            raise ValueError(f"it has a list of the kind {kind}, which Parquet does not have")
        self._check_count(count)
        return [self._read_item(kind, depth) for _ in range(count)]

    def _read_item(self, kind: int, depth: int) -> Value:
        """Read a value of a list or a map, where a boolean is a byte."""
        return self._read(_BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)

    def _check_count(self, count: int) -> None:
        if count > len(self._data) - self.position:  # each takes a byte, at least
            raise ValueError("a part of it ends too early")

    def _skip_map(self, depth: int) -> None:
        count = self._read_varint()
        kinds = self._read_byte() if count else 0
        self._check_count(count)
        for _ in range(count):
            self._read_item(kinds >> 4, depth)
            self._read_item(kinds & 15, depth)

    def _read_byte(self) -> int:
        self._skip(1)
        return self._data[self.position - 1]

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self._data):
            raise ValueError("a part of it ends too early")

    def _read_varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("it has a number of more than 64 bits")

    def _read_signed(self) -> int:
        value = self._read_varint()
        return value >> 1 ^ -(value & 1)
