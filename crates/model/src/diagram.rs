//! Holds a step function against the diagram on top of its file: only in tests.

/// Compares the arrows of the file's diagram with those that the code has, each as `from --> to: event`.
pub(crate) fn check(file: &str, mut from_code: Vec<String>) {
    let mut from_diagram: Vec<String> = file
        .lines()
        .filter_map(|line| line.strip_prefix("//!     "))
        .filter(|line| line.contains("-->"))
        .map(str::to_owned)
        .collect();
    from_code.sort();
    from_diagram.sort();
    assert_eq!(from_code, from_diagram);
}
