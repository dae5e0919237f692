"""`python -m gmm_jepa` is the `gmm-jepa` command; `torchrun -m gmm_jepa` starts it on many."""

import sys

from gmm_jepa.cli import main

sys.exit(main())
