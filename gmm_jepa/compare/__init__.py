"""Several systems trained alike on one corpus, each run an ordinary one, and one page on them."""
