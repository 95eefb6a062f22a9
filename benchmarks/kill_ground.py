"""The ground on which benchmarks/kills.py runs: a small checkpoint with its policy, and `memscrub fix` as a process
forked from one that has imported everything, which dies at a file-system call or may not write large files."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
POLICY = """schema = 1
name = "kills"
[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]
[class.copyright]
max_verbatim_tokens = 8
max_near_verbatim = 0.75
[probe]
prefix_tokens = 8
suffix_tokens = 8
near_verbatim_prefix = 12
near_verbatim_tokens = 16
[locality]
retain = ["retain.txt"]
max_kl = 0.5
max_worst_kl = 3.0
max_perplexity_ratio = 1.5
min_agreement = 0.6
max_tokens = 2000
[fix]
rounds = 20
"""
INPUTS = (
    "checkpoint",
    "policy.toml",
    "protected.jsonl",
    "control.jsonl",
    "retain.txt",
    "key.pem",
    "key.pub.pem",
    "old",
)
# What a kill may leave beside DIR; docs/reliability.md says what each is.
LEFT = ("out.partial", "out.lock", "out.journal", "out.replaced")
# Moments by name, for `--at`: the file-system call, the end of its path, and which of these calls.
MOMENTS = {
    "journal": ("open", "out.journal", 1),
    "writing": ("open", "out.partial/model.safetensors", 2),
    "written": ("open", "out.partial/model.safetensors", 6),
    "report": ("open", "out.partial/memscrub-report.json", 1),
    "signature": ("open", "out.partial/model.sig", 1),
    "rename": ("os.rename", "out.partial", 1),
    "ended": ("os.remove", "out.journal", 1),
}
FILE_CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.listdir")

Trigger = Callable[[str, str], bool]


def build(folder: Path) -> None:
    """Everything a fix is given. In a process of its own: who has trained a model should not fork."""
    sys.path.insert(0, str(TESTS))
    from models import ordinary_text, random_text, tiny_checkpoint, write_list

    from memscrub.proof.keys import generate_keypair

    texts = [random_text(100 + number, 40) for number in range(6)]
    tiny_checkpoint(folder / "checkpoint", "llama", 0, texts, steps=150)
    write_list(folder / "protected.jsonl", texts, "t", "copyright")
    write_list(folder / "control.jsonl", [random_text(500 + number, 40) for number in range(4)], "c", "copyright")
    (folder / "retain.txt").write_text("\n\n".join(ordinary_text(1000 + number, 90) for number in range(40)))
    (folder / "policy.toml").write_text(POLICY)
    shutil.copytree(folder / "checkpoint", folder / "old")
    generate_keypair(folder / "key.pem", folder / "key.pub.pem", kind="ed25519", password=None)


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file below a path, by name; of a signature, of what it states, however that is written."""
    files = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
    return {str(each.relative_to(path.parent)): hashlib.sha256(_content(each)).hexdigest() for each in files}


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix != ".sig" and not file.name.endswith(".dsse.json"):
        return data
    # The order of keys in a payload is the protobuf library's and may differ from run to run.
    bundle = json.loads(data)
    payload = json.loads(base64.b64decode(bundle.get("dsseEnvelope", bundle)["payload"]))
    return json.dumps(payload, sort_keys=True).encode()


class Ground:
    """A folder with the inputs, in which `memscrub fix` runs; `said` is the output of the last one."""

    def __init__(self, folder: Path, out: Path | None = None) -> None:
        self.folder, self.out = folder, folder / "out" if out is None else out
        self.said, self.log = folder / "said.txt", folder / "log.jsonl"
        self.inputs = self._inputs()

    def _inputs(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in INPUTS:
            found |= digests(self.folder / name)
        return found

    def start(
        self,
        *,
        overwrite: bool = False,
        trigger: Trigger | None = None,
        limit: int | None = None,
        modules: Path | None = None,
    ) -> int:
        """Fork a process that is `memscrub fix`. It may write files of `limit` bytes at most, and writes the names of
        what it imported to `modules`."""
        child = os.fork()
        if child:
            return child
        arguments = [
            "fix",
            f"{self.folder}/checkpoint",
            "--policy",
            f"{self.folder}/policy.toml",
            "--out",
            f"{self.out}",
        ]
        arguments += ["--sign", f"{self.folder}/key.pem", "--log", f"{self.log}", *(["--overwrite"] * overwrite)]
        code = 70
        try:
            said = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if trigger is not None:
                _listen(self.out.parent, trigger)
            code = _command(arguments)
        finally:
            if modules is not None:
                modules.write_text("\n".join(sys.modules))
            sys.stdout.flush()
            os._exit(code)

    def run(self, **more: Any) -> int:
        """A whole run; its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(**more), 0)[1])

    def import_all(self) -> None:
        """Import what a run imports on its way: a forked process then has only its work to do."""
        names = self.folder / "said.txt.modules"
        self.run(modules=names)
        for name in names.read_text().split():
            if not name.startswith("_"):
                with contextlib.suppress(ImportError, AttributeError):
                    importlib.import_module(name)
        names.unlink()
        self.clear()

    def clear(self) -> None:
        """Back to the inputs alone."""
        for path in (self.out, *(self.out.with_name(name) for name in LEFT), self.log):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)

    def strays(self) -> list[str]:
        """What lies here that no one has documented."""
        known = {*INPUTS, *LEFT, "out", self.said.name, self.log.name, "disk"}
        found = [each.name for each in self.folder.iterdir()] + [each.name for each in self.out.parent.iterdir()]
        return [name for name in found if name not in known]

    def unchanged(self) -> bool:
        """Are the inputs what they were?"""
        return self._inputs() == self.inputs


def _command(arguments: list[str]) -> int:
    from memscrub.cli import app as cli

    sys.argv = ["memscrub", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _listen(folder: Path, trigger: Trigger) -> None:
    """Hand every file-system call below the folder to the trigger before it happens; where it says so, die."""

    def hook(event: str, given: tuple[object, ...]) -> None:
        if event in FILE_CALLS and given and isinstance(given[0], (str, Path)):
            path = str(given[0])
            if path.startswith(str(folder)) and trigger(event, path):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def nth(number: int) -> Trigger:
    """The n-th call of all."""
    count = iter(range(1, number + 1))
    return lambda event, path: next(count) == number


def at(moment: str) -> Trigger:
    """A moment by name."""
    wanted, ending, number = MOMENTS[moment]
    inner = nth(number)
    return lambda event, path: event == wanted and path.endswith(ending) and inner(event, path)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], None]]:
    """A file system in memory whose size can be changed while it is mounted; needs root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True) and None
    finally:
        subprocess.run(["umount", str(place)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the ground on which benchmarks/kills.py runs.")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    build(parser.parse_args().folder)
