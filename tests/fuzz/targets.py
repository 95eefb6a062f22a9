"""Every parser of files that memscrub does not write itself, or that somebody may have changed: how to feed it bytes,
and valid inputs to start from. Knows the parsers, not how inputs are made or judged.

A parser passes when it returns, or raises a `MemscrubError` with a message fit for a terminal.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memscrub.policy.document import load_policy, parse_policy
from memscrub.reports.report import load_report
from memscrub.texts.corpora import FileEnd, find_files, read_file
from memscrub.texts.list_formats import read_format
from memscrub.texts.protected import load_protected
from tests.fuzz.mutators import (
    TOML_TOKENS,
    Mutator,
    mutate_bytes,
    mutate_envelope,
    mutate_gzip,
    mutate_json,
    mutate_lines,
    mutate_manifest,
    mutate_npy,
    mutate_safetensors,
    mutate_tokens,
    mutate_zip,
    mutate_zstd,
)

Run = Callable[[bytes], object]
Prepared = tuple[Sequence[bytes], Run]

CANARY = "Quetzal-Canary"
# A corpus may be of any length, so that its time has no limit: a file of 64 KiB can hold a million documents.
MOST_PIECES = 100_000
"""Stands in every seed of a list: no message may repeat it."""
REPORTS = Path(__file__).parent.parent / "fixtures" / "reports"
POLICIES = Path(__file__).parent.parent.parent / "policies"


@dataclass(frozen=True)
class Target:
    """One parser: `prepare` makes seeds and the function to feed, given a folder of its own.

    `share` is its part of all inputs, in thousandths:
    slow parsers get fewer, so that each gets about the same time."""

    name: str
    prepare: Callable[[Path], Prepared]
    mutate: Mutator
    share: int


def _write(path: Path, data: bytes) -> None:
    """A new file each time: an old one may still be mapped into memory."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


_POLICY = """schema = 1
name = "fuzz"
[protected]
files = ["texts.jsonl"]
[class.a]
max_verbatim_tokens = 4
[class.b]
secret = true
max_sampling_probability = 1e-3
"""
_ROWS = (
    {"id": "a-1", "class": "a", "text": f"{CANARY} one, cafe\u0301", "source": "s", "prefix": "before"},
    {"id": "a-2", "class": "b", "text": f"call {CANARY} two", "secret": [[5, 19]]},
    {"text": f"{CANARY} three", "class": "a", "secret": None},
)
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
_CSV = f'id,class,text,secret\n1,a,"{CANARY}, ""quoted""\nline",\n2,b,{CANARY} two,"[[0, 14]]"\n'.encode()
_TEXT = f"{CANARY} one\nsecond line\n\n{CANARY} two\r\n\r\n  \n\xe9\n".encode()


def _policy(folder: Path) -> Prepared:
    for name in ("texts", "protected", "control", "retain", "neighbours", "controls"):
        for end in (".jsonl", ".txt"):
            (folder / (name + end)).write_bytes(_LINES)
    file = folder / "policy.toml"

    def fuzz_policy(data: bytes) -> object:
        _write(file, data)
        return load_policy(file)

    seeds = [_POLICY.encode(), *(path.read_bytes() for path in sorted(POLICIES.glob("*.toml")))]
    return seeds, fuzz_policy


def _list(name: str, *seeds: bytes) -> Callable[[Path], Prepared]:
    def prepare(folder: Path) -> Prepared:
        rules = _POLICY.replace("texts.jsonl", name)
        if name.endswith(".txt"):  # its texts have no class of their own
            rules = rules[: rules.index("[class.b]")]
        policy = parse_policy(rules.encode(), folder / "policy.toml")
        file = folder / name

        def fuzz_list(data: bytes) -> object:
            _write(file, data)
            return load_protected(policy)

        return seeds, fuzz_list

    return prepare


def _parquet_bytes() -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [f"{CANARY} {i}" for i in range(4)], "class": ["a"] * 4}), out)
    return out.getvalue()


def _list_parquet(folder: Path) -> Prepared:
    return _list("texts.parquet", _parquet_bytes())(folder)


def _foreign(form: str, name: str, make: Callable[[], Mapping[str, bytes]], at: str) -> Callable[[Path], Prepared]:
    """A list in another tool's format: files of one folder, of which the one called `name` is fuzzed."""

    def prepare(folder: Path) -> Prepared:
        files = make()
        for other, content in files.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)

        def fuzz_foreign(data: bytes) -> object:
            _write(folder / name, data)
            return read_format(form, folder / at, decode=lambda ids: f"text {ids[0]}", class_name="a", vocabulary=500)

        return [files[name]], fuzz_foreign

    return prepare


def _npy(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _lm_extraction() -> Mapping[str, bytes]:
    ids = np.arange(12, dtype=np.uint16).reshape(2, 6)
    return {"train_prefix.npy": _npy(ids), "train_suffix.npy": _npy(ids)}


def _torch_file() -> Mapping[str, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a/data.pkl"), b"\x80\x02}q\x00.")
        archive.writestr(zipfile.ZipInfo("a/byteorder"), b"little")
        archive.writestr(zipfile.ZipInfo("a/data/0"), np.arange(160, dtype="<i8").tobytes())
    return {"list.pt": out.getvalue()}


def _mempi() -> Mapping[str, bytes]:
    return {"list.jsonl": f'{{"ref": "{CANARY} one", "pile_idx": "3"}}\n{{"all": "{CANARY} two"}}\n'.encode()}


def _dataset() -> Mapping[str, bytes]:
    import pyarrow

    out = io.BytesIO()
    table = pyarrow.table({"text": [f"{CANARY} {i}" for i in range(4)]})
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    state = json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})
    return {
        "dataset_dict.json": b'{"splits": ["train"]}',
        "train/state.json": state.encode(),
        "train/data-00000-of-00001.arrow": out.getvalue(),
    }


def _safetensors(tensors: Mapping[str, np.ndarray], **metadata: str) -> bytes:  # type: ignore[type-arg]
    from safetensors.numpy import save

    return save(dict(tensors), metadata or None)


def _checkpoint(name: str) -> Callable[[Path], Prepared]:
    """A checkpoint of two shards, of which the file `name` is fuzzed."""

    def prepare(folder: Path) -> Prepared:
        from memscrub.storage.checkpoint import open_checkpoint

        shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        ones = np.ones((2, 3), np.float32)
        files = {
            "config.json": b'{"model_type": "llama", "hidden_size": 8, "architectures": ["LlamaForCausalLM"]}',
            shards[0]: _safetensors({"a": ones, "b": ones}, format="pt"),
            shards[1]: _safetensors({"c": ones.astype(np.float16), "d": np.ones((), np.int8)}),
            "model.safetensors.index.json": json.dumps(
                {"metadata": {"total_size": 61}, "weight_map": {t: shards[t > "b"] for t in "abcd"}}
            ).encode(),
            "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}',
        }
        for other, content in files.items():
            (folder / other).write_bytes(content)
        fuzzed = folder / (shards[0] if name == "shard" else name)

        def fuzz_checkpoint(data: bytes) -> object:
            _write(fuzzed, data)
            return open_checkpoint(folder)

        return [files[fuzzed.name]], fuzz_checkpoint

    return prepare


def _adapter(name: str) -> Callable[[Path], Prepared]:
    """A LoRA adapter, of which the file `name` is fuzzed."""

    def prepare(folder: Path) -> Prepared:
        from memscrub.storage.adapters import open_adapter

        settings = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q"],
            "alpha_pattern": {"q": 8},
            "base_model_name_or_path": "owner/base",
        }
        halves = {f"base_model.model.m.q.lora_{which}.weight": np.ones((2, 2), np.float32) for which in "AB"}
        files = {
            "adapter_config.json": json.dumps(settings).encode(),
            "adapter_model.safetensors": _safetensors(halves),
        }
        for other, content in files.items():
            (folder / other).write_bytes(content)

        def fuzz_adapter(data: bytes) -> object:
            _write(folder / name, data)
            return open_adapter(folder)

        return [files[name]], fuzz_adapter

    return prepare


def _report(folder: Path) -> Prepared:
    file = folder / "memscrub-report.json"

    def fuzz_report(data: bytes) -> object:
        _write(file, data)
        return load_report(file).to_json()

    return [path.read_bytes() for path in sorted(REPORTS.rglob("memscrub-report.json"))], fuzz_report


def _signed(folder: Path) -> None:
    from memscrub.proof.keys import generate_keypair
    from memscrub.proof.signing import sign_directory, sign_report

    generate_keypair(folder / "key.pem", folder / "key.pub")
    root = folder / "model"
    root.mkdir()
    (root / "config.json").write_bytes(b"{}")
    (root / "memscrub-report.json").write_bytes(b'{"schema": 1}')
    sign_directory(root, folder / "key.pem")
    sign_report(root / "memscrub-report.json", folder / "key.pem", passed=True, policy_digests={"p.toml": "0" * 64})


def _signature(name: str) -> Callable[[Path], Prepared]:
    """A signed directory, of which the file `name` is fuzzed."""

    def prepare(folder: Path) -> Prepared:
        from memscrub.proof.signing import verify_directory

        _signed(folder)
        file = folder / "model" / name
        seed = file.read_bytes()

        def fuzz_signature(data: bytes) -> object:
            _write(file, data)
            return verify_directory(folder / "model", folder / "key.pub", workers=1)

        return [seed], fuzz_signature

    return prepare


def _statement(name: str) -> Callable[[Path], Prepared]:
    """As `_signature`, but what is fuzzed is the statement, and the attacker holds the key."""

    def prepare(folder: Path) -> Prepared:
        import base64

        from memscrub.proof.keys import load_private_key
        from memscrub.proof.signing import verify_directory
        from memscrub.proof.statements import PAYLOAD_TYPE
        from memscrub.storage.files import write_json

        _signed(folder)
        file = folder / "model" / name
        value = json.loads(file.read_bytes())
        key = load_private_key(folder / "key.pem", None)
        seed = base64.b64decode(value.get("dsseEnvelope", value)["payload"])

        def fuzz_statement(data: bytes) -> object:
            signed = (key.bundle if "dsseEnvelope" in value else key.statement)(data, PAYLOAD_TYPE)
            write_json(file, signed)
            return verify_directory(folder / "model", folder / "key.pub", workers=1)

        return [seed], fuzz_statement

    return prepare


def _keys(folder: Path) -> Prepared:
    from memscrub.proof.keys import generate_keypair, load_private_key, load_public_key

    pems = []
    for kind, password in (("ec-p256", None), ("ed25519", None), ("ed25519", "word")):
        names = [folder / f"{kind}-{password}{end}" for end in (".pem", ".pub")]
        generate_keypair(*names, kind=kind, password=password)  # type: ignore[arg-type]
        pems += [name.read_bytes() for name in names]
    file = folder / "key"

    def fuzz_keys(data: bytes) -> object:
        _write(file, data)
        password = "word" if b"ENCRYPTED" in data else None
        return load_private_key(file, password) if b"PRIVATE" in data else load_public_key(file)

    return pems, fuzz_keys


def _patch(folder: Path) -> Prepared:
    import torch
    from safetensors.torch import save_file

    from memscrub.storage.checkpoint import open_checkpoint
    from memscrub.storage.files import strict_json
    from memscrub.storage.patch import open_patch
    from memscrub.storage.patch_files import write_patch

    torch.set_num_threads(1)
    tensors = {"places": torch.zeros(8, 9), "vectors": torch.zeros(4, 6), "mask": torch.zeros(6, 5)}
    for side in ("base", "scrubbed"):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text('{"model_type": "llama"}')
        save_file(tensors, folder / side / "model.safetensors")
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors["places"][1, 2] = tensors["places"][5, 5] = 1.5
        tensors["vectors"][:, 3] = torch.tensor([1.1, 2.2, -3.3, 4.4])
        tensors["mask"].view(-1)[::2] = 1.0
    base = open_checkpoint(folder / "base")
    write_patch(base, open_checkpoint(folder / "scrubbed"), folder / "patch")
    file = folder / "fuzzed"

    def fuzz_patch(data: bytes) -> object:
        _write(file, _checked(data))
        patch = open_patch(file)
        for tensor in patch.manifest.tensors:
            info = base.tensors.get(tensor.name)
            if info is not None:
                patch.change(tensor, bytearray(info.end - info.begin), info)
        return None

    def _checked(data: bytes) -> bytes:
        """The patch with the checksum that it should have, as whoever can write one would make it."""
        length = int.from_bytes(data[:8], "little")
        try:
            stated = strict_json(data[8 : 8 + length])["__metadata__"]["checksum"].encode()
            place = data.index(b'"checksum":"' + stated, 0, 8 + length) + 12
        except (ValueError, KeyError, TypeError, AttributeError):
            return data
        blank = data[:place] + b"0" * 64 + data[place + 64 :]
        return data[:place] + hashlib.sha256(blank).hexdigest().encode() + data[place + 64 :]

    return [(folder / "patch").read_bytes()], fuzz_patch


def _statistics(folder: Path) -> Prepared:
    import torch

    from memscrub.edit.disturbance import Metric
    from memscrub.edit.statistics_file import load_metrics, save_metrics

    torch.set_num_threads(1)
    key = {"checkpoint": "0" * 64, "seed": "0"}
    save_metrics(folder / "seed", key, {"m.0": Metric(torch.eye(3), torch.eye(2))})
    file = folder / "fuzzed"

    def fuzz_statistics(data: bytes) -> object:
        _write(file, data)
        return load_metrics(file, key)

    return [(folder / "seed").read_bytes()], fuzz_statistics


def _journal(folder: Path) -> Prepared:
    from memscrub.mining.journal import COUNTS, Journal, LotFound
    from memscrub.mining.stretches import Stretch
    from memscrub.texts.corpora import FileEnd

    key = {"checkpoint": "0" * 64, "limit": 16}
    stretch = Stretch(0, 1, 1, 0, 2, 4, 9, 17, False, f"{CANARY}")
    end = FileEnd(1, 0, 0, 1, (3,), None)
    lot = LotFound(False, 0, 2, dict.fromkeys(COUNTS, 1), {0: end}, (stretch,))
    with Journal(folder / "seed", key) as journal:
        journal.add(lot)
        journal.announce([b"content"])
        seed = (folder / "seed").read_bytes()
    file = folder / "fuzzed"

    def fuzz_journal(data: bytes) -> object:
        _write(file, data)
        with Journal(file, key) as found:
            return len([lot.to_dict() for lot in found.lots])

    return [seed], fuzz_journal


def _corpus(name: str, *seeds: bytes) -> Callable[[Path], Prepared]:
    def prepare(folder: Path) -> Prepared:
        file = folder / name
        given = seeds or ((_zstd(_LINES),) if name.endswith(".zst") else (_parquet_bytes(),))

        def fuzz_corpus(data: bytes) -> object:
            _write(file, data)
            (found,) = find_files([file])
            *_, end = itertools.islice(read_file(found), MOST_PIECES)
            return end.error if isinstance(end, FileEnd) else "long"

        return given, fuzz_corpus

    return prepare


def _zstd(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor().compress(data))


_JSON_LINES = mutate_lines(mutate_json)
_TOKENS = mutate_tokens(TOML_TOKENS)
_SEED_GZ = gzip.compress(_LINES, mtime=0)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("policy", _policy, _TOKENS, 50),
        Target("list-jsonl", _list("texts.jsonl", _LINES), _JSON_LINES, 50),
        Target("list-csv", _list("texts.csv", _CSV), mutate_lines(mutate_bytes), 30),
        Target("list-txt", _list("texts.txt", _TEXT), mutate_bytes, 3),
        Target("list-gz", _list("texts.jsonl.gz", _SEED_GZ), mutate_gzip(_JSON_LINES), 4),
        Target("list-parquet", _list_parquet, mutate_bytes, 60),
        Target("lm-extraction", _foreign("lm-extraction", "train_suffix.npy", _lm_extraction, "."), mutate_npy, 8),
        Target("mempi-pt", _foreign("mempi", "list.pt", _torch_file, "list.pt"), mutate_zip, 8),
        Target("mempi-jsonl", _foreign("mempi", "list.jsonl", _mempi, "list.jsonl"), _JSON_LINES, 60),
        Target("hf-splits", _foreign("hf", "dataset_dict.json", _dataset, "."), mutate_json, 60),
        Target("hf-state", _foreign("hf", "train/state.json", _dataset, "."), mutate_json, 50),
        Target("hf-arrow", _foreign("hf", "train/data-00000-of-00001.arrow", _dataset, "."), mutate_bytes, 40),
        Target("config", _checkpoint("config.json"), mutate_json, 60),
        Target("index", _checkpoint("model.safetensors.index.json"), mutate_json, 60),
        Target("safetensors", _checkpoint("shard"), mutate_safetensors, 60),
        Target("adapter-config", _adapter("adapter_config.json"), mutate_json, 30),
        Target("adapter", _adapter("adapter_model.safetensors"), mutate_safetensors, 20),
        Target("report", _report, mutate_json, 10),
        Target("model-sig", _signature("model.sig"), mutate_envelope, 40),
        Target("dsse", _signature("memscrub-report.dsse.json"), mutate_envelope, 8),
        Target("manifest", _statement("model.sig"), mutate_json, 4),
        Target("statement", _statement("memscrub-summary.dsse.json"), mutate_json, 4),
        Target("keys", _keys, mutate_bytes, 90),
        Target("patch", _patch, mutate_manifest("manifest"), 20),
        Target("statistics", _statistics, mutate_manifest("key"), 60),
        Target("journal", _journal, _JSON_LINES, 50),
        Target("corpus-txt", _corpus("c.txt", _TEXT), mutate_bytes, 4),
        Target("corpus-jsonl", _corpus("c.jsonl", _LINES), _JSON_LINES, 20),
        Target("corpus-gz", _corpus("c.jsonl.gz", _SEED_GZ), mutate_gzip(_JSON_LINES), 4),
        Target("corpus-zst", _corpus("c.jsonl.zst"), mutate_zstd(_JSON_LINES), 3),
        Target("corpus-parquet", _corpus("c.parquet"), mutate_bytes, 30),
    )
}
"""The parsers by name, in the order in which they are run."""
