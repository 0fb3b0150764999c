"""However a rank fails, the job ends within 30 s, non-zero, with one message that names it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from meshes import compiled
from ranks import launch

import dslc
from backends.pytorch import ranks
from dslc.program import compile_file

HERE = Path(__file__).parent
ENDLESS = ["--tokens", "1,2,3", "--max-new-tokens", "100000"]
SHORT = ["--tokens", "1,2,3", "--max-new-tokens", "2"]
RANK = r"rank {} \([\w.-]+, process \d+\)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    compiled(folder, "ep2")
    compiled(folder, "turns2")
    return folder


def started(arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=f"{HERE.parent.parent}", TORCH_CPP_LOG_LEVEL="FATAL"),
    )


def torchrun(nproc, *arguments):
    given = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return started([*given, str(HERE / "one_differs.py"), *map(str, arguments)])


def ended(job, within):
    """Status, and what it said itself, without torchrun's own report."""
    begun = time.monotonic()
    _, err = job.communicate(timeout=120)
    assert time.monotonic() - begun < within
    return job.returncode, [line for line in err.splitlines() if line.startswith("error:")], err


def workers(job, count):
    """The process of each rank, once all of them work."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                about = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(about[1]) == job.pid and int(about[17]) >= 6:  # parent; threads: it is up
                    text = (folder / "environ").read_bytes().decode(errors="replace")
                    found[int(re.search(r"(?:^|\0)RANK=(\d+)", text)[1])] = int(folder.name)
            except (OSError, ValueError, IndexError, TypeError):
                continue
        if len(found) == count:
            time.sleep(1)
            return found
        time.sleep(0.1)
    raise AssertionError("the ranks did not come up")


@pytest.mark.parametrize(
    ("name", "number", "victim", "message"),
    [
        ("ep2", signal.SIGKILL, 1, r"error: rank 1 \(process \d+\) was ended by SIGKILL"),
        ("turns2", signal.SIGKILL, 0, r"error: rank 0 \(process \d+\) was ended by SIGKILL"),
        ("turns2", signal.SIGSTOP, 0, rf"error: {RANK.format(0)} was stopped, and is ended"),
    ],
)
def test_a_rank_that_dies_or_is_stopped(folder, name, number, victim, message):
    """With two micro-batches, while transfers are in flight."""
    prompts = ["--tokens", "4,5", "--tokens", "6", "--tokens", "7,8"]
    job = started(["-m", "dslc", "run", str(folder / name), "--nproc", "2", *prompts, *ENDLESS])
    os.kill(workers(job, 2)[victim], number)
    status, said, err = ended(job, within=30)
    assert status == 1
    assert len(said) == 1 and re.fullmatch(message, said[0]), err
    assert err.strip() == said[0]


def test_the_rank_that_keeps_the_store_waits_until_all_have_read(tmp_path):
    """Rank 0 ends as soon as it has compared: before rank 2 has, if nothing held it."""
    launch(tmp_path, ("late.compares", "late", 3))


def test_ranks_end_with_their_launcher(folder):
    job = started(["-m", "dslc", "run", str(folder / "ep2"), "--nproc", "2", *ENDLESS])
    ranks = workers(job, 2)
    job.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in ranks.values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "as the process that launched it is gone" in job.communicate()[1]


def test_a_rank_that_raises(folder):
    job = torchrun(2, "raises", "-", "run", folder / "ep2", *ENDLESS)
    status, said, err = ended(job, within=100)
    assert status == 1
    assert len(said) == 1, err
    assert re.fullmatch(rf"error: {RANK.format(1)}: ValueError: a fuse has blown", said[0])


def write(folder, tensors):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("what", ["directory", "--checkpoint", "--tokens"])
def test_ranks_that_run_something_else(folder, what):
    other = folder / "other"
    if what == "directory":
        from meshes import SIZES, source

        compile_file(str(source(folder)), set={**SIZES, "routed_scale": 2.0}, deploy="ep2").save(
            other
        )
        job = torchrun(2, what, other, "run", folder / "ep2", *SHORT)
        problem = r"set of dims than rank 0 \([\w.-]+\): routed_scale 2.0 and 2.5"
    elif what == "--tokens":
        job = torchrun(2, what, "1,2,4", "run", folder / "ep2", *SHORT)
        problem = r"prompt than rank 0 \([\w.-]+\): \['1,2,4'\] and \['1,2,3'\]"
    else:
        for name, seed in (("one", 1), ("two", 2)):
            if not (folder / name).exists():
                model = dslc.load(compiled(folder, None), seed=seed)
                write(folder / name, model.state_dict())
        given = ["--checkpoint", folder / "one", *SHORT]
        job = torchrun(2, what, folder / "two", "run", folder / "ep2", *given)
        problem = r"checkpoint than rank 0 \([\w.-]+\): \w{12} and \w{12}"
    status, said, err = ended(job, within=100)
    assert status == 1 and len(said) == 1, err
    assert re.fullmatch(rf"error: {RANK.format('.')}: rank 1 \([\w.-]+\) has another {problem}",
                        said[0])  # fmt: skip


def test_a_rank_whose_checkpoint_is_missing(folder):
    if not (folder / "one").exists():
        write(folder / "one", dslc.load(compiled(folder, None), seed=1).state_dict())
    given = ["--checkpoint", folder / "one", *SHORT]
    job = torchrun(2, "--checkpoint", folder / "nowhere", "run", folder / "ep2", *given)
    status, said, err = ended(job, within=100)
    assert status == 1 and len(said) == 1, err
    message = rf"there is no checkpoint folder {folder / 'nowhere'}"
    assert re.fullmatch(rf"error: {RANK.format(1)}: {message}", said[0]), err


def test_a_rank_whose_directory_is_missing(folder):
    job = torchrun(2, "directory", folder / "nowhere", "run", folder / "ep2", *SHORT)
    status, said, err = ended(job, within=100)
    assert status == 1 and len(said) == 1, err
    message = rf"{folder / 'nowhere'} is not a compiled model: there is no such directory"
    assert re.fullmatch(rf"error: {RANK.format(1)}: {message}", said[0]), err


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"RANK": "x"}, "RANK is 'x', which is no number; torchrun sets it"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2: ranks are 0 .. 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', which is no number; torchrun sets it"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', which is no number; torchrun sets it"),
        ({"MASTER_PORT": "0"},
         "MASTER_PORT does not say at which port processes meet; torchrun sets it"),
        ({"MASTER_ADDR": ""},
         "MASTER_ADDR does not say on which host processes meet; torchrun sets it"),
        ({"MASTER_ADDR": "node-17"},
         "MASTER_ADDR is 'node-17', and no such host is known: Name or service not known"),
    ],
)  # fmt: skip
def test_what_a_launcher_may_have_got_wrong(folder, monkeypatch, setting, message):
    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name, value in {**LAUNCHED, **setting}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "NAMED", timedelta(0))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(dslc.UserError) as error:
        dslc.load(folder / "ep2")
    assert str(error.value) == message


def test_a_port_that_is_in_use(folder, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {**LAUNCHED, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(dslc.UserError) as error:
            dslc.load(folder / "ep2")
    said = f"the job's store at 127.0.0.1:{port} cannot be opened: The server socket has failed"
    assert str(error.value).startswith(said)


def test_a_mesh_that_the_world_does_not_fit(folder):
    message = "deployment 'ep2' has 2 ranks (ep = 2), and {} there: dslc run --nproc 2, or torchrun"
    job = started(["-m", "dslc", "run", str(folder / "ep2"), "--nproc", "3", *SHORT])
    assert ended(job, 100)[:2] == (1, ["error: " + message.format("3 processes are")])
    job = started(["-m", "dslc", "run", str(folder / "ep2"), *SHORT])
    assert ended(job, 100)[:2] == (1, ["error: " + message.format("1 process is")])
    job = torchrun(1, "same", "-", "run", folder / "ep2", *SHORT)
    status, said, err = ended(job, 100)
    assert status == 1 and len(said) == 1, err
    assert said[0].endswith(message.format("1 process is"))
