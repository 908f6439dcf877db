"""The demo: a messy pool of pictures to a measured backbone on one page, by `make demo`."""
