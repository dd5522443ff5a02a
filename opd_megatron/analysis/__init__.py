"""What training did to the weights: where an update goes, how few directions it has, and what its parts are worth."""
