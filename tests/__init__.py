"""Tests of milvus-cdc, from single functions up to real servers."""
