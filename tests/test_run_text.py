"""``dslc run`` with text: stop strings, conversations, and what a terminal shows meanwhile."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dslc import cli
from dslc.transcript import Transcript
from pytorch.small import compiled, weights, write
from pytorch.spelling import bytewise, pieces

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose tokens are w0 to w48 and two special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = write(tmp_path_factory.mktemp("words") / "c", weights())
    words = {f"w{i}": i for i in range(49)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 49)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(capsys, folder):
    """Run the command on that checkpoint: status, output, errors."""

    def run(*options: object, checkpoint: Path | None = folder) -> tuple[int, str, str]:
        capsys.readouterr()
        given = ["--checkpoint", checkpoint] if checkpoint else []
        status = cli.run([str(a) for a in ["run", compiled(), *given, *options]])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


def found(result: tuple[int, str, str]) -> tuple[list[int], str]:
    status, out, err = result
    assert (status, err) == (0, "")
    answer = json.loads(out)
    return answer["tokens"][0], answer["text"][0]


# -- stop strings ---------------------------------------------------------------------------------


def test_a_stop_string_that_spans_tokens_ends_text_and_tokens_before_it(run):
    given = ["--prompt", "w3 w1 w4", "--max-new-tokens", 12]
    tokens, text = found(run(*given, "--json"))
    words = text.split()
    assert tokens[:4] == [49, 3, 1, 4] and words == [f"w{t}" for t in tokens if t < 49]
    spanning = f"{words[6]} {words[7]}"
    cut, shorter = found(run(*given, "--json", "--stop", spanning, "--stop", "nowhere"))
    assert shorter == " ".join(words[:6]) + " "
    assert cut == tokens[: len(cut)] and [f"w{t}" for t in cut if t < 49] == words[:6]
    assert run(*given, "--stop", spanning)[1] == shorter + "\n"
    within = words[3][1:]  # of the first new token
    cut, shorter = found(run(*given, "--json", "--stop", within))
    assert shorter == "w3 w1 w4 w" and cut == tokens[:4]


def test_a_special_token_has_no_text_and_stops_all_the_same(run, folder, tmp_path):
    given = ["--prompt", "w3 w1 w4", "--max-new-tokens", 12, "--json"]
    tokens, _ = found(run(*given))
    changed = json.loads((folder / "tokenizer.json").read_text())
    turn = {**changed["added_tokens"][1], "id": tokens[8], "content": "<turn>"}
    changed["added_tokens"].append(turn)
    vocabulary = changed["model"]["vocab"]
    del vocabulary[f"w{tokens[8]}"]
    vocabulary["<turn>"] = tokens[8]
    other = write(tmp_path / "c", weights())
    (other / "tokenizer.json").write_text(json.dumps(changed))
    assert tokens[8] not in tokens[:8]  # else it would stop earlier
    cut, _ = found(run(*given, "--stop", "<turn>", checkpoint=other))
    assert cut == tokens[:8]


def test_a_batch_stops_one_by_one(run):
    prompts = ["--prompt", "w3 w1 w4", "--prompt", "w7 w9"]
    given = [*prompts, "--max-new-tokens", 10, "--json"]
    whole = json.loads(run(*given)[1])
    stop = whole["text"][1].split()[5]
    cut = json.loads(run(*given, "--stop", stop)[1])
    for text, shorter in zip(whole["text"], cut["text"], strict=True):
        after = text.index(" ", 4)
        at = text.find(stop, after)
        assert shorter == (text if at < 0 else text[:at])


def test_min_p_of_one_is_greedy_and_seeds_give_the_same_again(run):
    given = ["--prompt", "w3", "--max-new-tokens", 12]
    hot = [*given, "--temperature", 3]
    greedy = run(*given)[1]
    assert run(*hot, "--min-p", 1)[1] == greedy
    drawn = [run(*hot, "--min-p", 0.2, "--top-p", 0.9, "--seed", s)[1] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "1", "--stop", "x"], "--stop needs a tokenizer (no --checkpoint)"),
        (["--tokens", "1", "--min-p", "1.5"], "min_p is 1.5: it must be at least 0 and at most 1"),
        (["--tokens", "1", "--min-p", "nan"], "min_p is nan: it must be at least 0 and at most 1"),
        (["--tokens", "1", "--top-p", "2"], "top_p is 2.0: it must be above 0 and at most 1"),
        (
            ["--tokens", "1", "--chat"],
            "--chat makes messages of --prompt; --tokens are taken as they are",
        ),
        (
            ["--prompt", "hi", "--chat"],
            "--prompt needs a tokenizer (no --checkpoint); --tokens takes token numbers",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(run, options, message):
    assert run(*options, checkpoint=None) == (1, "", f"error: {message}\n")


def test_mistakes_with_a_checkpoint_are_told_in_a_sentence(run, folder, tmp_path):
    bare = write(tmp_path / "bare", weights())
    needs = f"error: --stop needs a tokenizer ({bare} has no tokenizer.json)\n"
    assert run("--tokens", "1", "--stop", "x", checkpoint=bare) == (1, "", needs)
    empty = "error: --stop needs a text: an empty one would end everything at once\n"
    assert run("--tokens", "1", "--stop", "") == (1, "", empty)
    none = (
        f"error: --chat needs a chat template: {folder} has no chat_template.jinja, and no "
        "chat_template in tokenizer_config.json\n"
    )
    assert run("--prompt", "w1", "--chat") == (1, "", none)


def test_mistakes_are_told_before_weights_are_loaded(run, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("backends.pytorch.load.load", never)
    for wrong, why in (
        (["--min-p", "2"], "min_p is 2.0"),
        (["--max-new-tokens", "163840"], "the model is made for 163,840"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
    ):
        status, _, err = run("--tokens", "1", *wrong)
        assert status == 1 and why in err


# -- conversations --------------------------------------------------------------------------------

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- " w1 " + message.content + " w2 " }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "w7" }}{% endif %}"""


def chatty(tmp_path: Path, folder: Path, template: object = TEMPLATE, alone: str = "") -> Path:
    """The checkpoint with a template in tokenizer_config.json, or in a file of its own."""
    made = write(tmp_path / "chatty", weights())
    (made / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "<end>"}
    if template is not None:
        config["chat_template"] = template
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    if alone:
        (made / "chat_template.jinja").write_text(alone)
    return made


def test_a_prompt_becomes_a_message_and_the_answer_is_shown(run, folder, tmp_path):
    made = chatty(tmp_path, folder)
    given = ["--prompt", "w5 w6", "--chat", "--max-new-tokens", 4]
    tokens, text = found(run(*given, "--json", checkpoint=made))
    assert tokens[:6] == [49, 1, 5, 6, 2, 7]  # the first one once
    assert text == " ".join(f"w{t}" for t in tokens[6:])
    assert run(*given, checkpoint=made)[1] == text + "\n"
    plain, _ = found(run("--tokens", "49,1,5,6,2,7", "--max-new-tokens", 4, "--json"))
    assert plain == tokens


def test_a_template_of_its_own_comes_first_and_one_of_several_is_the_default(run, folder, tmp_path):
    given = ["--prompt", "w5", "--chat", "--max-new-tokens", 1, "--json"]
    alone = chatty(tmp_path / "a", folder, alone="w9 {{ messages[0].content }}")
    assert found(run(*given, checkpoint=alone))[0][:2] == [9, 5]
    several = [
        {"name": "tool_use", "template": "w1"},
        {"name": "default", "template": "w8 {{ messages[-1]['content'] }}"},
    ]
    named = chatty(tmp_path / "b", folder, several)
    assert found(run(*given, checkpoint=named))[0][:2] == [8, 5]


def test_a_prompt_that_begins_as_the_tokenizer_begins_it_does_not_begin_twice(run):
    given = ["--max-new-tokens", 1, "--json"]
    assert found(run("--prompt", "<s> w5", *given))[0][:2] == [49, 5]
    assert found(run("--prompt", "w5 w5", *given))[0][:3] == [49, 5, 5]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "holds no template, line 1: Expected an expression, got 'end of "
                     "statement block'"),
        ("a\n{{ raise_exception('one role only') }}", "refuses this: one role only"),
        ("{{ messages[3].role }}", "fails: UndefinedError: list object has no element 3"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError: access to attribute '__class__' of "
                                       "'str' object is unsafe."),
        ("{% set _ = messages.append(1) %}", "fails: SecurityError: access to attribute 'append' "
                                             "of 'list' object is unsafe."),
        ("{% for i in range(999999) %}{% endfor %}", "fails: OverflowError: Range too big."),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_why(run, folder, tmp_path, template, why):
    made = chatty(tmp_path, folder, template)
    status, out, err = run("--prompt", "w5", "--chat", checkpoint=made)
    assert (status, out) == (1, "") and len(err.splitlines()) == 1
    assert f"{made / 'tokenizer_config.json'} {why}" in err


def test_files_that_cannot_be_read_are_named(run, folder, tmp_path):
    made = chatty(tmp_path, folder)
    (made / "chat_template.jinja").write_bytes(b"\xff")
    err = run("--prompt", "w5", "--chat", checkpoint=made)[2]
    assert err.startswith(f"error: {made / 'chat_template.jinja'} cannot be read: 'utf-8' codec")
    (made / "tokenizer_config.json").write_text("[1]")
    wrong = f"error: {made / 'tokenizer_config.json'}: expected an object, found list\n"
    assert run("--prompt", "w5", "--chat", checkpoint=made) == (1, "", wrong)


def test_without_jinja2_it_says_what_brings_it(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    made = chatty(tmp_path, folder)
    result = run("--prompt", "w5", "--chat", checkpoint=made)
    assert result == (1, "", "error: --chat needs jinja2: pip install jinja2\n")


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        # What published templates use: line control, loop controls, tojson, generation blocks.
        "{% for m in messages %}\n  {% if m.role == 'system' %}\n{% continue %}\n  {% endif %}\n"
        "{{ m | tojson }}{{ '\\n' }}\n{% endfor %}{{ eos_token }}",
        "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% generation %}{{ ns.n }}<{{ m['content'] | trim }}>\n{% endgeneration %}{% endfor %}"
        "{% if tools is none and not enable_thinking %}{{ strftime_now('%Y') }}{% endif %}",
        "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}{{ unk_token is defined }}",
    ],
)
def test_templates_are_rendered_as_transformers_does(folder, tmp_path, template):
    from transformers import PreTrainedTokenizerFast

    from dslc.chat import open_template
    from dslc.prompts import conversation, open_tokenizer

    made = chatty(tmp_path, folder, template)
    theirs = PreTrainedTokenizerFast.from_pretrained(made)
    texts = ["  w1 <b> w2 ", 'é "quoted" w3']
    for text in texts:
        messages = [{"role": "user", "content": text}]
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert open_template(made).render(messages) == wanted
    tokens = [
        theirs.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    assert conversation(open_tokenizer(made), made, texts) == tokens


# -- on a terminal --------------------------------------------------------------------------------


def test_a_terminal_shows_whole_characters_and_nothing_of_a_stop_string(capsys):
    tokenizer = bytewise()
    prompt, new = (tokenizer.encode(x, add_special_tokens=False).ids for x in ("the ", "w€é😀in"))
    transcript = Transcript([prompt], tokenizer, stop=["in"], live=True)
    seen = [capsys.readouterr().out]
    for token in new:
        transcript.token([token])
        seen.append(capsys.readouterr().out)
    transcript.end()
    assert seen == ["the ", "w", "", "€", "", "é", "", "", "😀", ""]
    assert capsys.readouterr().out == "\n"
    assert transcript.texts() == ["the w€é😀"] and transcript.tokens() == [prompt + new[:-1]]


def test_what_only_may_be_a_stop_string_is_shown_in_the_end(capsys):
    tokenizer = bytewise()
    transcript = Transcript([[]], tokenizer, stop=["the"], live=True)
    for token in tokenizer.encode("a th", add_special_tokens=False).ids:
        transcript.token([token])
    assert capsys.readouterr().out == "a "
    transcript.end()
    assert capsys.readouterr().out == "th\n"


def test_an_answer_begins_without_the_space_that_joins_it_to_the_question(capsys):
    tokenizer = pieces()
    prompt = tokenizer.encode("the", add_special_tokens=False).ids
    answer = tokenizer.encode("wind the", add_special_tokens=False).ids
    for reply, text in ((True, "wind the"), (False, "the wind the")):
        transcript = Transcript([prompt], tokenizer, reply=reply, live=True)
        for token in answer:
            transcript.token([token])
        transcript.end()
        assert capsys.readouterr().out == text + "\n" and transcript.texts() == [text]


class Terminal:
    """The command in a process of its own, on a pseudo-terminal (or its errors alone)."""

    def __init__(self, *options: object, out: int | None = None):
        self.screen, end = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dslc", "run", *map(str, (compiled(), *options))],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=end if out is None else out, stderr=end,
            env=os.environ | {"TERM": "xterm"},  # a dumb one shows no bar
            # A shell's background processes ignore Ctrl-C, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(end)
        self.seen = b""
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.screen, 4096)
            except OSError:  # how Linux says that nobody writes any more
                part = b""
            with self.changed:
                self.seen += part
                self.changed.notify_all()
            if not part:
                return

    def wait_for(self, pattern: bytes) -> None:
        with self.changed:
            found = self.changed.wait_for(lambda: re.search(pattern, self.seen), timeout=60)
            assert found, self.seen

    def end(self) -> int:
        status = self.process.wait(timeout=60)
        time.sleep(0.05)
        return status


LONG = ["--max-new-tokens", 100_000]


def test_ctrl_c_on_a_terminal_leaves_the_tokens_so_far():
    terminal = Terminal("--tokens", "1,2,3", *LONG)
    terminal.wait_for(rb"1,2,3,\d+,\d+,\d+,")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert b"Traceback" not in terminal.seen and b"Error" not in terminal.seen
    tokens = terminal.seen[terminal.seen.rindex(b"1,2,3,") :].split(b"\r\n")[0]
    assert all(token.isdigit() for token in tokens.split(b",")) and tokens.count(b",") > 3


def test_ctrl_c_with_json_leaves_one_object():
    reading, writing = os.pipe()
    terminal = Terminal("--tokens", "1,2,3", "--json", *LONG, out=writing)
    os.close(writing)
    terminal.wait_for(rb"loading[^$]*\x1b\[\?25h")  # the bar is gone, the cursor is back
    time.sleep(1.5)
    terminal.process.send_signal(signal.SIGINT)
    with os.fdopen(reading) as out:
        answer = json.loads(out.read())
    assert terminal.end() == 130 and b"Traceback" not in terminal.seen
    [tokens] = answer["tokens"]
    assert tokens[:3] == [1, 2, 3] and 4 < len(tokens) < 100_003
    assert answer["timing"]["decode_tokens_per_second"] > 0


def test_a_closed_pipe_ends_silently(folder):
    command = f"{sys.executable} -m dslc run {compiled()} --checkpoint {folder}"
    done = subprocess.run(
        ["bash", "-c", f"{command} --prompt w1 --prompt w2 --max-new-tokens 300 | head -c 4"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "w1 w" and done.stderr == ""
