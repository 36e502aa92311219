"""The programs of the fork; `make help` lists what they do, and each runs as `python -m scripts.NAME`."""
