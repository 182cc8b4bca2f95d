//! House rules that no compiler knows: sizes, names, and which crate may use which.
//!
//! A rule that only stands in a document is broken within a month; here it fails the check, with the place and what
//! to do. Exceptions are listed below with their reason, and an exception that is no longer needed fails too.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Longest file, in lines without its tests.
const FILE_LINES_MAX: usize = 800;
/// Longest function, in lines.
const FUNCTION_LINES_MAX: usize = 70;

/// Files or functions that may be longer, each with its reason: (`path` or `path::function`, reason).
const LONG: &[(&str, &str)] = &[];

/// Which of our crates each of our crates may use, beyond dev-dependencies. An arrow that is not here must not
/// compile: that is what the crates are for.
const ARROWS: &[(&str, &[&str])] = &[
    ("berth-qmp", &[]),
    ("berth-stream", &[]),
    ("berth-inspect", &[]),
    ("berth-backup", &["berth-model"]),
    ("berth-model", &[]),
    ("berth-api", &["berth-model"]),
    ("berth-store", &["berth-model"]),
    ("berth-tlog", &[]),
    ("berth-agent", &["berth-qmp", "berth-stream", "berth-inspect", "berth-model", "berth-api"]),
    ("berth-manager", &["berth-model", "berth-api", "berth-store", "berth-tlog"]),
    (
        "berth-cli",
        &["berth-api", "berth-backup", "berth-model", "berth-manager", "berth-agent", "berth-tlog"],
    ),
    (
        "berth-sim",
        &[
            "berth-qmp",
            "berth-stream",
            "berth-model",
            "berth-api",
            "berth-store",
            "berth-agent",
            "berth-manager",
        ],
    ),
    ("berth-e2e", &["guest-probe"]),
    ("guest-probe", &[]),
    ("xtask", &["guest-probe", "berth-e2e"]),
];

/// Crates that other crates must not meet, and who may: what the design forbids by name.
const OUTSIDERS: &[(&str, &[&str])] = &[
    ("anyhow", &["berth-cli", "xtask", "berth-e2e"]),
    ("rusqlite", &["berth-store"]),
    ("rustic_core", &["berth-backup"]),
    ("ureq", &["berth-backup"]),
    ("cedar-policy", &["berth-manager"]),
    ("axum", &["berth-agent", "berth-manager", "berth-sim"]),
    (
        "tokio",
        &["berth-qmp", "berth-api", "berth-store", "berth-agent", "berth-manager", "berth-cli", "berth-sim"],
    ),
];

/// Checks the whole repository, and says everything that is wrong with it.
///
/// # Errors
/// When a rule is broken.
pub fn run() -> Result<()> {
    let mut faults = Vec::new();
    let files = tracked_files()?;
    let mut used = vec![false; LONG.len()];
    for path in &files {
        let Ok(text) = fs::read_to_string(path) else { continue };
        if path.ends_with(".rs") {
            check_rust(path, &text, &mut used, &mut faults);
        }
        if path.ends_with(".md") {
            check_links(path, &text, &mut faults);
        }
    }
    for (index, (name, _)) in LONG.iter().enumerate() {
        if !used[index] {
            faults.push(format!(
                "xtask/src/tidy.rs: the exception for {name} is no longer needed: take it out"
            ));
        }
    }
    check_arrows(&mut faults)?;
    if faults.is_empty() {
        return Ok(());
    }
    for fault in &faults {
        eprintln!("tidy: {fault}");
    }
    bail!("tidy found {} faults", faults.len())
}

fn tracked_files() -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("git ls-files")?;
    let names = String::from_utf8(output.stdout).context("names of files")?;
    Ok(names.lines().map(str::to_owned).collect())
}

fn check_rust(path: &str, text: &str, used: &mut [bool], faults: &mut Vec<String>) {
    let is_test = path.contains("/tests/") || path.ends_with("/tests.rs");
    if path.ends_with("/mod.rs") {
        faults.push(format!("{path}: name the file after the module, not mod.rs"));
    }
    let lines: Vec<&str> = text.lines().collect();
    let own = lines.iter().position(|line| *line == "#[cfg(test)]").unwrap_or(lines.len());
    if own > FILE_LINES_MAX && !is_test && !excepted(path, used) {
        faults.push(format!(
            "{path}: {own} lines without tests, at most {FILE_LINES_MAX}: split it by what it holds"
        ));
    }
    for (name, line, length) in functions(&lines) {
        if length > FUNCTION_LINES_MAX && !excepted(&format!("{path}::{name}"), used) {
            faults.push(format!("{path}:{line}: {name} has {length} lines, at most {FUNCTION_LINES_MAX}"));
        }
    }
    for (index, line) in lines.iter().enumerate() {
        for word in ["src", "dst"] {
            if has_identifier(line, word) {
                faults.push(format!("{path}:{}: say source and target, not {word}", index + 1));
            }
        }
    }
}

fn excepted(name: &str, used: &mut [bool]) -> bool {
    let found = LONG.iter().position(|(excepted, _)| *excepted == name);
    if let Some(index) = found {
        used[index] = true;
    }
    found.is_some()
}

/// Functions with their first line (from 1) and length, told by rustfmt's indentation.
fn functions<'a>(lines: &[&'a str]) -> Vec<(&'a str, usize, usize)> {
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let body = line.trim_start();
        let indent = line.len() - body.len();
        let Some(name) = function_name(body) else { continue };
        let close = format!("{}}}", " ".repeat(indent));
        let end = lines[start..].iter().position(|line| {
            *line == close || line.trim_end().ends_with(';') && line.len() - line.trim_start().len() == indent
        });
        if let Some(length) = end {
            found.push((name, start + 1, length + 1));
        }
    }
    found
}

fn function_name(line: &str) -> Option<&str> {
    let mut rest = line;
    for word in ["pub ", "pub(crate) ", "pub(super) ", "const ", "async ", "unsafe ", "extern \"C\" "] {
        rest = rest.strip_prefix(word).unwrap_or(rest);
    }
    let rest = rest.strip_prefix("fn ")?;
    rest.split(['(', '<']).next()
}

/// Whether a line of code has an identifier that is `word`, or begins or ends with it as one of its parts.
fn has_identifier(line: &str, word: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let outside_strings: String = code.split('"').step_by(2).collect::<Vec<_>>().join(" ");
    outside_strings
        .split(|character: char| !character.is_alphanumeric() && character != '_')
        .any(|identifier| identifier.split('_').any(|part| part == word))
}

fn check_links(path: &str, text: &str, faults: &mut Vec<String>) {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    for (index, line) in text.lines().enumerate() {
        for part in line.split("](").skip(1) {
            let Some(link) = part.split(')').next() else { continue };
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !folder.join(file).exists() {
                faults.push(format!("{path}:{}: the link to {link} leads nowhere", index + 1));
            }
        }
    }
}

fn check_arrows(faults: &mut Vec<String>) -> Result<()> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .output()
        .context("cargo metadata")?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let arrows: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = arrows.get(name) else {
            faults.push(format!("xtask/src/tidy.rs: {name} is a new crate: say which crates it may use"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if dependency["kind"] == "dev" {
                continue;
            }
            let used = dependency["name"].as_str().unwrap_or_default();
            if arrows.contains_key(used) && !allowed.contains(&used) {
                faults.push(format!("{name} must not use {used}: the design has no such arrow"));
            }
            let outsider = OUTSIDERS.iter().find(|(outsider, _)| *outsider == used);
            if outsider.is_some_and(|(_, allowed)| !allowed.contains(&name)) {
                faults.push(format!("{name} must not use {used}: the design keeps it elsewhere"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_measured_from_its_name_to_its_brace() {
        let text =
            "impl A {\n    pub async fn b(\n        x: u8,\n    ) {\n        y();\n    }\n}\nfn c() {}\n";
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(functions(&lines).first(), Some(&("b", 2, 5)));
    }

    #[test]
    fn only_whole_words_of_code_count_as_names() {
        assert!(has_identifier("let src_path = 1;", "src"));
        assert!(!has_identifier("let path = 1; // src", "src"));
        assert!(!has_identifier("let srcset = 1;", "src"));
    }
}
