"""From a valid input to one that an attacker might write: byte by byte, or along the structure of its format; knows
formats, not the parsers that read them.

Every mutator takes a source of chance and bytes, and returns bytes: the same seed gives the same input.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

MAX_SIZE = 1 << 16
"""Bytes of an input: enough for deep nesting and long lines, small enough to be quick."""

_INTEGERS = (0, 1, -1, 127, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
_NUMBERS = (
    *map(str, _INTEGERS),
    "1" * 5000,
    "-" + "9" * 400,
    "1e999",
    "-1e999",
    "1e-400",
    "0.1",
    "-0.0",
    "1E+308",
    "NaN",
    "Infinity",
    "-Infinity",
    "00",
    "+1",
    "0x" + "f" * 6000,
    "1_0",
    "1e" + "9" * 30,
)
_STRINGS = (
    '""',
    '" "',
    '"\\u0000"',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u001b[2J\\u009b0m"',
    '"\\u202etxt.exe"',
    '"\\ufeff"',
    '"../../../../etc/passwd"',
    '"/etc/passwd"',
    '"..\\\\..\\\\x"',
    '"C:\\\\x"',
    '"."',
    '".."',
    '"a/../b"',
    '"CON"',
    '"<script>alert(1)</script>"',
    '"=cmd|x"',
    '"%s%n{0}"',
    '"' + "A" * 5000 + '"',
    '"' + "\\u0301\\u0316" * 2000 + '"',
    '"e\\u0301"',
    '"__class__"',
    '"__proto__"',
    '"model.safetensors"',
    '"nan"',
)
_NESTED = tuple(o * n + c * n for n in (3, 100, 1100, 30000) for o, c in (("[", "]"), ('{"a":', "}")))
_OTHER = (
    "true",
    "false",
    "null",
    "[]",
    "{}",
    "[[]]",
    "[0,0]",
    "[1,0]",
    '[{"a":1}]',
    '{"":null}',
    "[" * 30000,
    "undefined",
)
JSON_TOKENS = (*_NUMBERS, *_STRINGS, *_NESTED, *_OTHER)

TOML_TOKENS = (
    *(n for n in _NUMBERS if n not in ("NaN", "Infinity", "-Infinity")),
    "nan",
    "-inf",
    "inf",
    "true",
    '"',
    '"""',
    "'''",
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "#",
    "\n",
    "\r",
    "\t",
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "[]",
    "{}",
    '""',
    '"\\u0000"',
    '"\\ud800"',
    '"\\U00110000"',
    "a" * 3000,
    ".".join(["a"] * 2000) + " = 1",
    "[" + ".".join(["a"] * 2000) + "]",
    "[" * 3000,
    "{a=" * 3000,
    "[[class]]\n",
    "x = " + "[" * 2000 + "]" * 2000,
    "[class.pii]\n",
    "[class.'a b']\n",
    "schema = 1\n",
    "secret = true\n",
    'files = ["../../etc/passwd"]\n',
    "layers = [0, 0]\n",
    'mode = "ensemble"\n',
    'also = ["exposure"]\n',
    "max_verbatim_tokens = 16\n",
    "max_near_verbatim = 0.6\n",
    "max_kl = ",
    "name = ",
    "[fix]\n",
    "[probe]\n",
    "[locality]\n",
)
_BYTES = (
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\x1b[31m",
    b"\r",
    b"\r\n",
    b"\n",
    b"\n\n",
    b"\x85",
    b"\xe2\x80\xa8",
    b'"',
    b",",
    b"\\",
    b"{",
    b"[",
    b"\x1a",
    b"\xcc\x81\xcc\x96" * 500,
    b"A" * 4096,
    b"\n" * 2000,
    b'"' * 500,
)


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
    """A few changes that know nothing of a format."""
    out = bytearray(data)
    for _ in range(1 << chance.randrange(4)):
        chance.choice(_BYTE_CHANGES)(chance, out)
    return bytes(out[:MAX_SIZE])


def _flip(chance: random.Random, out: bytearray) -> None:
    if out:
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, out: bytearray) -> None:
    if out:
        out[chance.randrange(len(out))] = chance.choice((0, 0x20, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _insert(chance: random.Random, out: bytearray) -> None:
    at = chance.randint(0, len(out))
    out[at:at] = chance.choice(_BYTES)


def _cut(chance: random.Random, out: bytearray) -> None:
    begin, end = sorted((chance.randint(0, len(out)), chance.randint(0, len(out))))
    del out[begin : min(end, begin + chance.choice((1, 8, 64, 1 << 20)))]


def _repeat(chance: random.Random, out: bytearray) -> None:
    begin = chance.randint(0, len(out))
    part = out[begin : begin + chance.choice((1, 4, 32, 256))]
    out[begin:begin] = part * min(chance.choice((1, 1, 2, 2, 3, 8, 50, 2000)), MAX_SIZE // max(1, len(part)))


def _move(chance: random.Random, out: bytearray) -> None:
    begin, to = chance.randint(0, len(out)), chance.randint(0, len(out))
    part = out[begin : begin + chance.choice((1, 8, 64))]
    out[to : to + len(part)] = part


def _integer(chance: random.Random, out: bytearray) -> None:
    size = chance.choice((1, 2, 4, 8))
    at = chance.randint(0, max(0, len(out) - size))
    out[at : at + size] = (chance.choice(_INTEGERS) % (1 << 8 * size)).to_bytes(size, chance.choice(("little", "big")))


def _digits(chance: random.Random, out: bytearray) -> None:
    places = [i for i, byte in enumerate(out[:20000]) if 48 <= byte < 58]
    if places:
        at = chance.choice(places)
        out[at : at + 1] = chance.choice(_NUMBERS).encode()


_BYTE_CHANGES = (_flip, _flip, _set, _insert, _cut, _repeat, _move, _integer, _digits)


class _Pairs(list[Any]):
    """A JSON object as [key, value] lists, so that keys can be given twice; values are trees or raw `str` tokens."""


def _tree(text: str) -> Any:
    """JSON as lists and `_Pairs`, every leaf as the token that stands for it."""
    return _leaf(json.loads(text, object_pairs_hook=lambda pairs: _Pairs([json.dumps(k), v] for k, v in pairs)))


def _leaf(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return _Pairs([key, _leaf(item)] for key, item in value)
    if isinstance(value, list):
        return [_leaf(item) for item in value]
    return json.dumps(value)


def _written(value: Any) -> str:
    if isinstance(value, _Pairs):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value)


def mutate_json(chance: random.Random, data: bytes) -> bytes:
    """Changes along the tree of a JSON document; of anything else, changes of its bytes."""
    if chance.random() < 0.25:
        return mutate_bytes(chance, data)
    try:
        root = [_tree(data.decode())]
    except (ValueError, RecursionError):
        return mutate_bytes(chance, data)
    for _ in range(1 << chance.randrange(3)):
        _change_tree(chance, root)
    return ",".join(map(_written, root)).encode("utf-8", "surrogatepass")[:MAX_SIZE]


def _change_tree(chance: random.Random, root: list[Any]) -> None:
    node, depth = root, 0
    while True:  # walk down to some container; deep ones are as likely as shallow ones
        inner = [item[1] if isinstance(node, _Pairs) else item for item in node]
        inner = [item for item in inner if isinstance(item, list)]
        if not inner or (depth and chance.random() < 0.3):
            break
        node, depth = chance.choice(inner), depth + 1
    if not node:
        node.append(['"a"', chance.choice(JSON_TOKENS)] if isinstance(node, _Pairs) else chance.choice(JSON_TOKENS))
        return
    at = chance.randrange(len(node))
    entry, pairs = node[at], isinstance(node, _Pairs)
    kind = chance.randrange(8)
    if kind == 0:
        del node[at]
    elif kind == 1:
        node.insert(at, list(entry) if pairs else entry)
    elif kind == 2:
        room = MAX_SIZE // (1 + len(_written(entry)))
        node.extend([list(entry) if pairs else entry] * min(chance.choice((1, 40, 400)), room))
    elif kind == 3 and pairs:
        entry[0] = chance.choice((chance.choice(node)[0], chance.choice(_STRINGS)))
    elif kind == 4:
        other = chance.choice(node)
        _put(node, at, other[1] if pairs else other)
    elif kind == 5:
        _put(node, at, [entry[1] if pairs else entry])
    else:
        _put(node, at, chance.choice(JSON_TOKENS))


def _put(node: list[Any], at: int, value: Any) -> None:
    if isinstance(node, _Pairs):
        node[at] = [node[at][0], value]
    else:
        node[at] = value


def mutate_lines(inner: Mutator) -> Mutator:
    """Changes of one line by `inner`, and of the order and number of lines."""

    def mutate(chance: random.Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        at = chance.randrange(len(lines))
        kind = chance.randrange(6)
        if kind == 0:
            return mutate_bytes(chance, data)
        if kind == 1:
            line = chance.choice(lines)
            lines[at:at] = [line] * min(chance.choice((1, 3, 100)), MAX_SIZE // (1 + len(line)))
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        else:
            lines[at] = inner(chance, lines[at])
        return chance.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)[:MAX_SIZE]

    return mutate


def mutate_tokens(tokens: tuple[str, ...]) -> Mutator:
    """Tokens of a language put in, put in place of words, and bytes changed."""

    def mutate(chance: random.Random, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(1 << chance.randrange(3)):
            token = chance.choice(tokens).encode("utf-8", "surrogatepass")
            at = chance.randint(0, len(out))
            kind = chance.randrange(4)
            if kind == 0:  # in place of what stands behind a sign
                begin = max(out.find(sign, at) for sign in (b"=", b"[", b",")) + 1
                end = min((e for e in (out.find(b"\n", begin), out.find(b",", begin)) if e >= 0), default=begin)
                out[begin:end] = token
            elif kind == 1:  # as a line of its own
                begin = out.find(b"\n", at) + 1
                out[begin:begin] = token + b"\n"
            elif kind == 2:
                out[at:at] = token
            else:
                chance.choice(_BYTE_CHANGES)(chance, out)
        return bytes(out[:MAX_SIZE])

    return mutate


def mutate_gzip(inner: Mutator) -> Mutator:
    """Changes of what is packed, of the packed bytes, and small files that unpack to large ones."""

    def mutate(chance: random.Random, data: bytes) -> bytes:
        kind = chance.randrange(200)
        if kind == 0:
            unit = chance.choice((b"\0", b"a", b"a\n", b'{"text": "a"}\n', b'{"text": "', b"[" * 64))
            return gzip.compress(unit * ((1 << 20) // len(unit)), 9, mtime=0)
        if kind < 60:
            return mutate_bytes(chance, data)
        try:
            plain = zlib.decompressobj(wbits=31).decompress(data, MAX_SIZE)
        except zlib.error:
            return mutate_bytes(chance, data)
        return gzip.compress(inner(chance, plain), 1, mtime=0)

    return mutate


def mutate_zstd(inner: Mutator) -> Mutator:
    """As `mutate_gzip`, for zstandard."""

    def mutate(chance: random.Random, data: bytes) -> bytes:
        import zstandard

        kind = chance.randrange(200)
        if kind == 0:
            unit = chance.choice((b"\0", b"a\n", b'{"text": "a"}\n'))
            return zstandard.ZstdCompressor().compress(unit * ((1 << 20) // len(unit)))
        if kind < 60:
            return mutate_bytes(chance, data)
        try:
            plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_SIZE)
        except zstandard.ZstdError:
            return mutate_bytes(chance, data)
        return zstandard.ZstdCompressor().compress(inner(chance, plain))

    return mutate


def mutate_safetensors(chance: random.Random, data: bytes) -> bytes:
    """Changes of the header's JSON with a length that fits it, of the length, and of all bytes."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.2 or not 0 < length <= len(data) - 8:
        return mutate_bytes(chance, data)
    header, rest = mutate_json(chance, data[8 : 8 + length]), data[8 + length :]
    stated = len(header) if chance.random() < 0.9 else chance.choice(_INTEGERS) % 2**64
    return stated.to_bytes(8, "little") + header + rest


def mutate_manifest(key: str) -> Mutator:
    """As `mutate_safetensors`, and changes of the JSON that stands as a text under `key` of `__metadata__`."""

    def mutate(chance: random.Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            inner = header["__metadata__"][key]
        except (ValueError, KeyError, TypeError, RecursionError):
            return mutate_safetensors(chance, data)
        if not isinstance(inner, str) or chance.random() < 0.4:
            return mutate_safetensors(chance, data)
        header["__metadata__"][key] = mutate_json(chance, inner.encode("utf-8", "replace")).decode("utf-8", "replace")
        written = json.dumps(header, separators=(",", ":")).encode()
        return len(written).to_bytes(8, "little") + written + data[8 + length :]

    return mutate


def mutate_envelope(chance: random.Random, data: bytes) -> bytes:
    """Changes of a DSSE envelope, or of the statement in it, which is then not what was signed."""
    try:
        value = json.loads(data)
        envelope = value.get("dsseEnvelope", value)
        payload = base64.b64decode(envelope["payload"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        return mutate_json(chance, data)
    if chance.random() < 0.7:
        return mutate_json(chance, data)
    envelope["payload"] = base64.b64encode(mutate_json(chance, payload)).decode()
    return json.dumps(value).encode()


def mutate_zip(chance: random.Random, data: bytes) -> bytes:
    """Changes of the names, the methods and the contents of an archive's members, and of its bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, info.compress_type, archive.read(info)) for info in archive.infolist()][:50]
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        LookupError,
    ):
        return mutate_bytes(chance, data)
    if chance.random() < 0.4 or not members:
        return mutate_bytes(chance, data)
    at = chance.randrange(len(members))
    name, method, content = members[at]
    kind = chance.choice((0, 1, 2, 2, 4, 4, 4, 4)) if chance.random() < 0.98 else 3
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append((chance.choice(("a/data/1", "../x", "/x", "a/byteorder", "a/data/0")), method, content))
    elif kind == 2:
        members[at] = (name, chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)), content)
    elif kind == 3:
        members[at] = (name, zipfile.ZIP_DEFLATED, b"\0" * (1 << 20))
    else:
        members[at] = (name, method, mutate_bytes(chance, content))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, (name, method, content) in enumerate(members):
            archive.writestr(zipfile.ZipInfo(name if len(name) < 60000 else str(number)), content, method)
    return out.getvalue()


def mutate_npy(chance: random.Random, data: bytes) -> bytes:
    """Changes of the dictionary at the head of an .npy file, padded to its stated length, and of all bytes."""
    if chance.random() < 0.4 or data[:6] != b"\x93NUMPY":
        return mutate_bytes(chance, data)
    length = int.from_bytes(data[8:10], "little")
    shape = chance.choice(
        (
            "(2, 3)",
            "(-1, 3)",
            "(9223372036854775807, 2)",
            "(4294967296, 4294967296)",
            "()",
            "(6,)",
            "(1e9, 2)",
            "(True, 3)",
            "(" + "1," * 60 + ")",
            "(0, 3)",
            "(2, 3" + ", 1" * 40 + ")",
            "[2, 3]",
            "(" * 200,
        )
    )
    descr = chance.choice(
        (
            "'<i8'",
            "'|O'",
            "'<u2'",
            "'>i4'",
            "'<f8'",
            "'|V8'",
            "[('a', '<i8')]",
            "'<i8' * 99999",
            "'|S0'",
            "'<U99999999'",
            "'M8[s]'",
            "None",
            "__import__('os')",
        )
    )
    order = chance.choice(("False", "True", "0", "None"))
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".encode()
    text = mutate_bytes(chance, text) if chance.random() < 0.3 else text
    stated = chance.choice((len(text), length, 65535, 0)) if chance.random() < 0.3 else len(text)
    return data[:8] + min(stated, 65535).to_bytes(2, "little") + text + data[10 + length :]
