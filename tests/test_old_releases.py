"""What earlier versions signed and wrote verifies for ever: fixtures made by tests/fixtures/reports/make.py.

`today` is what this version makes, so that a fixture can be made of it when it is released.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.reports.make import make

from memscrub.jobs.gating import gate
from memscrub.policy.document import load_policy
from memscrub.proof.edit_ledger import check_edit
from memscrub.proof.signing import verify_directory
from memscrub.reports.basis import settings_digest
from memscrub.reports.report import REPORT_NAME, load_report
from memscrub.storage.checkpoint import digest_files, open_checkpoint
from memscrub.storage.patch import open_patch
from memscrub.storage.patch_files import apply_patch, revert_patch

REPORTS = Path(__file__).parent / "fixtures" / "reports"
RELEASES = sorted(path.name for path in REPORTS.iterdir() if (path / "passed").is_dir())


@pytest.fixture(scope="module", params=[*RELEASES, "today"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param != "today":
        return REPORTS / str(request.param)
    folder = tmp_path_factory.mktemp("releases") / "today"
    make(folder)
    return folder


def test_the_first_release_is_among_them() -> None:
    assert "0.1.0" in RELEASES


@pytest.mark.parametrize(("kind", "key", "result"), [("passed", "ec", "PASSED"), ("failed", "ed25519", "FAILED")])
def test_its_signed_directories_verify(release: Path, kind: str, key: str, result: str) -> None:
    found = verify_directory(release / kind, release / f"{key}.pub")
    assert found.result == result and REPORT_NAME in found.files
    assert check_edit(release / kind, release / "base", files=found.files).base_sha256


def test_its_reports_load_with_what_they_say(release: Path) -> None:
    fixed = load_report(release / "passed" / REPORT_NAME)
    assert (fixed.kind, fixed.verdict.exit_code, len(fixed.texts)) == ("fix", 0, 2)
    assert fixed.edit is not None and fixed.edit.tensors and fixed.input.files == digest_files(release / "base")
    assert load_report(release / "failed" / REPORT_NAME).verdict.exit_code == 4
    assert [load_report(release / f"{kind}.json").kind for kind in ("scan", "gate")] == ["scan", "gate"]


def test_its_measures_are_trusted_where_they_mean_what_this_version_measures(release: Path) -> None:
    """Else the directory is measured, and passes all the same."""
    stated = load_report(release / "passed" / REPORT_NAME).basis
    same = stated is not None and stated.settings_sha256 == settings_digest(load_policy(release / "policy.toml"))
    assert same or release.parent == REPORTS
    found = gate(release / "passed", release / "policy.toml", key=release / "ec.pub", device="cpu")
    assert (found.report.trusted is not None) is same and found.report.verdict.exit_code == 0
    assert ("measured again" in found.remarks[0]) is not same


def test_its_patch_leads_there_and_back(release: Path, tmp_path: Path) -> None:
    patch = open_patch(release / "patch.safetensors")
    apply_patch(open_checkpoint(release / "base"), patch, tmp_path / "there")
    scrubbed = "model.safetensors"
    assert (tmp_path / "there" / scrubbed).read_bytes() == (release / "passed" / scrubbed).read_bytes()
    revert_patch(open_checkpoint(release / "passed"), patch, tmp_path / "back")
    assert digest_files(tmp_path / "back") == digest_files(release / "base")
