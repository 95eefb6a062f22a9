"""`memscrub verify` and `memscrub keygen` as they are typed: exit codes, sentences, 80 columns, passphrases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

from memscrub.errors import SignatureInvalidError, UsageError
from memscrub.jobs.gating import gate
from memscrub.jobs.scrub import Signing, fix
from memscrub.proof.keys import load_private_key, load_public_key
from memscrub.proof.signing import verify_directory
from memscrub.reports.report import REPORT_NAME, load_report

OLD = Path(__file__).parent / "fixtures" / "reports" / "0.1.0"
PASSWORD = "MEMSCRUB_KEY_PASSWORD"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, its signed fix `mine` with `mine.patch`, and the key pair `k.pem`, `k.pub`."""
    folder = tmp_path_factory.mktemp("verify") / "w"
    shutil.copytree(OLD, folder)
    generate(folder, "k")
    done = fix(
        folder / "base", folder / "policy.toml", folder / "mine", sign=Signing(folder / "k.pem"),
        patch=folder / "mine.patch", device="cpu",
    )  # fmt: skip
    assert done.signed
    return folder


def generate(folder: Path, name: str) -> str:
    from memscrub.proof.keys import generate_keypair

    return generate_keypair(folder / f"{name}.pem", folder / f"{name}.pub")


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    if "workshop" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("workshop"))


class Shell:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, line: str) -> tuple[int, str]:
        """The exit code of one command, and what it printed."""
        code = run(self.monkeypatch, *line.split())
        shown = self.capsys.readouterr()
        return code, shown.out + shown.err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def test_a_fix_states_its_base_policy_list_patch_seed_device_and_versions(workshop: Path) -> None:
    made_from = verify_directory("mine", "k.pub").provenance
    report = load_report(workshop / "mine" / REPORT_NAME)
    assert made_from is not None and made_from.patch is not None
    assert made_from.base == report.input.sha256 and made_from.protected == report.protected.hmac_sha256 is not None
    assert made_from.run["seed"] == "0" and made_from.run["device"] == "cpu"
    assert made_from.packages["torch"] == report.environment.torch
    assert {"memscrub", "transformers", "safetensors", "tokenizers", "numpy", "cryptography"} <= set(made_from.packages)


def test_verify_shows_what_is_proved_in_80_columns(workshop: Path, shell: Shell) -> None:
    code, shown = shell("verify mine --key k.pub --base base --patch mine.patch")
    report, key_id = load_report(workshop / "mine" / REPORT_NAME), load_public_key("k.pub").key_id
    assert code == 0 and "signature good: 6 files, signed result: PASSED" in shown
    for line in (f"key      sha256:{key_id}", f"base     sha256:{report.input.sha256}", "run      seed 0, device cpu"):
        assert line in shown
    assert report.edit is not None and f"{len(report.edit.tensors)} tensors, " in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert shell("verify mine --key k.pub --base base --quiet") == (0, "")


def test_a_directory_with_another_weight_fails_at_the_tensor(workshop: Path, shell: Shell, tmp_path: Path) -> None:
    """Signed as it is, with a report that is true of its files, and one change that no edit states."""
    from dataclasses import replace

    from memscrub.proof.signing import sign_directory
    from memscrub.storage.checkpoint import digest_files, open_checkpoint, tree_digest

    root = Path(shutil.copytree("mine", tmp_path / "m"))
    for name in ("model.sig", "memscrub-report.dsse.json", "memscrub-summary.dsse.json"):
        (root / name).unlink()
    info = open_checkpoint(root).tensors["model.embed_tokens.weight"]
    with (root / info.shard).open("r+b") as file:
        file.seek(info.begin + 5)
        file.write(b"\x11")
    report = load_report(root / REPORT_NAME)
    assert report.output is not None
    files = {name: digest for name, digest in digest_files(root).items() if name != REPORT_NAME}
    stated = replace(report, output=replace(report.output, files=files, sha256=tree_digest(files)))
    (root / REPORT_NAME).unlink()
    sign_directory(root, "k.pem")
    assert shell(f"verify {root} --key k.pub")[0] == 0
    (root / REPORT_NAME).write_text(stated.to_json())
    code, shown = shell(f"verify {root} --unsigned --base base")
    assert code == 5 and "'model.embed_tokens.weight' differs from the base's, and the report states no edit" in shown


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("verify mine", 2, "name the public key with --key or the signer with --sigstore"),
        ("verify mine --base base", 2, "or say --unsigned with --base"),
        ("verify mine --unsigned", 2, "checks the edit against --base"),
        ("verify mine --unsigned --base base --patch mine.patch", 2, "nothing that only a signature can vouch for"),
        ("verify mine --unsigned --base base --key k.pub", 2, "name the public key"),
        ("verify mine --unsigned --base base", 0, "signature not checked"),
        ("verify mine --key k.pub --key-id sha256:12", 2, "is no key id"),
        (f"verify mine --key k.pub --key-id {'0' * 64}", 5, "is the one that counts"),
        ("verify mine --key ec.pub", 5, "made with another key than ec.pub"),
        ("verify mine --key missing.pub", 2, "cannot be read"),
        ("verify base --key k.pub", 5, "carries no signature"),
        ("verify mine --key k.pub --base passed", 5, "is not the checkpoint that was edited: model.safetensors has"),
        ("verify mine --key k.pub --base nowhere", 2, "nowhere does not exist"),
        ("verify mine --key k.pub --patch policy.toml", 5, "not the patch that the signed statement names"),
        ("verify mine --key k.pub --patch nowhere", 2, "is not a file"),
        ("verify passed --key ec.pub --patch patch.safetensors", 5, "names no patch"),
        ("verify mine --key k.pub --identity a", 2, "belong to --sigstore"),
        ("verify mine --sigstore --identity a", 2, "needs --identity and --issuer"),
        ("verify mine --sigstore --identity a --issuer b --key-id 0", 2, "--key-id is for keys"),
        ("verify mine --sigstore --identity a --issuer b", 5, "made with a key pair and not with Sigstore"),
        ("keygen k.pem new.pub", 2, "k.pem exists already"),
        ("keygen new.pem new.pub --kind rsa", 2, "use ec-p256 or ed25519"),
        ("keygen new.pem new.pub --encrypt", 2, f"on a terminal; here, set {PASSWORD}"),
    ],
)
def test_bad_input_ends_with_its_code_and_one_sentence(
    workshop: Path, shell: Shell, line: str, code: int, words: str
) -> None:
    ended, shown = shell(line)
    assert ended == code and words in " ".join(shown.split()), shown
    assert shown.count("memscrub: ") == (code != 0) and "Traceback" not in shown
    assert not Path("new.pem").exists()


def test_keygen_tells_the_id_that_verify_can_pin(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = shell("keygen --kind ed25519")
    assert code == 0 and f"key id   sha256:{load_public_key('key.pub.pem').key_id}" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_policy_may_pin_the_key_for_fix_and_for_gate(workshop: Path, tmp_path: Path) -> None:
    other = generate(tmp_path, "other")
    policy = workshop / "pinned.toml"
    policy.write_text((workshop / "policy.toml").read_text() + f'[sign]\nkey_id = "sha256:{other}"\n')
    with pytest.raises(UsageError, match="asks for the key"):
        fix("base", policy, tmp_path / "out", sign=Signing(workshop / "k.pem"), device="cpu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SignatureInvalidError, match="is the one that counts"):
        gate("mine", policy, key="k.pub", device="cpu")
    policy.write_text(policy.read_text().replace(other, load_public_key("k.pub").key_id))
    assert gate("mine", policy, key="k.pub", device="cpu").report.verdict.exit_code == 0


# --- passphrases ---


def talk(folder: Path, line: str, answers: dict[str, str]) -> tuple[int, str]:
    """One command on a terminal of its own: after each prompt, its answer. Exit code and all that was shown."""
    code = (
        "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'memscrub',"
        " *sys.argv[1:]])))"
    )
    environment = {name: value for name, value in os.environ.items() if name != PASSWORD}
    with subprocess.Popen(
        [sys.executable, "-c", code, *line.split()], cwd=folder, env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        shown, waiting = b"", list(answers.items())
        while byte := process.stdout.read(1):
            shown += byte
            if waiting and shown.decode(errors="replace").endswith(waiting[0][0]):
                process.stdin.write(waiting.pop(0)[1].encode() + b"\n")
    return process.returncode, shown.decode()


def test_a_passphrase_is_asked_for_on_a_terminal_and_never_shown(tmp_path: Path) -> None:
    prompts = {"Passphrase: ": "correct horse", "confirmation: ": "correct horse"}
    code, shown = talk(tmp_path, "keygen k.pem k.pub --encrypt", prompts)
    assert code == 0 and "wrote k.pem (encrypted)" in shown and "correct horse" not in shown
    assert load_private_key(tmp_path / "k.pem", "correct horse").public.key_id in shown
    shutil.copytree(OLD, tmp_path / "w")
    line = "fix w/base -p w/policy.toml -o out --device cpu --quiet --sign k.pem"
    code, shown = talk(tmp_path, line, {"Passphrase of k.pem: ": "correct horse"})
    assert code == 0 and "correct horse" not in shown
    assert verify_directory(tmp_path / "out", tmp_path / "k.pub").result == "PASSED"


def test_without_a_terminal_the_variable_is_asked_for(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(OLD, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv(PASSWORD, "hunter2")
    assert shell("keygen k.pem k.pub")[0] == 0
    line = "fix base -p policy.toml -o out --device cpu --quiet --sign k.pem"
    monkeypatch.setenv(PASSWORD, "hunter3")
    code, shown = shell(line)
    assert code == 2 and "The passphrase of k.pem is wrong" in shown
    monkeypatch.delenv(PASSWORD)
    code, shown = shell(line)
    assert code == 2 and f"k.pem is encrypted; set {PASSWORD}" in shown
    monkeypatch.setenv(PASSWORD, "hunter2")
    assert shell(line) == (0, "")
