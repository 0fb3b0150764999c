"""Mistakes in the names of a deployment, each with its whole message."""

import pytest
from deploy_toy import messages

CASES = {
    "cluster": (
        """
deploy a of Toy on h80 { }
device D { }
cluster h800 { gpu = D, per_node = 1, nodes = 1 }
""",
        """
error[E0806]: no cluster is called 'h80'
  --> case.arch:2:20
  |
2 | deploy a of Toy on h80 { }
  |                    ^^^
  hint: did you mean 'h800'?
""",
    ),
    "model": (
        """
deploy a of Tory { }
""",
        """
error[E0806]: no model is called 'Tory'
  --> case.arch:2:13
  |
2 | deploy a of Tory { }
  |             ^^^^
  hint: did you mean 'Toy'?
""",
    ),
    "no_model": (
        """
deploy a { }
""",
        """
error[E0804]: deployment 'a' does not say which model it is of
  --> case.arch:2:8
  |
2 | deploy a { }
  |        ^
  hint: deploy a of Model, or from another deployment
""",
    ),
    "base": (
        """
deploy a from b { }
""",
        """
error[E0806]: no deployment is called 'b'
  --> case.arch:2:15
  |
2 | deploy a from b { }
  |               ^
""",
    ),
    "declared": (
        """
deploy a of Toy { }
deploy a of Toy { }
""",
        """
error[E0203]: deployment 'a' is declared twice
  --> case.arch:3:8
  |
3 | deploy a of Toy { }
  |        ^
  ::: case.arch:2:8
  |
2 | deploy a of Toy { }
  |        - first declared here
""",
    ),
    "mesh_twice": (
        """
deploy a of Toy {
  mesh ep = 2
  mesh ep = 4
  shard batch -> ep
}
""",
        """
error[E0809]: 'mesh' is given twice
  --> case.arch:4:3
  |
4 |   mesh ep = 4
  |   ^^^^^^^^^^^
  ::: case.arch:3:3
  |
3 |   mesh ep = 2
  |   ----------- first given here
""",
    ),
    "axis": (
        """
deploy a of Toy {
  mesh  ep = 2
  shard Mixture.expert -> pe
}
""",
        """
error[E0810]: the mesh has no axis 'pe'
  --> case.arch:4:27
  |
4 |   shard Mixture.expert -> pe
  |                           ^^
  ::: case.arch:3:3
  |
3 |   mesh  ep = 2
  |   ------------ the mesh is here
  hint: its axes are ep
""",
    ),
    "no_mesh": (
        """
deploy a of Toy {
  shard Mixture.expert -> ep
}
""",
        """
error[E0810]: 'ep' is no mesh axis: this deployment has no mesh
  --> case.arch:3:27
  |
3 |   shard Mixture.expert -> ep
  |                           ^^
""",
    ),
    "axis_twice": (
        """
deploy a of Toy {
  mesh  ep = 2
  shard batch -> (ep, ep)
}
""",
        """
error[E0810]: 'ep' divides 'batch' twice
  --> case.arch:4:23
  |
4 |   shard batch -> (ep, ep)
  |                       ^^
  ::: case.arch:4:19
  |
4 |   shard batch -> (ep, ep)
  |                   -- it stands here already
""",
    ),
    "block": (
        """
deploy a of Toy {
  mesh  ep = 2
  shard MoE.expert -> ep
}
""",
        """
error[E0811]: 'Toy' uses no block called 'MoE'
  --> case.arch:4:9
  |
4 |   shard MoE.expert -> ep
  |         ^^^
""",
    ),
    "index": (
        """
deploy a of Toy {
  mesh  tp = 2
  shard Attention.hd -> tp
}
""",
        """
error[E0811]: 'Attention' has no index or array of blocks called 'hd'
  --> case.arch:4:19
  |
4 |   shard Attention.hd -> tp
  |                   ^^
  ::: toy.arch:5:7
  |
5 | block Attention[d] {
  |       --------- declared here
  hint: did you mean 'h'?
""",
    ),
    "use": (
        """
deploy a of Toy {
  mesh  ep = 2
  shard Mixture.router -> ep
}
""",
        """
error[E0813]: 'router' of 'Mixture' is a parameter, not an index or array of blocks
  --> case.arch:4:17
  |
4 |   shard Mixture.router -> ep
  |                 ^^^^^^
   ::: toy.arch:26:9
   |
26 |   param router[e, d]
   |         ------ declared here
  hint: name one of its indices: Mixture.e -> ...
""",
    ),
    "unknown": (
        """
deploy a of Toy {
  mesh  tp = 2
  shard headz -> tp
}
""",
        """
error[E0811]: 'Toy' has no index or array of blocks called 'headz'
  --> case.arch:4:9
  |
4 |   shard headz -> tp
  |         ^^^^^
  hint: did you mean 'heads'?
""",
    ),
    "several": (
        """
deploy a of Toy {
  mesh  tp = 2
  shard f -> tp, batch -> tp
}
""",
        """
error[E0812]: 'f' stands in several blocks
  --> case.arch:4:9
  |
4 |   shard f -> tp, batch -> tp
  |         ^
  hint: say which: Expert.f or Mixture.f
""",
    ),
    "chained": (
        """
deploy a of Toy {
  mesh  pp = 5
  shard layers -> pp
}
""",
        """
error[E0813]: the blocks of 'layers' run one after the other and cannot be sharded
  --> case.arch:4:9
  |
4 |   shard layers -> pp
  |         ^^^^^^
   ::: toy.arch:47:7
   |
47 |   use layers[z] = Layer[d]
   |       ------ declared here
  hint: spread them over a mesh axis as a pipeline: stages pp : layers
""",
    ),
    "replicas": (
        """
deploy a of Toy {
  mesh ep = 2
  shard batch -> ep, heads -> replicas
}
""",
        """
error[E0810]: 'heads' has no replicas to be spread over
  --> case.arch:4:31
  |
4 |   shard batch -> ep, heads -> replicas
  |                               ^^^^^^^^
  hint: replicas is for optimizer, gradients and parameters
""",
    ),
    "staged": (
        """
deploy a of Toy {
  mesh pp = 5
  stages pp : layers
  shard batch -> pp
  train batch = 4, sequence = 8
}
""",
        """
error[E0810]: 'pp' carries the stages and divides nothing else
  --> case.arch:5:18
  |
5 |   shard batch -> pp
  |                  ^^
  ::: case.arch:4:10
  |
4 |   stages pp : layers
  |          -- stages are spread over it here
""",
    ),
    "redundant": (
        """
deploy a of Toy {
  mesh tp = 2
  shard heads -> tp with 2 redundant
}
""",
        """
error[E0813]: only an array of blocks has redundant copies
  --> case.arch:4:26
  |
4 |   shard heads -> tp with 2 redundant
  |                          ^
""",
    ),
    "constant": (
        """
deploy a of Toy {
  mesh ep = mixd
  shard Mixture.expert -> ep
}
""",
        """
error[E0204]: no constant is called 'mixd'
  --> case.arch:3:13
  |
3 |   mesh ep = mixd
  |             ^^^^
  hint: did you mean 'mixed'?
""",
    ),
    "inherited": (
        """
deploy a of Toy {
  mesh ep = 2
  shard Mixture.expert -> ep
}
deploy b from a { mesh ep = 4 }
""",
        """
error[E0815]: 'Mixture.expert' has 6 entries, which 4 ranks cannot share evenly
  --> case.arch:4:9
  |
4 |   shard Mixture.expert -> ep
  |         ^^^^^^^^^^^^^^^^^^^^
   ::: toy.arch:27:7
   |
27 |   use expert[e] = Expert[d, f]
   |       ------------------------ declared here
  ::: case.arch:6:8
  |
6 | deploy b from a { mesh ep = 4 }
  |        - 'b' inherits this
  hint: copies fill up the ranks: Mixture.expert -> ep with 2 redundant
""",
    ),
    "clause": (
        """
deploy a of Toy {
  mesh ep = 2
  shrad Mixture.expert -> ep
}
""",
        """
error[E0101]: 'shrad' cannot stand here
  --> case.arch:4:3
  |
4 |   shrad Mixture.expert -> ep
  |   ^^^^^ expected a clause, ',' or '}'
  hint: did you mean 'shard'?
""",
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_the_whole_message(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert messages(text) == expected
