"""The edge: decode, call a use case, encode. The only home of Quart."""
