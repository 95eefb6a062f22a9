"""An attacker who can write the patch: it is refused, or does what an honest one would; nothing is half-written."""

from __future__ import annotations

import io
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from memscrub.errors import ExitCode, MemscrubError, SignatureInvalidError, UsageError
from memscrub.storage.checkpoint import INDEX, Checkpoint, digest_files, open_checkpoint, tree_digest
from memscrub.storage.patch import PatchFile, header_bytes, open_patch, read_range, save_patch
from memscrub.storage.patch_files import apply_patch, revert_patch, write_patch

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Stated = dict[str, Any]
Parts = dict[str, bytes]


def build(root: Path, changed: bool) -> Checkpoint:
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "llama"}')
    places, vectors, mask = torch.zeros(8, 9), torch.zeros(4, 6), torch.zeros(6, 5)
    if changed:
        places[1, 2] = places[5, 5] = 1.5
        vectors[:, 3] = torch.tensor([1.1, 2.2, -3.3, 4.4])
        mask.view(-1)[::2] = 1.0
    save_file({"m.places": places, "m.vectors": vectors}, root / SHARDS[0])
    save_file({"m.mask": mask}, root / SHARDS[1])
    index = {"m.places": SHARDS[0], "m.vectors": SHARDS[0], "m.mask": SHARDS[1]}
    (root / INDEX).write_text(json.dumps({"weight_map": index}))
    return open_checkpoint(root)


@pytest.fixture
def patch(tmp_path: Path) -> PatchFile:
    """The honest patch `p`, beside `base` and `scrubbed`; it has a tensor of each layout."""
    write_patch(build(tmp_path / "base", False), build(tmp_path / "scrubbed", True), tmp_path / "p")
    found = open_patch(tmp_path / "p")
    assert [tensor.layout for tensor in found.manifest.tensors] == ["mask", "places", "vectors"]
    return found


def attack(tmp_path: Path) -> MemscrubError:
    """What becomes of the patch, either way: the same one error, and no trace but the inputs."""
    names = sorted(os.listdir(tmp_path))
    before = [digest_files(tmp_path / side) for side in ("base", "scrubbed")]
    errors = []
    for function, side in ((apply_patch, "base"), (revert_patch, "scrubbed")):
        with pytest.raises(MemscrubError) as caught:
            function(open_checkpoint(tmp_path / side), open_patch(tmp_path / "p"), tmp_path / "out")
        assert caught.value.exit_code in (ExitCode.USAGE, ExitCode.SIGNATURE)
        assert "\n" not in str(caught.value)
        errors.append(caught.value)
    assert sorted(os.listdir(tmp_path)) == names
    assert [digest_files(tmp_path / side) for side in ("base", "scrubbed")] == before
    assert type(errors[0]) is type(errors[1])
    return errors[0]


def forge(patch: PatchFile, edit: Callable[[Stated, Parts], None]) -> None:
    """Write the patch anew, checksum and all, with what `edit` makes of its manifest and parts."""
    stated = patch.manifest.model_dump()
    parts = {key: bytes(read_range(patch.path, part.begin, part.end)) for key, part in patch.parts.items()}
    edit(stated, parts)
    manifest = json.dumps(stated, separators=(",", ":"))
    header = header_bytes(manifest, {key: len(part) for key, part in parts.items()})
    save_patch(patch.path, header, io.BytesIO(b"".join(parts.values())))


def test_an_honest_forgery_still_works(patch: PatchFile, tmp_path: Path) -> None:
    """So that the refusals below are not those of `forge`."""
    honest = patch.path.read_bytes()
    forge(patch, lambda stated, parts: None)
    assert patch.path.read_bytes() == honest
    apply_patch(open_checkpoint(tmp_path / "base"), open_patch(patch.path), tmp_path / "out")
    assert digest_files(tmp_path / "out") == digest_files(tmp_path / "scrubbed")


def test_every_flipped_byte_is_found_before_anything_is_written(patch: PatchFile) -> None:
    honest = patch.path.read_bytes()
    assert len(honest) < 5000
    kinds = set()
    for position in range(len(honest)):
        data = bytearray(honest)
        data[position] ^= 1 << position % 8
        patch.path.write_bytes(data)
        try:
            open_patch(patch.path)
        except (UsageError, SignatureInvalidError) as error:
            kinds.add(error.exit_code)
        else:
            pytest.fail(f"byte {position} was flipped, and nobody saw it")
    assert kinds == {ExitCode.USAGE, ExitCode.SIGNATURE}


def test_damage_of_the_values_is_a_matter_of_digests(patch: PatchFile, tmp_path: Path) -> None:
    data = bytearray(patch.path.read_bytes())
    data[-1] ^= 1
    patch.path.write_bytes(data)
    error = attack(tmp_path)
    assert error.exit_code is ExitCode.SIGNATURE and "checksum does not hold" in str(error)


def test_a_truncated_or_longer_patch_is_refused(patch: PatchFile) -> None:
    honest = patch.path.read_bytes()
    for size in (*range(0, 40), *range(40, len(honest), 97), len(honest) - 1):
        patch.path.write_bytes(honest[:size])
        with pytest.raises(UsageError):
            open_patch(patch.path)
    patch.path.write_bytes(honest + b"\0")
    with pytest.raises(UsageError, match="cannot be used"):
        open_patch(patch.path)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x02" + bytes(7) + b"{}", b"\xff" * 64, b"\x04" + bytes(7) + b"null"])
def test_what_is_no_patch_is_called_so(patch: PatchFile, data: bytes) -> None:
    patch.path.write_bytes(data)
    with pytest.raises(UsageError, match="cannot be used"):
        open_patch(patch.path)


def test_a_checkpoint_or_a_directory_is_no_patch(patch: PatchFile, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a patch of memscrub"):
        open_patch(tmp_path / "base" / SHARDS[0])
    for place in ("base", "nothing"):
        with pytest.raises(UsageError, match="is not a file"):
            open_patch(tmp_path / place)


def test_a_patch_for_another_base_is_refused(patch: PatchFile, tmp_path: Path) -> None:
    save_file({"m.mask": torch.full((6, 5), 9.0)}, tmp_path / "base" / SHARDS[1])
    with pytest.raises(UsageError, match=r"another checkpoint.*--policy") as caught:
        apply_patch(open_checkpoint(tmp_path / "base"), patch, tmp_path / "out")
    assert caught.value.exit_code is ExitCode.USAGE


def set_tensor(which: str, /, **values: object) -> Callable[[Stated, Parts], None]:
    def edit(stated: Stated, parts: Parts) -> None:
        stated["tensors"] = [{**each, **values} if each["layout"] == which else each for each in stated["tensors"]]

    return edit


def set_part(key: str, value: bytes) -> Callable[[Stated, Parts], None]:
    return lambda stated, parts: parts.__setitem__(key, value)


def rename_file(old: str, new: str) -> Callable[[Stated, Parts], None]:
    """A file or shard under another name, with the digest that goes with it."""

    def edit(stated: Stated, parts: Parts) -> None:
        for kind in ("files", "shards"):
            stated[kind] = {new if name == old else name: value for name, value in stated[kind].items()}
        stated["tensors"] = [{**t, "shard": new if t["shard"] == old else t["shard"]} for t in stated["tensors"]]
        after = {**stated["files"], **{name: each["after"] for name, each in stated["shards"].items()}}
        stated["scrubbed_sha256"] = tree_digest(after)

    return edit


STRUCTURE: list[tuple[str, Callable[[Stated, Parts], None], str]] = [
    ("a file above the directory", rename_file("config.json", "../config.json"), "outside of a checkpoint"),
    ("a shard above the directory", rename_file(SHARDS[0], "../../p"), "outside of a checkpoint"),
    ("an absolute shard", rename_file(SHARDS[0], "/etc/passwd"), "outside of a checkpoint"),
    ("a left-out file above", lambda stated, _: stated.update(left_out=["../x"]), "outside of a checkpoint"),
    ("a shard that is not there", rename_file(SHARDS[0], "other.safetensors"), "missing"),
    ("a tensor named like a path", set_tensor("mask", name="../../m.mask"), "not those that its manifest names"),
    ("another layout", set_tensor("places", layout="vectors"), "not those that its manifest names"),
    ("no such layout", set_tensor("places", layout="pickle"), r"misstates a field \(tensors.1.layout\)"),
    ("a negative size", set_tensor("places", shape=(-1, 9)), "misstates a field"),
    ("no digest", set_tensor("places", sha256_before="0"), "misstates a field"),
    ("an unknown key", set_tensor("places", code="import os"), "misstates a field"),
    ("a part too many", set_part("m.extra.bytes", b"1"), "not those that its manifest names"),
    ("a part too few", lambda _, parts: parts.pop("m.mask.mask"), "not those that its manifest names"),
    ("a tensor twice", lambda s, _: s.update(tensors=[*s["tensors"], s["tensors"][0]]), "contradicts itself"),
    ("a shard without tensors", lambda s, _: s["shards"].update(x={"before": "0" * 64, "after": "1" * 64}),
     "contradicts itself"),
    ("another end", lambda s, _: s.update(scrubbed_sha256="0" * 64), "is not that of its files"),
    ("no manifest", lambda s, _: s.clear(), "misstates a field"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), [case[1:] for case in STRUCTURE], ids=[case[0] for case in STRUCTURE])
def test_a_manifest_that_lies_is_refused_as_input(
    patch: PatchFile, tmp_path: Path, edit: Callable[[Stated, Parts], None], message: str
) -> None:
    forge(patch, edit)
    error = attack(tmp_path)
    assert error.exit_code is ExitCode.USAGE
    assert re.search(message, str(error)), str(error)


CONTENT: list[tuple[str, Callable[[Stated, Parts], None], ExitCode]] = [
    ("a place behind the end", set_part("m.places.places", b"\xff\xff\x00\x01"), ExitCode.USAGE),
    ("places that go back", set_part("m.places.places", b"\x05\x00\x01\x01"), ExitCode.USAGE),
    ("places without an end", set_part("m.places.places", b"\x01\x01\x01\xff"), ExitCode.USAGE),
    ("no places", set_part("m.places.places", b""), ExitCode.USAGE),
    ("no values", set_part("m.places.bytes", b""), ExitCode.USAGE),
    ("fewer values than places", set_part("m.places.bytes", b"\x01"), ExitCode.USAGE),
    ("a vector behind the end", set_part("m.vectors.vectors", b"\xc8"), ExitCode.USAGE),
    ("more vectors than values", set_part("m.vectors.vectors", b"\x03\x01"), ExitCode.USAGE),
    ("a mask too short", set_part("m.mask.mask", b"\x01"), ExitCode.USAGE),
    ("a mask that says more", lambda _, p: p.update({"m.mask.mask": b"\xff" * len(p["m.mask.mask"])}), ExitCode.USAGE),
    ("values larger than the tensor", set_part("m.mask.bytes", bytes(1000)), ExitCode.USAGE),
    ("the other axis", set_tensor("vectors", axis="rows"), ExitCode.USAGE),
    ("another place", set_part("m.places.places", b"\x01\x01\x01\x01"), ExitCode.SIGNATURE),
    ("another value", lambda _, p: p.update({"m.vectors.bytes": bytes(len(p["m.vectors.bytes"]))}), ExitCode.SIGNATURE),
    ("another dtype", set_tensor("places", dtype="F64"), ExitCode.SIGNATURE),
    ("an immense shape", set_tensor("places", shape=(2**62, 2**62)), ExitCode.SIGNATURE),
    ("another shard", set_tensor("mask", shard=SHARDS[0]), ExitCode.USAGE),
    ("digests of nothing", set_tensor("places", sha256_after="0" * 64), ExitCode.SIGNATURE),
    ("a change held back", lambda s, p: (s.update(tensors=[t for t in s["tensors"] if t["layout"] != "places"]),
     [p.pop(key) for key in ("m.places.places", "m.places.bytes")]), ExitCode.SIGNATURE),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "code"), [case[1:] for case in CONTENT], ids=[case[0] for case in CONTENT])
def test_a_change_that_lies_leaves_nothing_behind(
    patch: PatchFile, tmp_path: Path, edit: Callable[[Stated, Parts], None], code: ExitCode
) -> None:
    forge(patch, edit)
    assert attack(tmp_path).exit_code is code


def metadata_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["__metadata__"].update(schema="2"), "another schema"),
        (lambda h: h["__metadata__"].update(format="other"), "not a patch of memscrub"),
        (lambda h: h["__metadata__"].pop("manifest"), "not a patch of memscrub"),
        (lambda h: h["__metadata__"].update(manifest="[" * 100_000), "manifest cannot be read"),
        (lambda h: h["__metadata__"].update(manifest='{"files": {}, "files": {}}'), "a key appears twice"),
        (lambda h: h["__metadata__"].update(manifest="[]"), "misstates a field"),
        (lambda h: h["m.places.bytes"].update(dtype="I8"), "not all rows of bytes"),
        (lambda h: h["m.places.bytes"].update(shape=[2, 2]), "not all rows of bytes"),
        (lambda h: h["m.places.bytes"].update(shape=[2**62]), "malformed"),
        (lambda h: h["m.places.bytes"].update(data_offsets=[0, 2**62]), "malformed"),
    ],
)
def test_a_header_that_lies_is_refused(patch: PatchFile, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    header, payload = metadata_of(patch.path)
    edit(header)
    header["__metadata__"]["checksum"] = "0" * 64
    raw = json.dumps(header, separators=(",", ":")).encode()
    save_patch(patch.path, len(raw).to_bytes(8, "little") + raw, io.BytesIO(payload))
    with pytest.raises(UsageError, match=message):
        open_patch(patch.path)


def test_a_second_checksum_does_not_hide_a_change(patch: PatchFile) -> None:
    header, payload = metadata_of(patch.path)
    header["m.places.bytes"]["checksum"] = header["__metadata__"]["checksum"]
    raw = json.dumps(header, separators=(",", ":")).encode()
    patch.path.write_bytes(len(raw).to_bytes(8, "little") + raw + payload)
    with pytest.raises(UsageError, match="malformed"):
        open_patch(patch.path)


@pytest.mark.parametrize("stated", ["\ud800", "", "0", "A" * 64, "\u0661" * 64, "0" * 64 + "\n"])
def test_a_checksum_that_is_none_does_not_hold(patch: PatchFile, stated: str) -> None:
    header, payload = metadata_of(patch.path)
    header["__metadata__"]["checksum"] = stated
    raw = json.dumps(header, separators=(",", ":")).encode()
    patch.path.write_bytes(len(raw).to_bytes(8, "little") + raw + payload)
    with pytest.raises(SignatureInvalidError, match="checksum does not hold"):
        open_patch(patch.path)


def test_a_patch_is_not_written_through_a_link_that_was_laid_for_it(patch: PatchFile, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    (tmp_path / "q.partial").symlink_to(victim)
    (tmp_path / "q").symlink_to(victim)
    header, payload = patch.path.read_bytes(), b""
    length = int.from_bytes(header[:8], "little") + 8
    header, payload = header[:length], header[length:]
    checksum = json.loads(header[8:])["__metadata__"]["checksum"].encode()
    save_patch(tmp_path / "q", header.replace(checksum, b"0" * 64), io.BytesIO(payload))
    assert victim.read_text() == "keep me" and (tmp_path / "q.partial").is_symlink()
    assert (tmp_path / "q").read_bytes() == patch.path.read_bytes() and not (tmp_path / "q").is_symlink()


def test_a_part_of_any_size_is_refused_before_it_is_read(patch: PatchFile, tmp_path: Path) -> None:
    forge(patch, set_part("m.places.bytes", bytes(200 << 20)))
    tracemalloc.start()
    error = attack(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.exit_code is ExitCode.USAGE and "do not fit that tensor" in str(error)
    assert peak < 64 << 20
