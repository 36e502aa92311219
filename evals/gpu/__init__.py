"""What a GPU box without a network needs: pack it here, install it there, and run everything once.

`pack` makes the pieces, `install` joins them there, `python -m evals.gpu` (`make bench-gpu`) runs.
"""

import evals.provenance  # noqa: F401  puts scripts/ on the path
