"""The order that torch sorts by, in kernels."""

LOWEST = -(1 << 63)  # below every key

# A float as a whole number of the same order. -0.0 counts as 0.0, and NaN, which torch sorts to the
# front, as more than infinity. Below it comes the place, so that the lowest of equals is greatest.
ORDERED = '''\
@triton.jit
def ordered(x, place):
    """int64 keys: by the float32 x, of equal ones by place, the lowest first; NaN before all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
'''
