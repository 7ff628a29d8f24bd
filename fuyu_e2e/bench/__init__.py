"""Side-by-side measurements, one command each: `python -m fuyu_e2e.bench NAME`."""
