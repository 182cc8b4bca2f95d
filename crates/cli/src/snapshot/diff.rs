//! `berth snapshot diff`: what differs between two snapshots, or between one and now.
//!
//! *Now* is a snapshot that is taken for it and deleted again: a guest that runs has no state that could be compared
//! while it changes. Whoever may take snapshots and not delete them keeps it, and is told its name.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateSnapshot, DiffQuery, SnapshotCreate, SnapshotDelete, SnapshotDiff as Route, SnapshotShow,
};
use berth_model::diff::{FileChangeKind, SnapshotDiff};
use berth_model::operation::OperationResult;
use clap::Args;

use super::{BASELINE, Which, change_query, find};
use crate::arguments::ChangeArguments;
use crate::exit::Failure;
use crate::lookup::VmRef;
use crate::output::{plain, word};
use crate::session::Session;
use crate::{units, wait};

/// The word for the VM as it is.
const NOW: &str = "now";

/// What to compare.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The VM
    vm: VmRef,
    /// The earlier snapshot's name or id; 'baseline' is the VM's baseline
    #[arg(default_value = BASELINE)]
    from: String,
    /// The later one; 'now' takes a snapshot for it, and deletes it again
    #[arg(default_value = NOW)]
    to: String,
    /// Read all files, also those whose size and times agree: finds what was made to look untouched
    #[arg(long)]
    content: bool,
    /// List at most so many changed files; all are counted
    #[arg(long, value_name = "N", default_value = "200", value_parser = clap::value_parser!(u32).range(0..=10_000))]
    limit: u32,
}

/// Compares, and shows what differs.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, arguments: Arguments) -> Result<(), Failure> {
    let Arguments { vm, from, to, content, limit } = arguments;
    let from = find(session, &Which { vm: vm.clone(), snapshot: from }).await?;
    let (to, taken) = if to == NOW {
        let name = take(session, &vm).await?;
        (name.clone(), Some(name))
    } else {
        let found = find(session, &Which { vm: vm.clone(), snapshot: to }).await?;
        (found.id.to_string(), None)
    };
    let query = DiffQuery { to: Some(to), content: Some(content), limit: Some(limit) };
    let diff = session.send::<Route>(&vm.snapshot_path(from.id.as_str()), &query, &()).await;
    if let Some(name) = taken {
        give_back(session, &vm, &name).await;
    }
    let diff = diff?;
    session.output.done(&diff, || in_words(&diff))
}

/// Takes a snapshot to compare with, and gives its id.
async fn take(session: &Session, vm: &VmRef) -> Result<String, Failure> {
    let change = ChangeArguments::default();
    let wish = CreateSnapshot { note: "taken to compare with".to_owned(), ..CreateSnapshot::default() };
    let reply = session.send::<SnapshotCreate>(&vm.path(), &change_query(change), &wish).await?;
    let over = wait::carry_through(session, change, reply).await?;
    match over.and_then(|over| over.result) {
        Some(OperationResult::Snapshot { snapshot, .. }) => Ok(snapshot.to_string()),
        _ => Err(Failure::from(berth_model::Problem::new(
            berth_model::ProblemCode::Internal,
            "the snapshot to compare with was taken and has no name",
        ))),
    }
}

async fn give_back(session: &Session, vm: &VmRef, snapshot: &str) {
    let path = vm.snapshot_path(snapshot);
    let change = ChangeArguments::default();
    let deleted = async {
        let reply = session.ask::<SnapshotDelete>(&path, &change_query(change)).await?;
        wait::carry_through(session, change, reply).await
    };
    if let Err(error) = deleted.await {
        let name = session.ask::<SnapshotShow>(&path, &Nothing {}).await;
        let name = name.map_or_else(|_| snapshot.to_owned(), |shown| shown.name.to_string());
        session.output.remark(&format!("the snapshot that was compared with stays, as {name}: {error:?}"));
    }
}

/// The whole answer, for people.
fn in_words(diff: &SnapshotDiff) -> String {
    let mut lines = Vec::new();
    for found in &diff.file_systems {
        for change in &found.changes {
            let sign = match change.kind {
                FileChangeKind::Added => '+',
                FileChangeKind::Removed => '-',
                FileChangeKind::Modified => '~',
            };
            let place = if found.volume == "disk" { String::new() } else { format!("{}:", found.volume) };
            let aspects: Vec<String> = change.aspects.iter().map(word).collect();
            let aspects =
                if aspects.is_empty() { String::new() } else { format!("  ({})", aspects.join(", ")) };
            lines.push(format!("{sign} {place}{}{aspects}", plain(&change.path)));
        }
        let listed = found.changes.len() as u64;
        let all = found.added + found.removed + found.modified;
        if listed < all {
            lines.push(format!("… and {} more (--limit)", all - listed));
        }
    }
    for change in &diff.configuration {
        let (field, from, to) = (&change.field, plain(&change.from), plain(&change.to));
        lines.push(format!("~ configuration {field}: '{from}' is now '{to}'"));
    }
    lines.extend(diff.unread.iter().map(|unread| format!("? {}", plain(unread))));
    lines.push(summary(diff));
    lines.join("\n")
}

fn summary(diff: &SnapshotDiff) -> String {
    let count =
        |of: fn(&berth_model::diff::FileSystemDiff) -> u64| -> u64 { diff.file_systems.iter().map(of).sum() };
    let files = format!(
        "files: {} added, {} removed, {} modified",
        count(|found| found.added),
        count(|found| found.removed),
        count(|found| found.modified)
    );
    let disk = format!("disk: {} written", units::bytes(diff.disk_written_bytes));
    let memory = match &diff.memory {
        Some(memory) => format!("memory: {} of {} pages changed", memory.changed_pages, memory.pages),
        None => "memory: not compared".to_owned(),
    };
    let configuration = match diff.configuration.len() {
        0 => "configuration: the same".to_owned(),
        changed => format!("configuration: {changed} changed"),
    };
    [files, disk, memory, configuration].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_model::diff::{ConfigurationChange, FileAspect, FileChange, FileSystemDiff, MemoryDiff};

    #[test]
    fn what_differs_is_said_in_lines_and_summed_up() {
        let change = |path: &str, kind, aspects: &[FileAspect]| FileChange {
            path: path.to_owned(),
            kind,
            aspects: aspects.to_vec(),
        };
        let diff = SnapshotDiff {
            disk_written_bytes: 3 << 20,
            file_systems: vec![FileSystemDiff {
                volume: "p1".into(),
                added: 2,
                removed: 0,
                modified: 1,
                changes: vec![
                    change("/etc/passwd", FileChangeKind::Modified, &[FileAspect::Content, FileAspect::Time]),
                    change("/tmp/x", FileChangeKind::Added, &[]),
                ],
            }],
            unread: vec!["p2: no ext2, ext3 or ext4 file system".into()],
            memory: Some(MemoryDiff { changed_pages: 12, pages: 65536 }),
            configuration: vec![ConfigurationChange {
                field: "memory_mib".into(),
                from: "256".into(),
                to: "512".into(),
            }],
        };
        let expected = "~ p1:/etc/passwd  (content, time)\n\
            + p1:/tmp/x\n\
            … and 1 more (--limit)\n\
            ~ configuration memory_mib: '256' is now '512'\n\
            ? p2: no ext2, ext3 or ext4 file system\n\
            files: 2 added, 0 removed, 1 modified; disk: 3.0 MiB written; \
            memory: 12 of 65536 pages changed; configuration: 1 changed";
        assert_eq!(in_words(&diff), expected);
    }
}
