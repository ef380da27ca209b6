"""What an experiment found, as one self-contained page: claims with evidence, tables, curves and provenance."""
