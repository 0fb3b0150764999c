"""Two hosts on one machine: network namespaces with a wire between them whose rate is limited."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = "10.78.0.{}"
MTU = "9000"
BURST = "20kb"  # what may go at once: small beside a transfer, so that the rate is what counts


class NoHosts(Exception):
    """This machine makes no network namespaces; the message says why."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces.

    Raises:
        NoHosts: not root, or no namespaces here.
    """
    if os.geteuid() != 0:
        raise NoHosts("network namespaces need root")
    names = [f"dslc-overlap-{os.getpid()}-{n}" for n in "ab"]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ends = ["eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0"]
            ip("link", "add", *ends, "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", name, "link", "set", device, "up", "mtu", MTU)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoHosts(f"no network namespaces here: {error}") from error
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def limit(names: list[str], bytes_per_second: float) -> None:
    """Let each end of the wire send so much."""
    rate = f"{bytes_per_second * 8 / 1e3:.0f}kbit"
    for name in names:
        shape = ["root", "tbf", "rate", rate, "burst", BURST, "latency", "200ms"]
        command = ["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", *shape]
        subprocess.run(command, check=True, capture_output=True)
