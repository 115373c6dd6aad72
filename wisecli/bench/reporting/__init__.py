"""Tables, plots and the one page that ``wise bench`` writes of its results."""
