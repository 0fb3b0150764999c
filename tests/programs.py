"""Random models in the language: valid by construction, small, and unlike anything published.

A block's equations are made one after another, each from values that are there already; ``Block``
keeps what axes these have. What comes out uses the language as no single model does: chains of
contractions, masks that are no masks, picks of picks, caches read in odd ways, blocks lifted over
whatever stands there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.programs_base import FEW, MASKS, Value, Written


class Block(Written):
    """The kinds of equation that a block may be given."""

    # -- what an equation may be -----------------------------------------------------------------

    def project(self) -> None:
        """A product with a stored matrix, whose rows and columns may be products or sums."""
        v = self.value(lambda v: bool(self.plain(v)))
        if v is None:
            return
        over = self.some(self.plain(v), 1, 2)
        kept = [a for a in v.axes if a not in over]
        made = [self.new() for _ in range(self.one((0, 1, 1, 2, 2)))]
        if not self.fits([*kept, *made]):
            return
        rows, columns = list(made), list(over)
        if len(made) == 2:
            form = self.one(("apart", "product", "sum"))
            if form == "product":
                rows = [f"({','.join(made)})"]
            elif form == "sum":
                rows = made = ["|".join(made)]
        if len(over) == 2 and self.maybe():
            columns = [f"({','.join(over)})"]
        both = [*columns, *rows] if self.maybe() else [*rows, *columns]
        w = self.param(*both)
        text = f"{w} * {v}" if self.maybe() else f"{v} * {w}"
        if self.maybe():
            text += self.one((" * 0.5", " / 2", " * W", " * w"))
            if text.endswith(" * W"):
                text = text[:-1] + self.param()
            elif text.endswith(" * w"):
                text = text[:-1] + self.param(self.one(made)) if made else text[:-4]
        self.let([*kept, *made], text)

    def multiply(self) -> None:
        """A product of values, summed over some of what they share."""
        v = self.value()
        assert v is not None
        w = self.value(lambda w: self.fits(tuple(dict.fromkeys((*v.axes, *w.axes)))))
        if w is None:
            return
        shared = [a for a in v.axes if a in w.axes and a != "t"]
        over = self.some(shared, 0, 2)
        left = [a for a in dict.fromkeys((*v.axes, *w.axes)) if a not in over]
        text = f"{v} * {w}" if self.maybe() else f"0.5 * {v} * {w}"
        third = self.value(lambda z: set(z.axes) <= set(left) and "s" not in over)
        if third is not None and third.axes and self.maybe():
            text += f" * {third}" if self.maybe() else f" / (1 + abs({third}))"
        if not over:
            text = f"squash({text})" if self.maybe() else text
        self.let(left, text, v.exact and w.exact)

    def add(self) -> None:
        v = self.value()
        assert v is not None
        w = self.value(lambda w: set(w.axes) <= set(v.axes))
        assert w is not None
        lacking = [a for a in v.axes if a not in w.axes]
        other = f"broadcast[{','.join(lacking)}]({w})" if lacking else str(w)
        terms = [str(v), other] if self.maybe() else [other, str(v)]
        self.let(v.axes, self.one((" + ", " - ")).join(terms), v.exact and w.exact)

    def pointwise(self) -> None:
        v = self.value()
        assert v is not None
        text = self.one(FEW)
        smooth = not any(word in text for word in ("floor", "where", "max", "min"))
        self.let(v.axes, text.format(v), v.exact and smooth)

    def gate(self) -> None:
        v = self.value()
        assert v is not None
        text = self.one(("{0} * sigmoid({0})", "{0} * {0}", "{0} / (1 + exp(-{0}))", "{0} ^ 2"))
        self.let(v.axes, text.format(v), v.exact)

    def normed(self) -> None:
        v = self.value(lambda v: bool(self.plain(v)))
        if v is None:
            return
        over = self.some(self.plain(v), 1, 2)
        square = self.one(("{0} * {0}", "{0} ^ 2")).format(v)
        eps = self.one((" + 0.5", " + 1", ""))
        mean = f"mean[{','.join(over)}]({square})" + (eps or " + 1e-2")
        text = self.one(("{0} * rsqrt({1})", "{0} / sqrt({1})", "{0} * ({1}) ^ -0.5",
                         "{0} / {1}", "1 / sqrt({1}) * {0}")).format(v, f"({mean})")  # fmt: skip
        if self.maybe():
            text += f" * {self.param(*over)}"
        self.let(v.axes, text, v.exact)

    def soft(self) -> None:
        v = self.value(lambda v: bool(self.plain(v)) and not any("|" in a for a in v.axes))
        if v is not None:
            axis = self.one(self.plain(v))
            fn = self.one(("softmax", "centred"))
            self.let(v.axes, f"{fn}[{axis}]({v})", v.exact)

    def reduce(self) -> None:
        v = self.value(lambda v: bool(self.plain(v)) and not any("|" in a for a in v.axes))
        if v is not None:
            over = self.some(self.plain(v), 1, 2)
            fn = self.one(("sum", "mean", "max", "min"))
            text = f"{fn}[{','.join(over)}]({v})"
            self.let([a for a in v.axes if a not in over], text, v.exact)

    def cached(self) -> None:
        v = self.value(lambda v: "t" in v.axes and "s" not in v.axes)
        assert v is not None
        if not self.maybe():
            v = self.value(lambda v: "t" in v.axes and "s" not in v.axes and len(v.axes) > 1) or v
        axes = self.some([*self.plain(v), "s"], 9)
        value = Value(self.name("c"), tuple(axes), v.exact)
        dtype = ": f32" if self.maybe() else ""
        self.lines.append(f"cached {value}{dtype} = {v}")
        self.values.append(value)

    def shifted(self) -> None:
        """A history some tokens before, or at several of them."""
        v = self.value(lambda v: "s" in v.axes and "t" not in v.axes)
        if v is None:
            return
        place, axes = self.one(("t-1", "t-3", "t-{0}", "t+{0}-{1}")), ["t", *self.plain(v)]
        if "{" in place:
            axes.append(self.new())
            place = place.format(axes[-1], self.size(axes[-1]) - 1)
        if self.fits(axes):
            self.let(axes, v.where("s", place), v.exact)

    def remembered(self) -> None:
        """A state, with a value that belongs to it or without."""
        v = self.value(lambda v: "t" in v.axes and "s" not in v.axes)
        assert v is not None
        w = self.value(
            lambda w: "s" not in w.axes and self.fits(tuple(dict.fromkeys((*v.axes, *w.axes))))
        )
        axes = list(dict.fromkeys((*v.axes, *(w.axes if w is not None else ()))))
        new = f"{v} * {w}" if w is not None and self.maybe() else str(v)
        axes = axes if " * " in new else list(v.axes)
        state = Value(self.name("S"), tuple(self.some(axes, 9)), v.exact)
        before, plain = state.where("t", "t-1"), [a for a in axes if a != "t"]
        gates = [g for g in self.values if "s" not in g.axes and set(g.axes) <= set(axes)]
        rate = self.one(("0.5", "-0.3", *(f"sigmoid({g})" for g in gates)))
        text = self.one(("{r} * {b} + {n}", "{n} - tanh({b}) * {r}", "{r} * max({b}, 0) + {n}"))
        if plain and not any("|" in a for a in plain) and self.maybe():
            over = self.one(plain)
            old = Value(self.name("v"), tuple(a for a in axes if a != over))
            self.lines.append(f"let {old} = mean[{over}]({before})")
            text = "{n} * 0.5 + {b} * " + f"tanh({old})"
        start = self.one(("0", "0.5", "W"))
        start = self.param(*plain) if start == "W" else start
        text = text.format(r=rate, b=before, n=new)
        dtype = self.one(("", "", ": f32", ": act"))
        self.lines.append(f"scan {state}{dtype} = {text} from {start}")
        self.values.append(state)

    def along(self) -> None:
        """A history reduced under a mask."""
        v = self.value(lambda v: "s" in v.axes)
        if v is None:
            return
        fn, rest = self.one((("sum", "0.0"), ("max", "-2.0"), ("min", "3.0"), ("mean", "0.0")))
        axes = [a for a in dict.fromkeys(("t", *v.axes)) if a != "s"]
        text = f"{fn}[s](where({self.one(MASKS)}, {v}, {rest}))"
        self.let(axes, text + self.one(("", " / (position[t] + 1)")), v.exact)

    def attend(self) -> None:
        """Scores of queries with a history, a mask, and a value; keys and values may come from a
        latent, whose weights an order of contractions may bring to the queries."""
        heads = [self.new() for _ in range(self.one((0, 1, 1, 2)))]
        n, m = self.new(), self.new()
        if self.maybe():
            r = self.new(self.one((3, 5, 7)))
            source = f"c0{r}[s,{r}]"
            self.lines.append(f"cached {source} = {self.param(r, 'd')} * x[t,d]")
            keys = self.let(["s", *self.some(heads), n], "")
            self.lines[-1] += f"{self._stored(keys.axes, 's', r)} * {source}"
            value = self.let(["s", *self.some(heads), m], "")
            self.lines[-1] += f"{self._stored(value.axes, 's', r)} * {source}"
        else:
            keys = Value(self.name("c"), ("s", *self.some(heads), n))
            self.lines.append(f"cached {keys} = {self._stored(keys.axes, 's', 'd')} * x[t,d]")
            value = Value(self.name("c"), tuple(self.some(["s", *self.some(heads), m], 9)))
            self.lines.append(f"cached {value} = {self._stored(value.axes, 's', 'd')} * x[t,d]")
            self.values += [keys, value]
        query = self.let(["t", *heads, n], "")
        self.lines[-1] += f"{self._stored(query.axes, 't', 'd')} * x[t,d]"
        score = self.one(("{} * {}", "{1} * {0}")).format(query, keys)
        score = self.one(("{}", "{} * 0.5", "({}) / 2", "2 * ({})", "{} * 0.3", "-({})")).format(
            score
        )
        form = self.one("plain plain plain bias term".split())
        if heads and form == "bias":
            bias = self.one(("- {} * (position[t] - position[s])", "+ {} * position[s]",
                             "+ {} / (1 + abs(position[t] - position[s]))"))  # fmt: skip
            score += " " + bias.format(self.param(self.one(heads)))
        elif form == "term":
            more = self.param(*heads, "d")
            self.lines.append(f"cached e{n}[s] = {self.param('d')} * x[t,d]")
            query = self.let(["t", *heads], f"{more} * x[t,d]")
            score = self.one(("({}) + {} * e{}[s]", "({}) - {} * e{}[s]")).format(score, query, n)
        self.masked(self.let(["t", "s", *heads], score), value)

    def _stored(self, axes: Sequence[str], but: str, last: str) -> str:
        return self.param(*(a for a in axes if a != but), last)

    def masked(self, score: Value | None = None, value: Value | None = None) -> None:
        score = score or self.value(lambda v: "s" in v.axes)
        if score is None:
            return
        mask = self.one(MASKS)
        axes = list(dict.fromkeys((*score.axes, "t")))
        inside = self.one((
            "where({0}, {1}, -inf)", "where(not ({0}), -inf, {1})", "0.7 * where({0}, {1}, -inf)",
            "where({0}, {1}, -inf)", "where(position[s] <= position[t], {1}, -inf)",
            "where({0} and {1} > -2, {1}, -inf)",
            "where(position[s] <= position[t], where({0}, {1}, -inf), -inf)",
            "where({0}, {1}, -3.0)", "{2}", "where({0}, 2 * {1}, -inf)",
        ))  # fmt: skip
        plain = score if "t" in score.axes else f"broadcast[t]({score})"
        inside = inside.format(mask, score, plain)
        p = self.let(axes, f"softmax[s]({inside})", score.exact)
        v = value or self.value(lambda v: "s" in v.axes and "t" not in v.axes)
        if v is None:
            return
        left = [a for a in dict.fromkeys((*axes, *v.axes)) if a != "s"]
        if self.fits(left):
            self.let(left, f"{p} * {v}", p.exact and v.exact)

    def pick(self) -> None:
        """The best of an axis, by place; then what stands there, here or in a table."""
        v = self.value(lambda v: v.exact and "s" not in v.axes and bool(self.plain(v))
                       and not any("|" in a for a in v.axes))  # fmt: skip
        if v is None:
            return
        axis = self.one(self.plain(v))
        count = self.draw(st.integers(1, self.size(axis)))
        k = self.new(count)  # type: ignore[arg-type]
        rest = [a for a in v.axes if a != axis]
        if self.maybe():
            self.let([*rest, k], f"top[{axis} -> {k}]({v})")
            return
        at = f"{self.name('p')}[{','.join([*rest, k])}]"
        self.lines.append(f"{at} = argtop[{axis} -> {k}]({v})")
        what = self.one(("itself", "another", "rows", "row of each"))
        if what == "itself":
            self.let([*rest, k], v.where(axis, at))
        elif what == "rows":
            o = self.new()
            self.let([*rest, k, o], self.param(axis, o).replace(f"[{axis}", f"[{at}"))
        elif what == "row of each" and self.plain(Value("", tuple(rest))):
            own, o = self.one(self.plain(Value("", tuple(rest)))), self.new()
            self.let([*rest, k, o], self.param(own, axis, o).replace(f",{axis}", f",{at}"))
        else:
            other = self.value(lambda w: axis in w.axes and self.fits(
                tuple(dict.fromkeys((*rest, k, *(a for a in w.axes if a != axis))))))  # fmt: skip
            if other is not None:
                axes = dict.fromkeys((*rest, k, *(a for a in other.axes if a != axis)))
                self.let(tuple(axes), other.where(axis, at), other.exact)

    def among(self) -> None:
        v = self.value(lambda v: v.exact and "s" not in v.axes and bool(self.plain(v))
                       and not any("|" in a for a in v.axes))  # fmt: skip
        if v is None:
            return
        axis = self.one(self.plain(v))
        count = self.draw(st.integers(1, self.size(axis)))
        open_ = f"{self.name('b')}[{','.join(v.axes)}]"
        self.lines.append(f"{open_} = in_top[{axis}, {count}]({v})")
        self.let(v.axes, f"where({open_}, {v}, {self.one(('0', '-1.0', '0.5'))})", False)

    def experts(self) -> None:
        """An array of blocks, picked by data, one after another, or all of them."""
        v = self.value(lambda v: "s" not in v.axes and bool(self.plain(v))
                       and not any("|" in a for a in v.axes))  # fmt: skip
        if v is None:
            return
        axis = self.one(self.plain(v))
        rest = [a for a in v.axes if a != axis]
        e = self.new(self.one((1, 2, 3, 4)))
        k = self.new(self.draw(st.integers(1, self.sizes[e])))  # type: ignore[arg-type]
        if not self.fits([*rest, e, axis]):
            return
        array, score = self.name("blocks"), self.name("r")
        inner = f"{axis}, {self.new()}"
        block = self.one((f"Two[{axis}]", f"SwiGLU[{inner}]"))
        self.members.append(f"use {array}[{e}] = {block}")
        score = f"{score}[{','.join([*rest, e])}]"
        w = self.param(e, axis)
        self.lines.append(f"{score}: f32 = {self.one(('', 'softmax[' + e + ']'))}({w} * {v})")
        if self.maybe():
            self.let([*rest, axis], f"{score} * {array}[{e}]({v})", v.exact)
            return
        if not v.exact:
            return
        at = f"{self.name('p')}[{','.join([*rest, k])}]"
        self.lines.append(f"{at} = argtop[{e} -> {k}]({score})")
        gate = score.replace(f"{e}]", f"{at}]")
        routed = f"{array}[{at}]({v})"
        form = self.one(("gated", "kept", "summed", "most"))
        if form == "gated":
            self.let([*rest, axis], f"{gate} * {routed}")
        elif form == "summed":
            self.let([*rest, axis], f"sum[{k}]({gate} * {routed})")
        elif form == "most":
            self.let([*rest, axis], f"max[{k}]({routed})")
        else:
            self.let([*rest, k, axis], routed)

    def called(self) -> None:
        """A block of one vector on whatever ranges over its index."""
        v = self.value(lambda v: bool(self.plain(v)) and not any("|" in a for a in v.axes))
        if v is None:
            return
        axis = self.one(self.plain(v))
        if axis not in self.norms or self.maybe():
            self.norms[axis] = self.name("norm")
            block = self.one((f"RMSNorm[{axis}]", f"Two[{axis}]", f"SwiGLU[{axis}, {self.new()}]"))
            self.members.append(f"use {self.norms[axis]} = {block}")
        self.let(v.axes, f"{self.norms[axis]}({v})", v.exact)

    def rotated(self) -> None:
        def even(value: Value) -> list[str]:
            return [a for a in self.plain(value) if "|" not in a and self.size(a) % 2 == 0]

        v = self.value(lambda v: ("t" in v.axes) != ("s" in v.axes) and bool(even(v)))
        if v is not None:
            fn = self.one(("rotary", "rotary_halves"))
            at = "t" if "t" in v.axes else "s"
            self.let(v.axes, f"{fn}[{self.one(even(v))}]({v}, position[{at}])", v.exact)

    def viewed(self) -> None:
        """A part of a sum, a place, another name, an axis taken apart or several as one."""
        v = self.value(lambda v: bool(self.plain(v)))
        if v is None:
            return
        axis = self.one(self.plain(v))
        rest = [a for a in v.axes if a != axis]
        if "|" in axis:
            part = self.one(axis.split("|"))
            if part not in v.axes:
                self.let([*rest, part], v.where(axis, part), v.exact)
            return
        size = self.size(axis)
        form = self.one(("place", "name", "apart", "strided"))
        if form == "place":
            place = self.draw(st.integers(0, size - 1))
            self.let(rest, v.where(axis, str(place)), v.exact)
        elif form == "name":
            b = self.new(size, f"size({axis})")
            self.let([*rest, b], v.where(axis, b), v.exact)
        elif size % 2 == 0:
            o, p = self.new(2), self.new(size // 2, f"size({axis}) / 2")
            both = f"({o},{p})" if self.maybe() else f"({p},{o})"
            if form == "apart":
                self.let([*rest, o, p], v.where(axis, both), v.exact)
            else:
                self.let([*rest, p], v.where(axis, both.replace(o, self.one("01"))), v.exact)

    def joined(self) -> None:
        v = self.value(lambda v: not any("|" in a for a in v.axes))
        if v is None:
            return
        w = self.value(lambda w: set(w.axes) == set(v.axes))
        assert w is not None
        if self.maybe() or not self.plain(v):
            o = self.new(2)
            if self.fits([*v.axes, o]):
                self.let([*v.axes, o], f"stack[{o}]({v}, {w} * 2)", v.exact and w.exact)
            return
        axis = self.one(self.plain(v))
        a, b = (self.new(self.size(axis), f"size({axis})") for _ in range(2))
        both = f"{a}|{b}"
        if self.fits([both if a == axis else a for a in v.axes]):
            axes = [both if a == axis else a for a in v.axes]
            text = f"concat[{both}]({v.where(axis, a)}, {w.where(axis, b)})"
            self.let(axes, text, v.exact and w.exact)

    def places(self) -> None:
        form = self.one(("cos(0.3 * position[t])", "1 / (1 + position[t])", "position[t] > 1"))
        if form.endswith("> 1"):
            form = f"where({form}, 1, 0)"
        if self.maybe():
            axis = self.one([a for a in self.sizes if a not in ("t", "s")])
            self.let(["t", axis], f"{form} * ({axis} + 1)")
        else:
            self.let(["t"], form)

    def inner(self) -> None:
        v = self.value(lambda v: bool(self.plain(v)) and not any("|" in a for a in v.axes))
        if v is None:
            return
        axis = self.one(self.plain(v))
        w = self.value(lambda w: axis in w.axes and not any("|" in a for a in w.axes)
                       and self.fits(tuple(dict.fromkeys((*v.axes, *w.axes)))))  # fmt: skip
        assert w is not None
        left = [a for a in dict.fromkeys((*v.axes, *w.axes)) if a != axis]
        self.let(left, f"inner[{axis}]({v}, {w})", v.exact and w.exact)

    # -- the result ------------------------------------------------------------------------------

    def finish(self) -> str:
        terms = ["x[t,d]"]
        read = " ".join(line.partition("=")[2] for line in self.lines)
        last = [v for v in self.values[1:] if not re.search(rf"\b{v.name}\b", read)][-5:]
        for v in [*last, *self.some(self.values[1:], most=1)]:
            if "s" in v.axes:
                axes = [a for a in dict.fromkeys(("t", *v.axes)) if a != "s"]
                text = f"sum[s](where({self.one(MASKS)}, {v}, 0.0)) / (position[t] + 1)"
                v = self.let(axes, text, plain=True)
            rest = self.plain(v)
            if "d" in rest and len(rest) > 1:
                others = [a for a in rest if a != "d"]
                v = self.let(
                    [a for a in v.axes if a not in others],
                    f"{self.param(*others)} * {v}", plain=True,
                )  # fmt: skip
                rest = ["d"]
            term = str(v)
            if rest and rest != ["d"]:
                term = f"{self.param('d', *rest)} * {v}"
            elif not rest:
                term = f"{self.param('d')} * {v}"
            if "t" not in v.axes:
                term = f"broadcast[t](squash({term}))"
            elif rest != ["d"]:
                name = self.name("v")
                self.lines.append(f"{name}[t,d] = {term}")
                term = f"{name}[t,d]"
            terms.append(f"squash({term})" if "t" in v.axes else term)
        return f"y[t,d] = {' + '.join(terms)}"
