"""Blocks of the decoder, one kind a file; routed ones are in `fuyu_e2e.model.routing`."""
