"""Plans of shipped deployments, each made once for all tests."""

from functools import cache

from compiler.pipeline import Compiled, compile_model
from compiler.planning.model import Subject
from compiler.planning.plan import Plan, make
from dsl.constants import Choices
from dsl.deploy.check import choose


@cache
def compiled(file: str = "dsv3") -> Compiled:
    return compile_model(file, Choices())


def subject(name: str, file: str = "dsv3") -> Subject:
    done = compiled(file)
    return Subject(done.after("elaborate"), done.program, choose(done.source, name))


@cache
def plan(name: str, file: str = "dsv3", weigh: bool = False) -> Plan:
    about = subject(name, file)
    return make(about.source, about.final, about.deployment, weigh=weigh)
