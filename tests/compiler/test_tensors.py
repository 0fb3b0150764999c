"""What a checkpoint holds, and what a program is in numbers."""

import time
from dataclasses import replace

import pytest
from decoder import TEXT

from compiler.ir import NamePart, Program
from compiler.passes.elaborate import run as elaborate
from compiler.report import report
from compiler.tensors import NameClash, caches, ignored, patterns, tensors
from compiler.text import parse
from dsl.constants import Choices
from dsl.program import open_program


@pytest.fixture(scope="module")
def published() -> Program:
    """DeepSeek-V3 as published: 671 billion parameters."""
    return elaborate(open_program("dsv3"))


# -- names ----------------------------------------------------------------------------------------


def test_one_row_per_declaration_and_place(published):
    rows = {p.path: p for p in patterns(published)}
    expert = rows["layers[{0}].mlp.expert[{1}].W_up"]
    assert expert.name == "model.layers.{0}.mlp.experts.{1}.up_proj.weight"
    assert expert.ranges == (range(3, 61), range(256)) and len(expert) == 58 * 256
    assert (expert.shape, expert.dims, expert.initial) == ((2048, 7168), ("f", "d"), "matrix")
    tensor = list(expert.tensors())[257]
    assert tensor.path == "layers[4].mlp.expert[1].W_up"
    assert tensor.name == "model.layers.4.mlp.experts.1.up_proj.weight"


def test_an_empty_part_of_a_name_is_left_out_and_constants_are_filled_in(published):
    rows = {p.path: p for p in patterns(published)}
    assert rows["next.layer.attn.W_o"].name == "model.layers.61.self_attn.o_proj.weight"
    assert ignored(published)[0] == "model.layers.61.embed_tokens.weight"


def test_what_a_tensor_does_is_read_off_the_source(published):
    rows = {p.path: p for p in patterns(published)}
    assert rows["norm.gain"].initial == "gain"
    bias = rows["layers[{0}].mlp.bias"]
    assert (bias.initial, bias.role, bias.dtype) == ("state", "state", "f32")


def test_entries_say_who_needs_a_tensor(published):
    entries = {p.path: p.entries for p in patterns(published)}
    assert entries["embed"] == entries["layers[{0}].attn.W_o"] == ("main", "mtp")
    assert entries["next.W_eh"] == entries["next.layer.mlp.expert[{0}].W_up"] == ("mtp",)


def test_every_tensor_of_the_largest_model_is_listed_at_once(published):
    start = time.process_time()
    names = [t.name for t in tensors(published)]
    seconds = time.process_time() - start
    assert len(names) == len(set(names)) == 46_181
    assert seconds < 3  # 0.2 on a free core


def test_without_names_a_tensor_goes_by_its_path():
    program = parse("\n".join(line for line in TEXT.splitlines() if "  name " not in line))
    named = {t.path: t.name for t in tensors(program)}
    assert all(name == path.replace("[", ".").replace("]", "") for path, name in named.items())
    assert "layers[3].ffn[5].W_up" in named


@pytest.mark.parametrize(
    ("module", "names", "message"),
    [
        ("Model", {"layers": "model.layers"}, "all 9 of layers[1..10].centroid have one name in a"),
        ("Sparse", {"bias": "centroid"}, "layers[1..10].centroid and layers[1..10].bias have one"),
        ("Sparse", {"ffn": "ffn"}, "some of the 144 of layers[1..10].ffn[0..16].W_up have"),
        (
            "Model",
            {"embed": "model.layers.4.centroid"},
            "embed and layers[1..10].centroid have one",
        ),
    ],
)
def test_two_tensors_of_one_name_are_refused(module, names, message):
    program = parse(TEXT)
    old = program.modules[module]
    parts = {member: NamePart(text, "i") for member, text in names.items()}
    renamed = replace(old, names={**old.names, **parts})
    with pytest.raises(NameClash) as caught:
        patterns(replace(program, modules={**program.modules, module: renamed}))
    assert message in str(caught.value)


def test_caches_are_what_the_author_marked(published):
    rows = [(c.path, c.ranges, c.shape) for c in caches(published) if "main" in c.entries]
    assert rows == [
        (f"layers[{{0}}].attn.{name}", (layers,), (size,))
        for layers in (range(3), range(3, 61))
        for name, size in (("c_kv", 512), ("k_r", 64))
    ]


# -- numbers --------------------------------------------------------------------------------------


def test_the_published_numbers(published):
    """arXiv:2412.19437 and arXiv:2505.09343; 250 GFLOP per token of training."""
    numbers = report(published)
    assert numbers.parameters == 671_026_404_352
    assert numbers.activated == 36_625_603_584
    assert numbers.others == 11_610_067_968
    assert numbers.cache_bytes_per_token == 70_272
    assert abs(numbers.training_flops - 250e9) < 2.5e9
    assert numbers.training_flops == pytest.approx(3 * numbers.forward_flops, rel=1e-4)


def test_flops_are_products_with_activated_weights_and_causal_attention(published):
    for sequence in (1024, 4096):
        numbers = report(published, sequence)
        heads, widths = 128, 128 + 64 + 128
        attention = 61 * 2 * heads * widths * sequence / 2
        expected = 2 * numbers.activated + attention
        assert numbers.forward_flops == pytest.approx(expected, rel=1e-3)


def test_blocks_add_up_to_their_parents(published):
    rows = {row.path: row for row in report(published).blocks}
    layer, root = rows["layers[3..61]"], rows[""]
    inside = [rows[f"layers[3..61].{name}"] for name in ("attn_norm", "attn", "mlp_norm", "mlp")]
    for what in ("parameters", "activated", "flops"):
        assert getattr(layer, what) == pytest.approx(sum(getattr(row, what) for row in inside))
    experts = rows["layers[3..61].mlp.expert[0..256]"]
    assert (experts.block, experts.count) == ("SwiGLU", 58 * 256)
    assert experts.activated * 256 == experts.parameters * 8
    assert root.parameters == 671_026_404_352 and root.span.startswith("models/dsv3.arch:")
    assert rows["next"].parameters == 11_610_067_968


def test_more_layers_and_experts_cost_no_time():
    start = time.process_time()
    program = elaborate(open_program("dsv3", Choices(set={"layers": 6100, "experts": 25600})))
    assert len(patterns(program)) == 53
    assert report(program).parameters > 1e14
    assert time.process_time() - start < 10  # under one on a free core


def test_picked_matrices_that_stand_in_one_tensor_are_activated(tmp_path):
    """As many rows as a token picks; an embedding's row is none, a bias looked up beside is one."""
    path = tmp_path / "gathered.arch"
    path.write_text(
        "edition 2026\nindex t : time\n"
        "block Experts[d] {\n  index e : 6, k : 2, f : 5\n"
        "  param router[e,d]\n  param A[e,d,f]\n  param b[e,f]\n  param B[e,f,d]\n"
        "  def (x[d]) -> y[d] {\n    p[e]: f32 = softmax[e](router[e,d] * x[d])\n"
        "    pick[k] = argtop[e -> k](p[e])\n"
        "    h[k,f]  = A[pick[k],d,f] * x[d] + b[pick[k],f]\n"
        "    y[d]    = p[pick[k]] * B[pick[k],f,d] * h[k,f]\n  }\n}\n"
        "model Toy {\n  index d : 8, w : 11\n  param embed[w,d]\n  param head[w,d]\n"
        "  use moe = Experts[d]\n"
        "  def main(token[t] of w) -> logits[t,w] {\n"
        "    logits[t,w] = head[w,d] * moe(embed[token[t],d])\n  }\n}\n"
    )
    numbers = report(elaborate(open_program(str(path))))
    assert numbers.activated == 11 * 8 + 6 * 8 + 2 * (8 * 5 + 5 + 5 * 8)
