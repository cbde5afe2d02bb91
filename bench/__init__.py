"""What proves the claims: lines of JSON under bench/results/, and the documents rendered from them."""
