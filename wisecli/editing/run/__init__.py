"""One run of ``wise edit``: workers, executors, locks, staging and its cost."""
