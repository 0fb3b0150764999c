"""docs/checkpoints.md tells what is said of each kind of broken checkpoint, word for word."""

from pathlib import Path

import pytest
from small import weights, write
from test_checkpoint import FILES, SCALES, TENSORS, complaint, edited, scales

DOC = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def made(group: str, kind: str, tmp_path: Path) -> Path:
    if group == "tensor":
        return edited(tmp_path, TENSORS[kind][0])
    if group == "scales":
        return scales(SCALES[kind][0])(tmp_path)
    folder = write(tmp_path / "c", weights())
    FILES[kind][0](folder)
    return folder


KINDS = [
    *(("tensor", kind) for kind in TENSORS),
    *(("scales", kind) for kind in SCALES),
    *(("file", kind) for kind in FILES if FILES[kind][1] is not None),
]


@pytest.mark.parametrize(("group", "kind"), KINDS)
def test_the_message_stands_in_the_docs(tmp_path, group, kind):
    lines = complaint(made(group, kind, tmp_path)).splitlines()
    told = lines[1 if len(lines) > 1 else 0].strip()
    assert f"| `{told}` |" in DOC
    assert len(KINDS) > 30


if __name__ == "__main__":  # the rows, for the docs
    import tempfile

    for group, kind in KINDS:
        lines = complaint(made(group, kind, Path(tempfile.mkdtemp()))).splitlines()
        print(f"| {kind} | `{lines[1 if len(lines) > 1 else 0].strip()}` |")
