//! What the kernel tells of processes, and of its own run.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Where the kernel names its present run.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The present run of the machine: another one after each start.
///
/// # Errors
/// When the kernel doesn't say.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// When a process started, in clock ticks since the machine's boot.
///
/// # Errors
/// When there is no such process.
pub fn start_time_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    fields(&stat)
        .and_then(|mut fields| fields.nth(19)?.parse().ok())
        .ok_or_else(|| io::Error::other("the kernel's line about the process can't be read"))
}

/// Whether a process is dead and only waits to be taken note of.
pub fn is_dead(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    matches!(fields(&stat).and_then(|mut fields| fields.next()), None | Some("Z" | "X"))
}

/// The fields from the state on. The name before them is anything that the process wanted, parentheses and blanks
/// included, so it is the last parenthesis that ends it.
fn fields(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace())
}

/// The processes that have a variable which begins so in the environment that they were started with.
pub fn with_environment(beginning: &[u8]) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| has_environment(pid, beginning))
        .collect()
}

/// Whether a process has a variable that begins so in the environment that it was started with.
pub fn has_environment(pid: i32, beginning: &[u8]) -> bool {
    environment(pid, beginning).is_some()
}

/// The value, as a path, of the variable that begins so in the environment that a process was started with.
pub fn environment(pid: i32, beginning: &[u8]) -> Option<PathBuf> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let variable = environment.split(|&byte| byte == 0).find(|variable| variable.starts_with(beginning))?;
    let value = variable.splitn(2, |&byte| byte == b'=').nth(1)?;
    Some(OsStr::from_bytes(value).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_parentheses_does_not_move_the_fields() {
        let stat = "42 (a) b (c)) S 1 2 3";
        assert_eq!(fields(stat).expect("fields").collect::<Vec<_>>(), ["S", "1", "2", "3"]);
    }

    #[test]
    fn this_process_started_after_the_boot_and_lives() {
        let pid = i32::try_from(std::process::id()).expect("number");
        assert!(start_time_ticks(pid).expect("alive") > 0);
        assert!(!is_dead(pid));
        assert!(is_dead(i32::MAX) && start_time_ticks(i32::MAX).is_err());
    }
}
