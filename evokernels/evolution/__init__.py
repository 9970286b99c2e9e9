"""Evolution of optimizers: evaluate genomes by training, journal every evaluation, report."""
