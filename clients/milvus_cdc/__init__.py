"""Adapters and nouns that the controller, the replicator, the command line and plugin authors
share.
"""
