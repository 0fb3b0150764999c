"""Linear recurrences in chunks are what they are token by token."""

import pytest
import torch

from backends.pytorch.runtime import Cache, Step, recurrence

HEADS, KEY, VALUE = 3, 5, 7


def loop(state, scale, write, value, read, query):
    """The equations as they stand."""
    out = []
    for t in range(write.shape[1]):
        one = scale[:, t, :, :, None] if scale.ndim == write.ndim else scale[:, t, :, None, None]
        said = 0 if read is None else torch.einsum("bhn,bhnv->bhv", read[:, t], state)
        new = value[:, t] - said
        state = one * state + write[:, t, :, :, None] * new[:, :, None]
        out.append(torch.einsum("bhn,bhnv->bhv", query[:, t], state))
    return torch.stack(out, 1), state


def inputs(time, *, per_key=False, reads=True, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(2, time, HEADS, *shape, generator=generator, dtype=dtype)

    key = torch.nn.functional.normalize(random(KEY), dim=-1)
    scale = random(*([KEY] if per_key else [])).sigmoid()
    beta = random(1).sigmoid()
    read = key * (scale if per_key else scale[..., None]) if reads else None
    state = torch.randn(2, HEADS, KEY, VALUE, generator=generator, dtype=dtype)
    return state, scale, key * beta, random(VALUE), read, random(KEY)


def close(found, wanted, tolerance=1e-12):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("reads", [True, False], ids=["delta rule", "no read"])
@pytest.mark.parametrize("per_key", [False, True], ids=["per head", "per key"])
@pytest.mark.parametrize("time", [1, 5, 16, 63, 64, 65, 150])
def test_chunks_are_the_loop(time, per_key, reads):
    given = inputs(time, per_key=per_key, reads=reads)
    close(recurrence.chunks(*given), loop(*given))


def test_a_decay_of_zero_forgets_and_a_negative_one_turns():
    state, scale, *rest = inputs(140)
    scale[:, ::7] = 0
    scale[:, 3::11] *= -1
    close(recurrence.chunks(state, scale, *rest), loop(state, scale, *rest))


def test_decays_too_small_for_a_logarithm():
    state, scale, *rest = inputs(130, dtype=torch.float32)
    scale[:, 5:90] = 1e-38
    close(recurrence.chunks(state, scale, *rest), loop(state, scale, *rest), 1e-5)


def test_single_precision_is_as_near_as_the_loop_is():
    given = inputs(200, dtype=torch.float32)
    exact = loop(*(x.double() for x in given))
    close([x.double() for x in recurrence.chunks(*given)], exact, 1e-5)


def test_gradients_are_those_of_the_loop():
    given = [x.requires_grad_() for x in inputs(70)]
    for function, kept in ((recurrence.chunks, "chunks"), (loop, "loop")):
        result, state = function(*given)
        gradients = torch.autograd.grad(result.square().sum() + state.sum(), given)
        if kept == "chunks":
            first = gradients
    close(first, gradients, 1e-9)


class Module(torch.nn.Module):
    path = "here"


@pytest.mark.parametrize("counts", [(9, 9), (70, 3), (0, 66), (5, 0)])
def test_a_ragged_step_in_chunks_keeps_each_sequences_own_state(counts):
    """As token by token, from the state that a step before left."""
    module, found = Module(), []
    for linear in (True, False):
        cache, out = Cache(2), []
        for step_counts in ((6, 2), counts, (1, 1)):
            step = Step(step_counts, cache=cache)
            _, scale, write, value, read, query = (
                x[:, : max(step_counts)] if x is not None else None
                for x in inputs(max(counts, default=0) + 6, seed=sum(step_counts))
            )
            packed = [
                torch.cat([x[i, :n] for i, n in enumerate(step_counts)])
                for x in (scale, write, value, read, query)
            ]
            *moving, query = packed
            out.append(
                step.scan(
                    module,
                    "S",
                    torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64),
                    lambda S, a, u, w, r: (
                        a[..., None, None] * S
                        + u[..., None] * (w - torch.einsum("bhn,bhnv->bhv", r, S))[:, :, None]
                    ),
                    moving,
                    read=lambda S, q: torch.einsum("bhn,bhnv->bhv", q, S),
                    asked=(query,),
                    linear=linear,
                )
            )
            step.commit()
        found.append(out)
    close(found[0], found[1])
