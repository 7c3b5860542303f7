from tests.store.fixtures import store, unsynced, whole_store

__all__ = ["store", "unsynced", "whole_store"]
