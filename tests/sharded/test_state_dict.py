"""What a rank's model refuses."""

import pytest

import dslc
from backends.pytorch.sharded import ShardedModel


def test_weights_of_a_rank_are_not_replaced_by_a_state_dict():
    model = ShardedModel.__new__(ShardedModel)
    with pytest.raises(dslc.UserError) as refused:
        model.load_state_dict({})
    assert str(refused.value) == (
        "a model over several ranks reads its weights from a checkpoint: dslc.load(directory, "
        "checkpoint)"
    )
