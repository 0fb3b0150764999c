"""Two hosts made of network namespaces: the same results, and an end when the network is cut."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from meshes import compiled

ROOT = Path(__file__).parent.parent.parent
RUN = ["--tokens", "1,2,3", "--tokens", "5", "--max-new-tokens"]


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces with an address each, a wire between them."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"dslc-{os.getpid()}-{n}" for n in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ends = ["eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0"]
        ip("link", "add", *ends, "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    for name in ("ep4", None):
        compiled(folder, name)
    return folder


def launched(host, number, directory, new_tokens):
    """The command of the README on one of the hosts, with two ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    torchrun += [f"--node-rank={number}", "--nproc-per-node=2"]
    torchrun += ["--master-addr=10.77.0.1", "--master-port=29500", "-m", "dslc", "run"]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *torchrun, str(directory), *RUN, str(new_tokens)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="eth0"),
    )


def test_two_hosts_give_what_one_process_gives(hosts, folder):
    jobs = [launched(host, n, folder / "ep4", 5) for n, host in enumerate(hosts)]
    printed = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    alone = subprocess.run(
        [sys.executable, "-m", "dslc", "run", str(folder / "single"), *RUN, "5"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert printed[0][0] == alone.stdout
    assert printed[1][0] == "", "rank 0 prints"


def test_a_network_that_is_cut_ends_the_job_on_both_hosts(hosts, folder):
    jobs = [launched(host, n, folder / "ep4", 100000) for n, host in enumerate(hosts)]
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:  # until ranks of both hosts talk to each other
        listed = subprocess.run(
            ["ip", "netns", "exec", hosts[1], "cat", "/proc/net/tcp"],
            capture_output=True,
            text=True,
        ).stdout
        if sum(" 01 " in line and "01004D0A" in line for line in listed.splitlines()) >= 8:
            break
        time.sleep(0.2)
    time.sleep(2)
    ip("-n", hosts[1], "link", "set", "eth0", "down")
    begun = time.monotonic()
    errors = [job.communicate(timeout=100)[1] for job in jobs]
    assert time.monotonic() - begun < 30
    assert all(job.returncode for job in jobs)
    said = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    assert said and any("rank" in line for line in said), errors
    assert all("sign of life" in line or "cannot reach" in line for line in said), said
