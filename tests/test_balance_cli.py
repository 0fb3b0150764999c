"""``dslc balance``, and the loads and placements that ``dslc run`` writes and reads."""

import json

import pytest

from dslc.cli import run

PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


@pytest.fixture
def loads(tmp_path):
    def write(data):
        file = tmp_path / "loads.json"
        file.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(file)

    return write


def test_the_published_example(loads, capsys):
    options = "--replicas 16 --groups 4 --nodes 2 --gpus 8 --json".split()
    assert run(["balance", loads(PUBLISHED), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phy2log"] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert found["log2phy"][0][5] == [0, 2] and found["counts"][0][5] == 2
    assert found["imbalance"][0] == pytest.approx(1.2081316)


def test_a_deployment_says_places_groups_nodes_and_ranks(loads, capsys):
    assert run(["balance", loads([[1] * 256]), "--deploy", "prefill", "--json"]) == 0
    (places,) = json.loads(capsys.readouterr().out)["phy2log"]
    assert len(places) == 288 and set(places) == set(range(256))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([[1, 2, 3]], [], "give --deploy NAME, or --replicas and --gpus (and --groups, --nodes)"),
        ([[1, 2, 3]], ["--replicas", "4", "--gpus", "3"], "4 places cannot be shared by 3 GPUs"),
        ([[1, 2, 3]], ["--deploy", "prefill"],
         "deployment 'prefill' of dsv3 deals out no array of 3 blocks, which the loads are of"),
        ([[1, "x"]], ["--replicas", "4", "--gpus", "2"],
         "{file}: expected loads, a list of numbers for each array of blocks"),
        ("{", ["--replicas", "4", "--gpus", "2"], "{file} is not JSON: "),
        ([1, 2], ["--deploy", "nowhere"],
         "of which file is the deployment 'nowhere'? give it with --file FILE"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_message(loads, capsys, data, options, message):
    file = loads(data)
    assert run(["balance", file, *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: " + message.format(file=file)) and said.count("\n") == 1


def test_a_run_records_what_is_picked(loads, tmp_path, capsys):
    import dslc

    sizes = {"hidden": 16, "vocab": 32, "layers": 2, "dense": 1, "ffn": 16, "heads": 2, "q_rank": 8,
             "kv_rank": 8, "nope": 4, "rope": 4, "value": 4, "experts": 4, "groups": 2,
             "open_groups": 1, "per_token": 2, "expert_ffn": 8}  # fmt: skip
    dslc.compile("dsv3", set=sizes).save(tmp_path / "built")
    file = tmp_path / "recorded.json"
    given = ["--tokens", "1,2,3", "--max-new-tokens", "3", "--record-loads", str(file)]
    assert run(["run", str(tmp_path / "built"), *given]) == 0
    recorded = json.loads(file.read_text())
    assert recorded["file"] == "dsv3"
    (counts,) = recorded["loads"].values()
    assert sum(counts) == (3 + 2) * 2  # tokens that were run, and the picks of each
    places = tmp_path / "places.json"
    options = ["--replicas", "6", "--gpus", "2", "-o", str(places)]
    assert run(["balance", str(file), *options]) == 0
    assert json.loads(places.read_text())["arrays"] == ["layers.1.mlp.expert"]
