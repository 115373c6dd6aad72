"""What a stock checkpoint is made of: a stream with more channels, and decoder blocks of any kind."""
