"""Blocks of the decoder, each kind a file; routed ones are in `fuyu_e2e.model.routing`."""
