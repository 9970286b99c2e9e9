"""From a genome to the text of its kernel: no torch here, so that setup.py can run it."""
