"""Two processes with different code are told apart, by file and by version."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from cluster.faults import RunError
from cluster.handshake import compare, fingerprint


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "parcel"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "a.py", "inner/b.py"):
        (folder / name).write_text(f"NAME = {name!r}\n")
    (folder / "notes.txt").write_text("not code")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_fingerprint_covers_the_sources_by_relative_name_and_the_versions(package: Path) -> None:
    found = fingerprint(["parcel"])
    assert sorted(found.files) == ["parcel/__init__.py", "parcel/a.py", "parcel/inner/b.py"]
    assert found.versions["ray"] == metadata.version("ray")
    compare(found, fingerprint(["parcel"]), "rollout[0]")  # equal: no error


def test_a_changed_file_is_named(package: Path) -> None:
    driver = fingerprint(["parcel"])
    (package / "inner" / "b.py").write_text("NAME = 'changed'\n")
    with pytest.raises(RunError) as caught:
        compare(driver, fingerprint(["parcel"]), "rollout[0]")
    assert str(caught.value) == (
        "rollout[0] failed during 'handshake': it imports another copy of parcel than the driver, or one edited since "
        "the run began "
        "(different: parcel/inner/b.py). "
        "Submit the run as a Ray job, which ships the working directory, or install the same copy on every node."
    )


def test_a_missing_package_is_named(package: Path) -> None:
    driver = fingerprint(["parcel", "cluster"])
    with pytest.raises(
        RunError,
        match=r"another copy of parcel than the driver, .* \(different: parcel/__init__.py, parcel/a.py, "
        r"parcel/inner/b.py\)",
    ):
        compare(driver, fingerprint(["cluster"]), "rollout[0]")


def test_different_versions_are_named_on_both_sides() -> None:
    driver = replace(fingerprint([]), versions={"ray": "2.60.0", "torch": "2.13.0", "pyarrow": "26.0.0"})
    worker = replace(driver, versions={"ray": "2.60.0", "torch": "2.12.1", "pyarrow": ""}, python="3.12.1")
    with pytest.raises(RunError) as caught:
        compare(driver, worker, "critic[3]")
    assert str(caught.value) == (
        "critic[3] failed during 'handshake': its node has other versions than the driver: "
        f"python is 3.12.1 there, {driver.python} here; torch is 2.12.1 there, 2.13.0 here; pyarrow is missing there, "
        "26.0.0 here. "
        "Install the same versions on every node."
    )


def test_builds_of_one_release_are_equal_and_of_two_are_not() -> None:
    driver = replace(fingerprint([]), versions={"torch": "2.13.0+cpu", "ray": "2.60.0"})
    for build in ("2.13.0", "2.13.0+cpu", "2.13.0+cu130"):
        compare(driver, replace(driver, versions={"torch": build, "ray": "2.60.0"}), "policy[0]")
    with pytest.raises(RunError, match=re.escape("torch is 2.13.1+cpu there, 2.13.0+cpu here")):
        compare(driver, replace(driver, versions={"torch": "2.13.1+cpu", "ray": "2.60.0"}), "policy[0]")
