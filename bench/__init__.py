"""Load generation, the stand-in engine and the measurements; nothing here is installed with the product."""
