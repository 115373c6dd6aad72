"""Methods that leave the weights as they are and run a trained module beside them."""
