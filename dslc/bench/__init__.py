"""Timing a compiled model beside what its user would otherwise run.

Each contestant runs in a process of its own (`worker`), so that no library's threads are in
another's way. All load the same weights, then take turns: `rounds` asks each for a prefill and a
decode, again and again, so that whatever else the machine does hits all of them alike.
"""
