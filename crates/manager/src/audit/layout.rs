//! Where in the store what is, and how it is written there.

use berth_api::manager::AuditRecord;
use berth_store::{Operation, Query, Store};
use berth_tlog::tile::{HASH_TILE_BYTES, TILE_LEAVES, TileId};
use berth_tlog::{Hash, hash};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::AuditError;

pub(super) const HEAD_KEY: &str = "/audit/head";
pub(super) const OPEN_PREFIX: &str = "/audit/open/";
/// How many tickets share an entry of the open area.
pub(super) const OPEN_PER_ENTRY: u64 = 32;

/// What the log is: written with each change of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Head {
    pub size: u64,
    /// The signed checkpoint.
    pub note: String,
}

/// A start in the open area.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Started {
    pub ticket: u64,
    pub record: AuditRecord,
}

pub(super) fn open_key(entry: u64) -> String {
    format!("{OPEN_PREFIX}{entry:020}")
}

pub(super) fn tile_key(id: TileId) -> String {
    format!("/audit/tiles/{}/{:012}", id.level, id.index)
}

pub(super) fn leaves_prefix(tile: u64) -> String {
    format!("/audit/leaves/{tile:012}/")
}

/// Writes records, of which the first has this number, and none is of another tile.
pub(super) fn put_leaves(first: u64, lines: &[Bytes]) -> Operation {
    let key = format!("{}{:03}", leaves_prefix(first / TILE_LEAVES), first % TILE_LEAVES);
    Operation::put(key, lines.join(&b'\n'))
}

/// Writes a tile; the note is the checkpoint that was signed when it became full.
pub(super) fn put_tile(id: TileId, hashes: &[Hash], note: Option<&str>) -> Operation {
    let mut value = hash::join(hashes);
    value.extend(note.unwrap_or_default().bytes());
    Operation::put(tile_key(id), value)
}

/// A full tile of leaves, with the checkpoint that was signed when it became full.
pub(super) async fn full_tile(store: &dyn Store, index: u64) -> Result<(Vec<Hash>, String), AuditError> {
    let key = tile_key(TileId { level: 0, index });
    let value = store.get(&key).await?.map(|entry| entry.value).unwrap_or_default();
    let (hashes, note) = value.split_at_checked(HASH_TILE_BYTES).ok_or_else(|| damaged(&key))?;
    let note = String::from_utf8(note.to_vec()).map_err(|_| damaged(&key))?;
    Ok((hash::split(hashes).ok_or_else(|| damaged(&key))?, note))
}

/// A tile of a higher level, as far as it is filled.
pub(super) async fn upper_tile(store: &dyn Store, id: TileId) -> Result<Vec<Hash>, AuditError> {
    let key = tile_key(id);
    let value = store.get(&key).await?.map(|entry| entry.value).unwrap_or_default();
    hash::split(&value).ok_or_else(|| damaged(&key))
}

/// The lines of a tile's records, in order, as far as there are any.
pub(super) async fn lines_of(store: &dyn Store, tile: u64) -> Result<Vec<Bytes>, AuditError> {
    let prefix = leaves_prefix(tile);
    let page = store.list(Query::prefix(&*prefix)).await?;
    let mut lines = Vec::new();
    for entry in page.entries {
        let offset: Option<usize> = entry.key.strip_prefix(&prefix).and_then(|text| text.parse().ok());
        if offset != Some(lines.len()) {
            return Err(damaged(&entry.key));
        }
        let value = &entry.value;
        lines.extend(value.split(|byte| *byte == b'\n').map(|line| value.slice_ref(line)));
    }
    Ok(lines)
}

pub(super) fn decode<T: serde::de::DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, AuditError> {
    serde_json::from_slice(bytes).map_err(|source| {
        let expected = std::any::type_name::<T>();
        AuditError::Store(berth_store::Error::Undecodable { key: key.to_owned(), expected, source })
    })
}

pub(super) fn record_of(line: &[u8]) -> Result<AuditRecord, AuditError> {
    serde_json::from_slice(line)
        .map_err(|error| AuditError::Damaged { detail: format!("a record can't be read: {error}") })
}

pub(super) fn damaged(key: &str) -> AuditError {
    AuditError::Damaged { detail: format!("{key} is not there, or not what was written") }
}
