"""What tests share: tiny models, directories of every kind, the method once more as loops."""
