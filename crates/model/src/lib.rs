//! The nouns and the rules: ids, states, transitions, placement; pure.
