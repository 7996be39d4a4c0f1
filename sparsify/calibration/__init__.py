"""Calibration: the most time saved, per bucket of key lengths, whose error passes a gate on documents never used.

    plan = sparsify.calibrate(model, documents, max_error=0.005, out="plan.json")

    search.py    `calibrate`: the order of things, and what is chosen
    request.py   what it is asked for: arguments checked, lengths, what results depend on
    samples.py   samples to documents, documents to windows, windows to two shares: to choose on, and to judge on
    runs.py      one compiled model, run under one budget after another; every result goes through the journal
    metrics.py   what an error is: KL, loss, a function of the caller's, relative output error
    gains.py     what a budget saves here, from densities and the times of this machine
    gate.py      confidence bounds over documents, and the conditions that they must meet
    ladder.py    which tolerances held-out documents are asked about, and the largest that they let pass
    buckets.py   from what passed at single lengths to the buckets of a plan; the same again on other hardware
    promises.py  what each bucket may promise of missed peaks
    guarantee.py from documents to bounds, and to how far each head's tolerance must fall for them
    texts.py     text files to samples, for the command line
    journal.py   results on disk as they come: a run that was killed goes on where it was
    progress.py  where it is, and how long it will take
"""

from sparsify.calibration.samples import Sample
from sparsify.calibration.search import calibrate

__all__ = ["Sample", "calibrate"]
