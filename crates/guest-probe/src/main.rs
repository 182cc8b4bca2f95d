//! Guest probe.
fn main() {}
