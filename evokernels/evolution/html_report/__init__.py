"""``report.html``: what a run came to, as one page without scripts."""
