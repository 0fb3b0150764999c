"""Mistakes in deployments, clusters and number formats, each with its whole message."""

import pytest
from deploy_toy import cases, said

CASES = list(cases())


@pytest.mark.parametrize(("title", "text", "message"), CASES, ids=[title for title, _, _ in CASES])
def test_the_whole_message(title, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(text) == message


def test_there_is_a_case_for_every_code():
    told = {line[6:11] for _, _, message in CASES for line in message.splitlines()}
    assert {f"E08{number:02}" for number in range(1, 22)} <= told
