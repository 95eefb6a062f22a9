"""The main job as its users run it: the command line on the embedded checkpoint, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ci_runner import github

from memscrub.cli.demo import lay_out
from memscrub.policy.document import load_policy
from memscrub.storage.checkpoint import digest_files
from memscrub.texts.protected import load_protected

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """One memscrub command, output captured (so: piped)."""
    return subprocess.run(
        [sys.executable, "-m", "memscrub", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=OFFLINE,
        cwd=cwd,
        timeout=600,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after `memscrub demo`, which must end with exit code 0."""
    folder = tmp_path_factory.mktemp("main-job") / "memscrub-demo"
    done = run("demo", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout
    return folder


def test_scan_and_gate_fail_on_the_original_and_pass_on_the_fixed_directory(demo: Path) -> None:
    policy = demo / "policy.toml"
    assert run("scan", demo / "checkpoint", "--policy", policy, "--quiet").returncode == 1
    assert run("gate", demo / "checkpoint", "--policy", policy, "--quiet").returncode == 1
    passed = run("gate", demo / "scrubbed", "--policy", policy, "--key", demo / "key.pub.pem")
    assert passed.returncode == 0, passed.stderr
    assert "signature good" in passed.stderr


def test_the_github_action_is_red_on_the_original_and_green_on_the_fixed_directory(demo: Path, tmp_path: Path) -> None:
    steps = ("Gate", "Reports for people and tools", "Verdict")
    before = github(demo, tmp_path / "before", {"checkpoint": "checkpoint", "policy": "policy.toml"}, steps)
    assert not before.green and before.outputs["exit-code"] == "1", before.printed
    fixed = {"checkpoint": "scrubbed", "policy": "policy.toml", "key": "key.pub.pem"}
    after = github(demo, tmp_path / "after", fixed, steps)
    assert after.green and after.outputs["exit-code"] == "0", after.printed


def test_locality_of_the_embedded_checkpoint_is_as_good_as_promised(demo: Path) -> None:
    locality = json.loads((demo / "scrubbed" / "memscrub-report.json").read_text())["locality"]
    assert locality["kl"] <= 0.002
    assert locality["agreement"] >= 0.97


def test_plain_transformers_confirms_what_the_report_says(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = json.loads((demo / "scrubbed" / "memscrub-report.json").read_text())
    stated = {text["id"]: text for text in report["texts"]}
    texts = list(load_protected(load_policy(demo / "policy.toml")))
    limit = 16
    for folder, key in ((demo / "checkpoint", "before"), (demo / "scrubbed", "after")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for text in texts[::10]:
            ids = [tokenizer.bos_token_id, *tokenizer(text.text, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                match = model(torch.tensor([ids])).logits[0, :-1].argmax(-1) == torch.tensor(ids[1:])
            longest = run_length = 0
            for known in match.tolist()[1:]:
                run_length = run_length + 1 if known else 0
                longest = max(longest, run_length)
            assert longest == stated[text.id][key]["match_run"]
            if key == "after" and text.class_name == "copyright":
                assert longest <= limit
                begin = stated[text.id][key]["run_begin"]
                out = model.generate(
                    torch.tensor([ids[:begin]]), max_new_tokens=limit + 1, do_sample=False, pad_token_id=0
                )[0, begin:].tolist()
                assert out != ids[begin : begin + limit + 1]


def test_only_planned_tensors_differ_and_the_input_is_untouched(demo: Path) -> None:
    from safetensors import safe_open

    report = json.loads((demo / "scrubbed" / "memscrub-report.json").read_text())
    assert digest_files(demo / "checkpoint") == report["input"]["files"]
    planned = {tensor["name"] for tensor in report["edit"]["tensors"]}
    with (
        safe_open(demo / "checkpoint/model.safetensors", "pt") as before,
        safe_open(demo / "scrubbed/model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        names = set(before.keys())
        changed = {name for name in names if not torch.equal(before.get_tensor(name), after.get_tensor(name))}
    assert changed == planned


def test_no_report_or_output_repeats_a_protected_text(demo: Path, tmp_path: Path) -> None:
    scanned = run("scan", demo / "checkpoint", "--policy", demo / "policy.toml", "--report", tmp_path / "r.json")
    said = scanned.stdout + scanned.stderr + (tmp_path / "r.json").read_text()
    said += (demo / "scrubbed" / "memscrub-report.json").read_text()
    for text in load_protected(load_policy(demo / "policy.toml")):
        words = text.text.split()
        assert not any(" ".join(words[i : i + 4]) in said for i in range(len(words) - 3)), text.id
        assert not any(text.text[begin:end] in said for begin, end in text.secrets if end - begin > 5), text.id


def test_json_and_report_file_hold_the_same_report_and_piped_output_has_no_escapes(demo: Path, tmp_path: Path) -> None:
    done = run("scan", demo / "checkpoint", "--policy", demo / "policy.toml", "--json", "--report", tmp_path / "r.json")
    assert json.loads(done.stdout)["texts"] == json.loads((tmp_path / "r.json").read_text())["texts"]
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode == json.loads(done.stdout)["verdict"]["exit_code"] == 1


@pytest.mark.parametrize(
    "what", ["model.safetensors", "memscrub-report.json", "model.sig", "memscrub-report.dsse.json"]
)
def test_verify_and_gate_exit_5_after_one_byte_changed(demo: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "scrubbed"
    shutil.copytree(demo / "scrubbed", copy)
    data = bytearray((copy / what).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / what).write_bytes(data)
    assert run("verify", copy, "--key", demo / "key.pub.pem").returncode == 5
    assert run("gate", copy, "--policy", demo / "policy.toml", "--key", demo / "key.pub.pem").returncode == 5


def test_verify_exits_5_for_an_added_file_and_the_wrong_key(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "scrubbed"
    shutil.copytree(demo / "scrubbed", copy)
    assert run("verify", copy, "--key", demo / "key.pub.pem").returncode == 0
    run("keygen", tmp_path / "other.pem", tmp_path / "other.pub")
    assert run("verify", copy, "--key", tmp_path / "other.pub").returncode == 5
    (copy / "extra.txt").write_text("added")
    assert run("verify", copy, "--key", demo / "key.pub.pem").returncode == 5


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_in_the_middle_leaves_no_directory(tmp_path: Path, blow: signal.Signals) -> None:
    folder = tmp_path / "work"
    lay_out(folder)
    before = digest_files(folder / "checkpoint")
    command = ["fix", str(folder / "checkpoint"), "--policy", str(folder / "policy.toml"), "--out", str(folder / "out")]
    child = subprocess.Popen(
        [sys.executable, "-m", "memscrub", *command], stderr=subprocess.PIPE, text=True, env=OFFLINE
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "retain statistics" in line:
            break
    time.sleep(0.5)
    child.send_signal(blow)
    _, said = child.communicate(timeout=60)
    code = child.returncode
    assert not (folder / "out").exists()
    assert digest_files(folder / "checkpoint") == before
    if blow != signal.SIGKILL:
        assert code == 3 and "interrupted" in said and "Traceback" not in said
        assert not (folder / "out.partial").exists()


def test_a_fix_out_of_reach_exits_4_and_withholds_the_directory(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    lay_out(folder)
    policy = (folder / "policy.toml").read_text().replace("max_kl = 0.01", "max_kl = 1e-9")
    policy = policy.replace("max_tokens = 40_000", "max_tokens = 4_000")
    (folder / "policy.toml").write_text(policy + "[fix]\nrounds = 2\n")
    protected = folder / "protected.jsonl"  # a few texts are enough to find no room
    protected.write_text("".join(protected.read_text().splitlines(keepends=True)[:8]))
    done = run(
        "fix", folder / "checkpoint", "--policy", folder / "policy.toml", "--out", folder / "out",
        "--report", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert not (folder / "out").exists()
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["outcome"] == "unreachable"


BAD = {
    "unknown key": ("policy.toml", "max_near_verbatim = 0.60\n", "max_near_verbatin = 0.60\n", "max_near_verbatim"),
    "wrong type": ("policy.toml", "max_verbatim_tokens = 16", 'max_verbatim_tokens = "16"', "max_verbatim_tokens"),
    "no such file": ("policy.toml", '"retain.txt"', '"retained.txt"', "retained.txt"),
    "missing class": ("protected.jsonl", '"class": "pii"', '"class": "pij"', "pii"),
    "empty list": ("protected.jsonl", None, "", "protected.jsonl"),
    "bad utf-8": ("protected.jsonl", None, b"\xff\xfe{}", "UTF-8"),
    "secret outside": ("protected.jsonl", None, '{"id": "a", "class": "pii", "text": "abc", "secret": [[1, 9]]}', ":1"),
    "no family": ("checkpoint/config.json", '"llama"', '"lama"', "architecture table"),
    "truncated shard": ("checkpoint/model.safetensors", None, b"\x00" * 100, "model.safetensors"),
    "not json": ("checkpoint/config.json", None, "{", "config.json"),
    "no weights": ("checkpoint/model.safetensors", "delete", "", "safetensors"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_gives_one_sentence_exit_2_and_writes_nothing(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    lay_out(folder)
    name, old, new, expected = BAD[case]
    path = folder / name
    if old == "delete":
        path.unlink()
    elif isinstance(new, bytes):
        path.write_bytes(new)
    elif old is None:
        path.write_text(new)
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    done = run("fix", folder / "checkpoint", "--policy", folder / "policy.toml", "--out", folder / "out")
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()


@pytest.mark.parametrize(
    "arguments", [["scan"], ["scan", "x"], ["frobnicate"], ["fix", "x", "--policy"], ["verify", "x"]]
)
def test_a_wrong_command_line_exits_2_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_readme_commands_run_as_written(demo: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("<!-- tested -->")
    block = rest.split("```bash\n", 1)[1].split("```", 1)[0]
    assert "memscrub gate" in block
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=demo.parent, env={**OFFLINE, "PATH": path}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
