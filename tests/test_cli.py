"""The command: what it prints, where, and how it ends."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dslc
from dslc import cli, terminal, transcript
from dslc.commands import models as models_command
from pytorch.small import SIZES, compiled, model, prompts, weights, write

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [f"--set={name}={value}" for name, value in SIZES.items()]
WRONG = """\
edition 2026

block Half[d] {
  param gain[d]
  def (x[d]) -> y[d] {
    y[d] = gian[d] * x[d]
  }
}
"""


class Result:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = cli.run([str(a) for a in arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(status, out, err)

    return run


# -- in general -----------------------------------------------------------------------------------


def test_misuse_ends_with_status_2(run):
    for wrong in (
        [],
        ["bake"],
        ["check"],
        ["run", "x"],
        ["compile", "dsv3", "--set", "layers"],
        ["inspect", "dsv3", "--sequence", "0"],
    ):
        result = run(*wrong)
        assert result.status == 2 and result.err.startswith("usage: dslc") and not result.out


@pytest.mark.parametrize("command", ["check", "inspect", "compile"])
def test_a_file_that_is_not_there(run, command):
    result = run(command, "dsv4")
    assert result.status == 2 and not result.out
    assert "there is no file dsv4" in result.err and "did you mean 'dsv3'?" in result.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.status == 0 and f"usage: dslc {command}" in result.out


def test_version(run):
    assert run("--version").out == f"dslc {dslc.__version__}\n"


def test_internal_errors_are_one_message_unless_debugged(run, monkeypatch):
    def broken(_: object) -> int:
        raise RuntimeError("a cog is loose")

    monkeypatch.setattr(models_command, "run", broken)
    result = run("models")
    assert result.status == 1
    assert result.err.splitlines()[0] == "error: RuntimeError: a cog is loose"
    for arguments in (["models", "--debug"], ["--debug", "models"]):
        with pytest.raises(RuntimeError):
            run(*arguments)


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dslc", "inspect", "dsv3"],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    os.close(writing)
    assert done.stderr == ""


# -- check, inspect, models -----------------------------------------------------------------------


def test_check(run, tmp_path):
    result = run("check", "dsv3", ROOT / "models" / "dsv3.arch")
    assert (result.status, result.err) == (0, "") and "no mistakes" in result.out
    (tmp_path / "wrong.arch").write_text(WRONG)
    result = run("check", "dsv3", "wrong.arch")
    assert result.status == 1 and not result.out
    assert "wrong.arch:6:12" in result.err and "did you mean 'gain'?" in result.err


def test_check_json(run, tmp_path):
    (tmp_path / "wrong.arch").write_text(WRONG)
    result = run("check", "wrong.arch", "--json")
    [found] = result.json["diagnostics"]
    assert result.status == 1 and not result.err
    assert (found["file"], found["line"], found["column"]) == ("wrong.arch", 6, 12)
    assert found["code"].startswith("E") and "gian" in found["message"]
    assert run("check", "dsv3", "--json").json == {"diagnostics": []}


def test_check_at_the_sizes_of_a_preset(run, tmp_path):
    """A deployment may be written for a preset that is not the default."""
    (tmp_path / "sized.arch").write_text(
        "import dsv3\n"
        "deploy two of DeepSeekV3 { mesh pp = 2  stages pp : layers 0 .. 80 as (40 x 2) }\n"
    )
    found = run("check", "sized.arch")
    assert found.status == 1 and "'layers' ends before layer 61" in found.err
    assert "at these sizes 'layers' has layers 0 .. 61; another preset may be meant" in found.err
    assert run("check", "sized.arch", "--set", "layers=80").status == 0
    result = run("check", "sized.arch", "--dims", "smal")
    assert result.status == 1 and "no preset is called 'smal'" in result.err


def test_inspect_json_has_the_published_numbers(run):
    result = run("inspect", "dsv3", "--json")
    found = result.json
    assert not result.err and found["model"] == "DeepSeekV3"
    assert found["parameters"] == {
        "total": 671_026_404_352,
        "activated": 36_625_603_584,
        "mtp": 11_610_067_968,
    }
    assert found["kv_cache"] == {"bytes_per_token": 70_272}
    assert found["flops"]["sequence"] == 4096
    assert abs(found["flops"]["training_per_token"] - 250e9) < 2.5e9
    keys = {"path", "block", "count", "parameters", "activated", "flops", "span"}
    assert all(row.keys() == keys for row in found["blocks"])


def test_inspect_counts_states_per_sequence(run):
    found = run("inspect", "qwen3_next", "--json").json
    assert found["kv_cache"] == {"bytes_per_token": 24_576, "bytes_per_sequence": 77_266_944}
    assert "  state per sequence" in run("inspect", "qwen3_next").out
    assert "  state per sequence" not in run("inspect", "qwen3_moe").out


def test_inspect_counts_at_a_length_that_the_model_has(run):
    short = ("inspect", "llama3", "--set", "max_positions=64", "--set", "rope_kind=default")
    assert run(*short, "--json").json["flops"]["sequence"] == 64
    assert run(*short, "--sequence", 100, "--json").json["flops"]["sequence"] == 100


def test_optimize_says_which_line_it_does_not_compile(run):
    result = run("compile", "qwen3_next", "--dims", "small", "--optimize", "-o", "never")
    assert result.status == 1
    assert result.err == (
        "error: models/qwen3_next.arch:85: this is a history that is read at another token, which "
        "--optimize does not compile yet: without it the model decodes through model.py\n"
    )


def test_inspect_for_people(run):
    result = run("inspect", "dsv3", "--dims", "small", "--sequence", 128)
    assert re.search(r"longest sequence +163,840 positions\n", result.out)
    assert "cache per token, BF16" in result.out and "      expert[0..16] " in result.out
    assert "…" not in result.out  # nothing is cut off in a pipe


def test_settings_go_by_name_or_config_key(run):
    a = run("inspect", "dsv3", "--set", "layers=4", "--set", "norm_eps=1e-5", "--json")
    b = run("inspect", "dsv3", "--set", "num_hidden_layers=4", "--json")
    assert a.json["parameters"] == b.json["parameters"]
    assert a.json["parameters"]["total"] < 671_026_404_352
    wrong = run("inspect", "dsv3", "--set", "layerz=4")
    assert wrong.status == 1 and "did you mean 'layers'?" in wrong.err
    wrong = run("inspect", "dsv3", "--dims", "smal")
    assert wrong.status == 1 and "did you mean 'small'?" in wrong.err


def test_models(run):
    [row] = [r for r in run("models", "--json").json["models"] if r["name"] == "dsv3"]
    assert row["parameters"] == 671_026_404_352 and "small" in row["presets"]
    assert "dsv3" in run("models").out


# -- compile --------------------------------------------------------------------------------------


def test_compile_writes_a_directory_named_after_the_file(run, tmp_path):
    result = run("compile", "dsv3", *SETTINGS)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("build/dsv3: DeepSeekV3, ")
    assert (tmp_path / "build" / "dsv3" / "model.py").exists()
    other = run("compile", ROOT / "models" / "dsv3.arch", *SETTINGS, "-o", "x/y", "--json")
    assert other.json["directory"] == "x/y"
    names = ["model.py", "graph.txt", "source.txt"]
    same = [(tmp_path / "x/y" / n).read_text() for n in names]
    assert same == [(tmp_path / "build/dsv3" / n).read_text() for n in names]


def test_compile_takes_the_dims_from_a_checkpoint(run, tmp_path):
    config = {"hidden_size": 12, "vocab_size": 9}
    write(tmp_path / "c", {}, **config)
    result = run("compile", "dsv3", "--checkpoint", "c", "-o", "out")
    assert result.status == 1 and "config.json has no num_hidden_layers" in result.err
    assert not (tmp_path / "out").exists()
    for path, message in (("nothing", "there is no checkpoint folder nothing"), (".", "cannot be")):
        result = run("compile", "dsv3", "--checkpoint", path)
        assert result.status == 1 and message in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--emit", "pytorch", "--after", "order"),
            "--after says which graph is printed, and --emit pytorch prints none",
        ),
        (("--emit", "graph", "--json"), "--json tells what was written; --emit prints text"),
        (("--after", "order", "--json"), "--json tells what was written; --emit prints text"),
    ],
)
def test_options_of_emit_that_would_be_ignored_are_refused(run, options, said):
    result = run("compile", "dsv3", *SETTINGS, *options)
    assert result.status == 1
    assert result.out == ""
    assert result.err.startswith(f"error: {said}")


def test_emit_prints_and_writes_nothing(run, tmp_path):
    graph = run("compile", "dsv3", *SETTINGS, "--emit", "graph")
    assert graph.out.startswith("program DeepSeekV3")
    first = run("compile", "dsv3", *SETTINGS, "--emit", "graph", "--after", "elaborate")
    assert first.out.startswith("program DeepSeekV3") and first.out != graph.out
    assert run("compile", "dsv3", *SETTINGS, "--after", "elaborate").out == first.out
    code = run("compile", "dsv3", *SETTINGS, "--emit", "pytorch").out
    compile(code, "model.py", "exec")
    assert list(tmp_path.iterdir()) == []
    wrong = run("compile", "dsv3", "--after", "elaborat")
    assert wrong.status == 1 and "did you mean 'elaborate'?" in wrong.err


@pytest.mark.parametrize(
    "option",
    [
        ["--emit", "triton"],
        ["--dialect", "linalg"],
        ["--target", "sm_7"],
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_message(run, option, tmp_path):
    result = run("compile", "dsv3", *option)
    assert result.status == 1 and len(result.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_others_wrote_is_not_replaced(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    result = run("compile", "dsv3", *SETTINGS, "-o", "mine")
    assert result.status == 1 and "files that dslc did not write (thesis.tex)" in result.err


def test_check_and_compile_import_no_torch():
    code = (
        "import sys; from dslc.cli import run; "
        "assert run(['check', 'dsv3']) == 0 and 'networkx' not in sys.modules; "
        "assert run(['compile', 'dsv3', '--dims', 'small', '--emit', 'pytorch']) == 0; "
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- run ------------------------------------------------------------------------------------------


def test_run_prints_the_tokens(run):
    first, second = prompts(1, 5)[0].tolist(), prompts(1, 3, seed=1)[0].tolist()
    given = [f"--tokens={','.join(map(str, p))}" for p in (first, second)]
    result = run("run", compiled(), *given, "--max-new-tokens", 4, "--json")
    found = result.json
    assert found.keys() == {"tokens", "text", "timing"} and found["text"] is None
    assert found["timing"]["prefill_tokens_per_second"] > 0
    assert found["timing"]["decode_tokens_per_second"] > 0
    for prompt, sequence in zip((first, second), found["tokens"], strict=True):
        assert len(sequence) == len(prompt) + 4 and sequence[: len(prompt)] == prompt
    lines = run("run", compiled(), *given, "--max-new-tokens", 4).out.splitlines()
    assert lines == [",".join(map(str, sequence)) for sequence in found["tokens"]]
    alone = run("run", compiled(), given[0], "--max-new-tokens", 4)
    assert alone.out.splitlines() == lines[:1]
    assert alone.err == "note: weights are random, as there is no --checkpoint\n"


def test_seeds(run):
    def out(*options: object) -> str:
        return run("run", compiled(), "--tokens", "1,2", "--max-new-tokens", 8, *options).out

    assert out() == out() == out("--seed", 1)
    assert out() != out("--init-seed", 1)
    hot = ["--temperature", 2]
    assert out(*hot) == out(*hot) != out(*hot, "--seed", 1)
    assert out(*hot, "--top-p", 1e-9) == out()


def test_eos_and_dtype_come_from_the_checkpoint(run, tmp_path):
    tokens = model().generate(prompts(1, 4), max_new_tokens=4)[0].tolist()
    folder = write(tmp_path / "c", weights(), eos_token_id=tokens[5], torch_dtype="float32")
    given = ["--tokens", ",".join(map(str, tokens[:4])), "--max-new-tokens", 4, "--json"]
    assert run("run", compiled(), "--checkpoint", folder, *given).json["tokens"] == [tokens[:6]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1000, 999]}))
    assert run("run", compiled(), "--checkpoint", folder, *given).json["tokens"] == [tokens]


def words(folder: Path) -> Path:
    """A tokenizer of the words w0 to w50."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(51)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_prompts_are_text_where_the_checkpoint_has_a_tokenizer(run, tmp_path):
    folder = words(write(tmp_path / "c", weights()))
    given = ["--checkpoint", folder, "--prompt", "w3 w1 w4", "--max-new-tokens", 5]
    found = run("run", compiled(), *given, "--json").json
    [tokens] = found["tokens"]
    assert tokens[:3] == [3, 1, 4] and found["text"] == [" ".join(f"w{t}" for t in tokens)]
    assert run("run", compiled(), *given).out == found["text"][0] + "\n"
    both = run("run", compiled(), *given, "--prompt", "w5").out.splitlines()
    assert both[0] == found["text"][0] and both[1].startswith("w5 w")


def test_a_prompt_without_a_tokenizer_is_refused(run, tmp_path):
    folder = write(tmp_path / "c", weights())
    for options, why in (([], "no --checkpoint"), (["--checkpoint", folder], "no tokenizer.json")):
        result = run("run", compiled(), "--prompt", "hello", *options)
        assert result.status == 1 and why in result.err and len(result.err.splitlines()) == 1
    (folder / "tokenizer.json").write_text("{}")
    result = run("run", compiled(), "--checkpoint", folder, "--prompt", "hello")
    assert result.status == 1 and "tokenizer.json cannot be read" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "51"], "'token' 51 is not one of 0 .. 50"),
        (["--tokens", "1", "--temperature", "-1"], "temperature is -1.0"),
        (["--tokens", "1", "--dtype", "int4"], "dtype 'int4'"),
        (["--tokens", "1", "--device", "cuda:9"], "device 'cuda:9'"),
        (
            ["--tokens", "1", "--nproc", "2"],
            "the model was compiled without a mesh, for 1 process, and 2 processes are there",
        ),
        (["--tokens", "1", "--checkpoint", "nothing"], "there is no checkpoint folder nothing"),
        (
            ["--tokens", "1,2", "--max-new-tokens", "163839"],
            "a prompt of 2 and 163,839 new tokens are 163,841 positions; the model is made for "
            "163,840 (require history <= context_length, std/rotary.arch:23)",
        ),
    ],
)
def test_run_refuses_in_one_message(run, options, message):
    result = run("run", compiled(), *options)
    assert result.status == 1 and message in result.err and len(result.err.splitlines()) == 1


def test_run_of_what_was_not_compiled(run):
    result = run("run", "nowhere", "--tokens", "1")
    assert result.status == 1
    assert result.err == "error: nowhere is not a compiled model: there is no such directory\n"


def test_a_missing_entry_is_noted_on_standard_error(run, tmp_path):
    kept = {n: t for n, t in weights().items() if ".layers.3." not in n}
    folder = write(tmp_path / "c", kept)
    result = run("run", compiled(), "--checkpoint", folder, "--tokens", "1", "--json")
    assert result.status == 0 and result.json["tokens"]
    assert result.err.startswith("note: 'mtp' is not available: ")
    assert len(result.err.splitlines()) == 1


def test_interrupted_it_prints_what_there_is(run, monkeypatch):
    def token(watch: object, step: int, new: list[int]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(transcript.Watch, "token", token)
    result = run("run", compiled(), "--tokens", "1,2,3")
    assert result.status == cli.INTERRUPTED and len(result.out.split(",")) == 6


def test_interrupted_before_it_ends_quietly(run, monkeypatch):
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dslc.commands.run.run", interrupted)
    result = run("run", compiled(), "--tokens", "1,2,3")
    assert result.status == cli.INTERRUPTED and not result.err.strip()


def test_on_a_terminal_progress_is_shown_and_taken_away():
    """Under a pseudo-terminal: passes while compiling, a bar while loading, tokens as they come."""
    screen, end = pty.openpty()
    command = [sys.executable, "-m", "dslc", "run", compiled(), "--tokens", "1,2,3"]
    process = subprocess.Popen(
        [*map(str, command), "--max-new-tokens", "4"], cwd=ROOT, stdout=end, stderr=end,
        env=os.environ | {"TERM": "xterm"},  # whatever runs the tests: a dumb one shows no bar
    )  # fmt: skip
    os.close(end)
    seen = b""
    while True:
        try:
            part = os.read(screen, 4096)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not part:
            break
        seen += part
    os.close(screen)
    assert process.wait(timeout=60) == 0
    assert b"loading" in seen and seen.rindex(b"loading") < seen.index(b"1,2,3,")
    assert b"Traceback" not in seen


def test_steps_are_written_over_each_other(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.steps("toy") as show:
        show("elaborate")
        show("order")
    _, err = capsys.readouterr()
    assert err == "\rtoy: elaborate\rtoy: order    \r              \r"
