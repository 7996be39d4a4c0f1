"""Version of what compiled graphs bake in from the ops: their fakes (output shapes and strides).

It is an argument of the ops that graphs call, because compile caches key a graph by its text, not by an op's body.
Raise it whenever a fake changes.
"""

VERSION = 3
