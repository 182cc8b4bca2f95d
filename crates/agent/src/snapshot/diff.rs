//! What differs between two snapshots of a VM that are both on this host: files, memory, configuration.
//!
//! It is done outside the VM's queue, because it only reads what is never written again. A snapshot that is deleted
//! meanwhile stays readable for whoever has its files open, and is an error for whoever comes too late.

use std::collections::BTreeMap;

use berth_api::agent::{ComparePath, CompareQuery};
use berth_inspect::{Aspect, Comparison, FileSystemChanges, LayerFile, LayerFormat, Options};
use berth_model::diff::{
    ConfigurationChange, FileAspect, FileChange, FileChangeKind, FileSystemDiff, MemoryDiff, SnapshotDiff,
};
use berth_model::image::{PartFormat, PartRole};
use berth_model::{Problem, ProblemCode};
use berth_stream::{PageHash, PageIndex};
use serde_json::Value;

use super::archive::{self, ArchiveError, Manifest, SnapshotFiles};
use crate::agent::Agent;
use crate::disks;
use crate::durable::{self, FileError, blocking, with_causes};
use crate::layout::{HostRecord, VmDirs};

/// How many changes of files are listed when nobody says.
const LIST_DEFAULT: usize = 200;
/// What is not shown of a specification: it may hold passwords.
const HIDDEN: &str = "user_data";

/// Compares two snapshots of a VM.
///
/// # Errors
/// When one of them is not here, or a layer can't be read.
pub async fn compare(agent: &Agent, path: ComparePath, query: CompareQuery) -> Result<SnapshotDiff, Problem> {
    let layout = agent.services().layout.clone();
    blocking(move || {
        let record: Option<HostRecord> = durable::read_json(&layout.host_record(&path.vm))?;
        let record = record.ok_or_else(|| Problem::not_found("vm", &path.vm))?;
        let dirs = layout.vm(&path.vm, &record.pool)?;
        let from = archive::read(&dirs, &path.from)?;
        let to = archive::read(&dirs, &path.to)?;
        let list_max = query.list.unwrap_or(LIST_DEFAULT);
        let options = Options { content: query.content.unwrap_or_default(), list_max };
        let disks = compare_disks(&dirs, &from, &to, options)?;
        let memory = memory(&dirs, &from, &to)?;
        Ok(in_words_of_the_model(disks, memory, configuration(&from, &to)))
    })
    .await
}

/// Compares the disks one by one. What is on a data disk is named after it.
fn compare_disks(
    dirs: &VmDirs,
    from: &Manifest,
    to: &Manifest,
    options: Options,
) -> Result<Comparison, Problem> {
    let mut all = Comparison { written_bytes: 0, file_systems: Vec::new(), unread: Vec::new() };
    let mut left = options;
    for disk in 0..from.disks().count().max(to.disks().count()) {
        let found = berth_inspect::compare(&layers(dirs, from, disk), &layers(dirs, to, disk), left)
            .map_err(|error| Problem::new(ProblemCode::BadImage, with_causes(&error)))?;
        let named = |volume: String| match disk {
            disks::ROOT => volume,
            data => volume_of(data, &volume),
        };
        all.written_bytes += found.written_bytes;
        let listed: usize = found.file_systems.iter().map(|one| one.changes.list.len()).sum();
        left.list_max = left.list_max.saturating_sub(listed);
        let changes = found.file_systems.into_iter();
        all.file_systems
            .extend(changes.map(|changes| FileSystemChanges { volume: named(changes.volume), ..changes }));
        all.unread.extend(found.unread.into_iter().map(named));
    }
    Ok(all)
}

/// What a volume of a data disk is called: the disk as a whole by the disk's name alone.
fn volume_of(disk: usize, volume: &str) -> String {
    let name = disks::name(disk);
    if volume.starts_with("disk") { volume.replacen("disk", &name, 1) } else { format!("{name}:{volume}") }
}

/// The files of a disk of a snapshot, from its bottom up.
fn layers(dirs: &VmDirs, manifest: &Manifest, disk: usize) -> Vec<LayerFile> {
    let image = &manifest.definition.image;
    let bottom = image.part(PartRole::Disk).filter(|_| disk == disks::ROOT);
    let bottom = bottom.map(|part| LayerFile {
        path: dirs.pool.part(&image.id, PartRole::Disk, part.format),
        format: match part.format {
            PartFormat::Qcow2 => LayerFormat::Qcow2,
            PartFormat::Raw => LayerFormat::Raw,
        },
    });
    let layer = |layer| LayerFile { path: dirs.layer(layer), format: LayerFormat::Qcow2 };
    bottom.into_iter().chain(manifest.disks().of(disk).iter().map(layer)).collect()
}

/// Counts the pages that differ, by their hashes.
fn memory(dirs: &VmDirs, from: &Manifest, to: &Manifest) -> Result<Option<MemoryDiff>, Problem> {
    let (Some(_), Some(_)) = (&from.memory, &to.memory) else { return Ok(None) };
    let (old, new) = (index(dirs, from)?, index(dirs, to)?);
    // Hashes under two keys say nothing of each other.
    if old.hasher() != new.hasher() {
        return Ok(None);
    }
    let pages = old.page_count().max(new.page_count());
    let at = |index: &PageIndex, page| index.get(page).unwrap_or(PageHash::ZERO);
    let changed_pages = (0..pages).filter(|page| at(&old, *page) != at(&new, *page)).count() as u64;
    Ok(Some(MemoryDiff { changed_pages, pages }))
}

fn index(dirs: &VmDirs, manifest: &Manifest) -> Result<PageIndex, Problem> {
    let path = SnapshotFiles::of(dirs, &manifest.snapshot).index();
    let bytes = std::fs::read(&path).map_err(FileError::io(&path, "read"))?;
    let snapshot = manifest.snapshot.clone();
    PageIndex::open(bytes)
        .map_err(|error| Problem::from(ArchiveError::Damaged { snapshot, path, detail: with_causes(&error) }))
}

/// What of the specification differs, field by field.
fn configuration(from: &Manifest, to: &Manifest) -> Vec<ConfigurationChange> {
    let (old, new) = (fields(from), fields(to));
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = names.into_iter().filter(|name| old.get(*name) != new.get(*name));
    let text = |fields: &BTreeMap<String, String>, name: &str| {
        let hidden = |_: &String| "(not shown)".to_owned();
        let value = fields.get(name);
        if name == HIDDEN { value.map(hidden) } else { value.cloned() }.unwrap_or_default()
    };
    changed
        .map(|name| ConfigurationChange { field: name.clone(), from: text(&old, name), to: text(&new, name) })
        .collect()
}

fn fields(manifest: &Manifest) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let spec = serde_json::to_value(&manifest.definition.spec).unwrap_or_default();
    flatten("", &spec, &mut fields);
    fields.insert("image_id".to_owned(), manifest.definition.image.id.to_string());
    fields
}

fn flatten(name: &str, value: &Value, fields: &mut BTreeMap<String, String>) {
    let below = |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match value {
        Value::Object(parts) => parts.iter().for_each(|(part, value)| flatten(&below(part), value, fields)),
        Value::Array(parts) => {
            parts.iter().enumerate().for_each(|(at, value)| flatten(&below(&at.to_string()), value, fields));
        }
        Value::Null => {}
        Value::String(text) => {
            fields.insert(name.to_owned(), text.clone());
        }
        other => {
            fields.insert(name.to_owned(), other.to_string());
        }
    }
}

fn in_words_of_the_model(
    disks: Comparison,
    memory: Option<MemoryDiff>,
    configuration: Vec<ConfigurationChange>,
) -> SnapshotDiff {
    let file_systems = disks.file_systems.into_iter().map(|found| FileSystemDiff {
        volume: found.volume,
        added: found.changes.added,
        removed: found.changes.removed,
        modified: found.changes.modified,
        changes: found.changes.list.into_iter().map(file_change).collect(),
    });
    SnapshotDiff {
        disk_written_bytes: disks.written_bytes,
        file_systems: file_systems.collect(),
        unread: disks.unread,
        memory,
        configuration,
    }
}

fn file_change(change: berth_inspect::FileChange) -> FileChange {
    let kind = match change.kind {
        berth_inspect::FileChangeKind::Added => FileChangeKind::Added,
        berth_inspect::FileChangeKind::Removed => FileChangeKind::Removed,
        berth_inspect::FileChangeKind::Modified => FileChangeKind::Modified,
    };
    let aspect = |aspect| match aspect {
        Aspect::Type => FileAspect::Type,
        Aspect::Content => FileAspect::Content,
        Aspect::Mode => FileAspect::Mode,
        Aspect::Owner => FileAspect::Owner,
        Aspect::Time => FileAspect::Time,
    };
    FileChange { path: change.path, kind, aspects: change.aspects.into_iter().map(aspect).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_a_data_disk_is_named_after_it() {
        assert_eq!(volume_of(2, "disk"), "data2");
        assert_eq!(volume_of(2, "p1"), "data2:p1");
    }

    #[test]
    fn a_specification_is_compared_field_by_field() {
        let mut fields = BTreeMap::new();
        let spec =
            serde_json::json!({"memory_mib": 256, "nics": [{"mac": "aa"}, {"mac": "bb"}], "note": null});
        flatten("", &spec, &mut fields);
        let expected = [("memory_mib", "256"), ("nics.0.mac", "aa"), ("nics.1.mac", "bb")];
        let expected: BTreeMap<String, String> =
            expected.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        assert_eq!(fields, expected);
    }
}
