"""A control for compute-sanitizer: the least warp-specialised kernel, right by construction.

One warp writes a number a turn into one of two slots, four warps read it. Every write waits on an mbarrier that the
readers arrive at behind a barrier of all their threads; every read waits on one that the writer arrives at. What
racecheck reports of it, it reports of any kernel whose warps hand something over in this way.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

TURNS = 20


@gluon.jit
def _send(out, mail, full, empty, turns):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for turn in range(turns):
        slot = turn & 1
        mbarrier.wait(empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mail.index(slot).store(gl.full([1], turn * 3, gl.int32, one))
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _receive(out, mail, full, empty, turns):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = 0
    for turn in range(turns):
        slot = turn & 1
        mbarrier.wait(full.index(slot), (turn >> 1) & 1)
        total += gl.max(mail.index(slot).load(one), 0)
        mbarrier.arrive(empty.index(slot), count=1)
    gl.store(out + gl.program_id(0), total)


@gluon.jit
def _hand_over(out, turns):
    mail = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize([(_receive, (out, mail, full, empty, turns)), (_send, (out, mail, full, empty, turns))],
                       [1], [40])


def main() -> None:
    """Run it, and say in pytest's words whether the numbers arrived."""
    out = torch.empty(4, dtype=torch.int32, device="cuda")
    _hand_over[(len(out),)](out, TURNS, num_warps=4)
    right = out.tolist() == [3 * sum(range(TURNS))] * len(out)
    print("1 passed in 0.0s" if right else "1 failed in 0.0s")


if __name__ == "__main__":
    main()
