"""One folder per research system; the catalog lists them."""
