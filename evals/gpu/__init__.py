"""What a GPU box without a network needs: pack it here, install it there, and run everything once.

`pack` makes the pieces, `install` joins them there, `python -m evals.gpu` (`make bench-gpu`) runs.
"""
