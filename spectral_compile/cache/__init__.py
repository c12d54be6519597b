"""The compressed cache as a log that several readers and several caches may share.

``timeline`` holds what all layers of one cache have in common: which columns are tokens, their positions and the ledger.
``store`` holds one layer's codes, bases and exact tokens, and how it grows, is copied and is decoded.
``sharing`` says who reads how much of a store, and lets layers that are copied one by one end up on one timeline.
"""
