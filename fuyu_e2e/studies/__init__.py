"""Experiments on what models learn, one command each: `python -m fuyu_e2e.studies NAME`; and the quickstart."""
