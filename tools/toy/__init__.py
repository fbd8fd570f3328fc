"""The toy: a tiny LTX-2.3 trained on synthetic clips. Tools only, never imported by the pack."""
