"""What a layer's hidden state, query, key and output are, for teacher and student alike."""
